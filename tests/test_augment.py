from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from skin_resnet.config import AugmentRecipe
from skin_resnet.data.augment import RECIPES, Recipe, augment, draw_parameters, mix

RANDOM_RECIPES = [name for name in RECIPES if name != "none"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def smooth_images(count: int = 3, height: int = 48, width: int = 48) -> Tensor:
    """Draw blobs in [0.35, 0.65]: no color test here leaves [0, 1], so clamping hides nothing."""
    coarse = torch.rand((count, 3, 6, 6), generator=seeded(1))
    return tv.resize(coarse, [height, width]) * 0.3 + 0.35


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_every_recipe_that_a_user_can_name_exists() -> None:
    assert set(RECIPES) == set(get_args(AugmentRecipe))


def test_none_gives_back_the_input_itself() -> None:
    images = smooth_images()
    assert augment(images, RECIPES["none"], seeded()) is images


@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
@pytest.mark.parametrize(("degrees", "zoom"), [(30, 1.0), (-110, 1.0), (0, 1.3), (0, 0.7), (75, 0.8)])
def test_turning_and_zooming_are_those_of_torchvision(
    size: tuple[int, int], degrees: float, zoom: float
) -> None:
    def warp(images: Tensor) -> Tensor:
        return tv.affine(images, degrees, [0, 0], zoom, [0, 0], interpolation=InterpolationMode.BILINEAR)

    images = smooth_images(2, *size)
    changed = augment(images, Recipe(rotation_degrees=(degrees, degrees), zoom=(zoom, zoom)), seeded())
    # Torchvision fills with black what comes from outside the image, so only the rest can be compared.
    inside = warp(torch.ones_like(images)) > 0.99999
    assert inside.float().mean() > 0.4
    assert_near(changed[inside], warp(images)[inside])


def test_a_shift_is_right_and_down_and_mirrors_the_image_at_its_border() -> None:
    images = smooth_images(2, 40, 80)
    shifted = augment(images, Recipe(shift_fraction=(0.1, 0.1)), seeded())
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (4, 0), (8, 0)), mode="symmetric")
    assert_near(shifted, torch.from_numpy(padded[:, :, :40, :80].copy()))


def test_geometry_is_shift_then_flips_then_turn() -> None:
    images, shift = smooth_images(), (0.125, 0.125)
    shifted = augment(images, Recipe(shift_fraction=shift), seeded())
    all_at_once = Recipe(shift_fraction=shift, flip_probability=1, rotation_degrees=(30, 30))
    flipped_and_turned = augment(tv.hflip(tv.vflip(shifted)), Recipe(rotation_degrees=(30, 30)), seeded())
    middle = (..., slice(16, 32), slice(16, 32))
    assert_near(augment(images, all_at_once, seeded())[middle], flipped_and_turned[middle])


def test_flips_are_drawn_for_each_axis_and_image() -> None:
    image = smooth_images(1)
    flipped = augment(image.expand(64, -1, -1, -1), Recipe(flip_probability=0.5), seeded())
    variants = torch.cat([image, tv.hflip(image), tv.vflip(image), tv.hflip(tv.vflip(image))])
    distances = (flipped[:, None] - variants).abs().amax((2, 3, 4))
    assert distances.amin(1).max() < 1e-5
    counts = distances.argmin(1).bincount(minlength=4)
    assert counts.min() >= 8, "each of the four should come about 16 times in 64"


@pytest.mark.parametrize("factor", [0.6, 0.9, 1.3])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_color_factors_are_those_of_torchvision(name: str, factor: float) -> None:
    images = smooth_images()
    changed = augment(images, Recipe(**{name: (factor, factor)}), seeded())
    expected = torch.stack([getattr(tv, f"adjust_{name}")(image, factor) for image in images])
    # Torchvision's luma weights add up to 0.9999, ours to 1.
    assert_near(changed, expected, tolerance=1e-4)


def test_color_factors_follow_each_other_in_torchvisions_first_order() -> None:
    images = smooth_images()
    recipe = Recipe(brightness=(0.8, 0.8), contrast=(1.3, 1.3), saturation=(0.7, 0.7))
    one_by_one = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(images[0], 0.8), 1.3), 0.7)
    assert_near(augment(images, recipe, seeded())[0], one_by_one, tolerance=1e-4)


@pytest.mark.parametrize("degrees", [-30.0, 5.0, 120.0])
def test_hue_turns_the_chroma_plane_of_yiq(degrees: float) -> None:
    def to_chroma(pixels: np.ndarray) -> np.ndarray:
        # I + jQ by its definition: the color differences U and V of YUV, turned by 33 degrees and swapped.
        red, green, blue = pixels
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        u, v = 0.492111 * (blue - luma), 0.877283 * (red - luma)
        return (v + 1j * u) * np.exp(1j * np.radians(33))

    image = smooth_images(1)
    changed = augment(image, Recipe(hue_degrees=(degrees, degrees)), seeded())
    turned = to_chroma(image[0].double().numpy()) * np.exp(1j * np.radians(degrees))
    np.testing.assert_allclose(to_chroma(changed[0].double().numpy()), turned, atol=2e-4)
    assert_near(tv.rgb_to_grayscale(changed), tv.rgb_to_grayscale(image), tolerance=1e-4)


def test_flips_move_pixels_exactly_into_each_of_the_8_orientations_of_a_square() -> None:
    image = torch.rand((1, 3, 32, 32), generator=seeded())
    batch = image.expand(400, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    changed = augment(batch, RECIPES["flips"], seeded())
    assert changed.is_contiguous(memory_format=torch.channels_last)
    views = [torch.rot90(each, turns, (2, 3)) for each in (image, image.flip(3)) for turns in range(4)]
    counts = [int((changed == view).flatten(1).all(1).sum()) for view in views]
    assert sum(counts) == 400
    assert min(counts) > 25, "each of the eight should come about 50 times"


def test_crops_shift_the_flipped_image_by_whole_pixels_and_mirror_it_at_its_border() -> None:
    image = torch.rand((1, 3, 40, 40), generator=seeded())
    changed = augment(image.expand(64, -1, -1, -1), RECIPES["crops"], seeded())
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (4, 4), (4, 4)), mode="symmetric")
    windows = [
        np.rot90(each, turns, (2, 3))[..., top : top + 40, left : left + 40]
        for each in (padded, padded[..., ::-1])
        for turns in range(4)
        for top in range(9)
        for left in range(9)
    ]
    allowed = {window.tobytes() for window in windows}
    found = {each.contiguous().numpy().tobytes() for each in changed}
    assert found <= allowed
    assert len(found) > 50


def test_erasing_covers_the_drawn_box_with_the_mean_color_and_nothing_else() -> None:
    images = smooth_images(16, 64, 64)
    recipe = Recipe(erase_probability=1, erase_area_fraction=(0.1, 0.3))
    erased = augment(images, recipe, seeded())
    boxes = draw_parameters(recipe, 16, seeded())[:, 16:]
    for before, after, box in zip(images, erased, boxes, strict=True):
        left, top, right, bottom = (64 * box).round().int()
        expected = before.clone()
        expected[:, top:bottom, left:right] = before.mean((1, 2), keepdim=True)
        assert_near(after, expected)


def test_erased_areas_lie_in_the_drawn_range_and_inside_the_image() -> None:
    recipe = Recipe(erase_probability=0.5, erase_area_fraction=(0.1, 0.5))
    left, top, right, bottom = draw_parameters(recipe, 1000, seeded())[:, 16:].unbind(1)
    area = (right - left) * (bottom - top)
    erased = area > 0
    assert 400 < erased.sum() < 600
    assert area[erased].min() >= 0.0999
    assert area.max() <= 0.5001
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 1.0001


@pytest.mark.parametrize("name", [name for name in RANDOM_RECIPES if name != "flips"])
def test_every_image_of_a_batch_changes_in_its_own_way(name: str) -> None:
    image = smooth_images(1)
    changed = augment(image.expand(16, -1, -1, -1), RECIPES[name], seeded())
    distances = (changed[:, None] - changed).abs().amax((2, 3, 4))
    assert distances[~torch.eye(16, dtype=torch.bool)].min() > 0.01


@pytest.mark.parametrize("name", RANDOM_RECIPES)
def test_the_generator_alone_decides_what_happens(name: str) -> None:
    images = smooth_images()
    torch.manual_seed(1)
    first = augment(images, RECIPES[name], seeded(7))
    torch.manual_seed(2)
    assert torch.equal(first, augment(images, RECIPES[name], seeded(7)))
    assert not torch.equal(first, augment(images, RECIPES[name], seeded(8)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", list(RECIPES))
def test_range_type_memory_format_and_input_are_kept(name: str, memory_format: torch.memory_format) -> None:
    images = torch.rand((8, 3, 32, 32), generator=seeded()).contiguous(memory_format=memory_format)
    before = images.clone()
    changed = augment(images, RECIPES[name], seeded())
    assert changed.dtype == torch.float32
    assert changed.shape == images.shape
    assert changed.is_contiguous(memory_format=memory_format)
    assert 0 <= changed.min() < changed.max() <= 1
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_makes_the_same_images_as_the_cpu() -> None:
    images = smooth_images(8)
    on_cpu, on_gpu = (augment(x, RECIPES["strong"], seeded()) for x in (images, images.cuda()))
    assert_near(on_gpu.cpu(), on_cpu, tolerance=1e-4)


# Image i is filled with i, and has the target i: a mixed pixel tells where it comes from.
COUNTED = torch.arange(7.0).view(7, 1, 1, 1).expand(7, 3, 20, 30)
TARGETS = torch.arange(7)


def test_without_mixing_images_stay_and_targets_become_one_hot() -> None:
    images, shares = mix(COUNTED, TARGETS, 9, 0, 0, seeded())
    assert images is COUNTED
    assert torch.equal(shares, torch.eye(9)[:7])


@pytest.mark.parametrize(("mixup_alpha", "cutmix_alpha"), [(0.4, 0), (0, 1.0)])
def test_shares_of_the_classes_are_those_of_the_pixels(mixup_alpha: float, cutmix_alpha: float) -> None:
    for seed in range(20):
        images, shares = mix(COUNTED, TARGETS, 7, mixup_alpha, cutmix_alpha, seeded(seed))
        assert_near(shares.sum(1), torch.ones(7))
        # As image i is i everywhere, the mean of a mixed image is the mean of its classes.
        assert_near(images.mean((1, 2, 3)), shares @ TARGETS.float(), tolerance=1e-4)
        assert shares.min() >= 0
        assert (shares > 0).sum(1).max() <= 2


def test_mixup_blends_every_pixel_alike_and_cutmix_none() -> None:
    blended, _ = mix(COUNTED, TARGETS, 7, 1.0, 0, seeded())
    pasted, _ = mix(COUNTED, TARGETS, 7, 0, 1.0, seeded())
    assert torch.equal(blended.amin((1, 2, 3)), blended.amax((1, 2, 3)))
    assert (blended != blended.round()).any()
    assert torch.equal(pasted, pasted.round())


def test_cutmix_pastes_a_rectangle_of_the_partner() -> None:
    images, _ = mix(COUNTED, TARGETS, 7, 0, 1.0, seeded())
    pasted = images[:, 0] != COUNTED[:, 0]
    assert pasted.any()
    for mask in pasted:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns)
        for line in (rows, columns):
            assert line.int().diff().abs().sum() <= 2, "a rectangle has no gap"


def test_a_cutmix_box_has_the_drawn_area_unless_the_border_cuts_it() -> None:
    # With so large an alpha every draw is a half.
    _, shares = mix(torch.zeros(100, 1, 64, 64), torch.arange(100), 100, 0, 1e6, seeded())
    pasted = 1 - shares.diagonal()
    assert pasted.max() == pytest.approx(0.5, abs=0.01)
    assert pasted.min() < 0.4


def test_both_alphas_take_turns_at_random() -> None:
    batches = [mix(COUNTED, TARGETS, 7, 1.0, 1.0, seeded(seed))[0] for seed in range(40)]
    cutmixed = sum(torch.equal(images, images.round()) for images in batches)
    assert 10 <= cutmixed <= 30


def test_the_partners_share_follows_the_beta_distribution() -> None:
    _, shares = mix(torch.zeros(4000, 1, 1, 1), torch.arange(4000), 4000, 0.4, 0, seeded())
    share = shares.amax(1)
    # Beta(a, a) has variance 1 / (4 (2a + 1)); the larger share lies as far from a half as the drawn one.
    assert share.sub(0.5).square().mean() == pytest.approx(1 / (4 * 1.8), rel=0.05)


@pytest.mark.parametrize("alphas", [(1.0, 0), (0, 1.0)])
@pytest.mark.parametrize("count", [1, 3])
def test_mixing_takes_any_batch_and_keeps_its_format(count: int, alphas: tuple[float, float]) -> None:
    images = smooth_images(count).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    mixed, shares = mix(images, torch.zeros(count, dtype=torch.int64), 2, *alphas, seeded())
    assert mixed.shape == images.shape
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert_near(shares, torch.tensor([[1.0, 0.0]]).expand(count, 2))


def test_the_generator_alone_decides_the_mixing() -> None:
    first, first_shares = mix(COUNTED, TARGETS, 7, 1.0, 1.0, seeded(3))
    torch.manual_seed(5)
    again, again_shares = mix(COUNTED, TARGETS, 7, 1.0, 1.0, seeded(3))
    assert torch.equal(first, again)
    assert torch.equal(first_shares, again_shares)
