"""Random changes to batches of training images: drawn for each image, made on the device the batch is on.

All random numbers come from a CPU generator and reach the device as small tensors: a seed draws the same
changes for a CPU as for a GPU, and no step waits for the device. Use it outside autocast, which would round
the pixels to 8 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]

# Rows Y, I, Q of the NTSC colour space; Y is the luma of ITU-R BT.601. Greys lie on its first axis; in the
# plane of the other two, saturation scales and hue turns.
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What may happen to an image, in this order; the defaults change nothing. Draws from ranges are uniform.

    Attributes:
        shift_fraction: Right and down, in shares of width and height. Past its border a picture is mirrored.
        flip_probability: Of mirroring left-right, and once more of mirroring upside down.
        rotation_degrees: Clockwise about the centre.
        zoom: Enlargement about the centre.
        brightness: Factor on all channels.
        contrast: Factor on the distance from the image's mean grey.
        saturation: Factor on the distance from each pixel's own grey.
        hue_degrees: Turn about the grey axis in YIQ, which keeps luma (torchvision's hue turns in HSV).
        erase_probability: Of covering a rectangle with the image's mean colour, after Zhong et al., "Random
            Erasing Data Augmentation" (AAAI 2020).
        erase_area_fraction: Share of the image which that rectangle covers, up to a half.
    """

    shift_fraction: Range = (0.0, 0.0)
    flip_probability: float = 0.0
    rotation_degrees: Range = (0.0, 0.0)
    zoom: Range = (1.0, 1.0)
    brightness: Range = (1.0, 1.0)
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    hue_degrees: Range = (0.0, 0.0)
    erase_probability: float = 0.0
    erase_area_fraction: Range = (0.0, 0.0)


# Dermoscopy knows no up and down, so all but `none` turn all the way. Colour tells diagnoses apart (red:
# vascular, blue-grey: regression), so hue hardly moves; skin is bright already, so brightness moves less than
# contrast.
RECIPES: Mapping[str, Recipe] = {
    "none": Recipe(),
    "light": Recipe(
        shift_fraction=(-0.05, 0.05),
        flip_probability=0.5,
        rotation_degrees=(-180, 180),
        zoom=(0.9, 1.1),
        brightness=(0.9, 1.1),
        contrast=(0.9, 1.1),
    ),
    "standard": Recipe(
        shift_fraction=(-0.1, 0.1),
        flip_probability=0.5,
        rotation_degrees=(-180, 180),
        zoom=(0.8, 1.25),
        brightness=(0.85, 1.15),
        contrast=(0.8, 1.2),
        saturation=(0.8, 1.2),
        hue_degrees=(-5, 5),
    ),
    "strong": Recipe(
        shift_fraction=(-0.1, 0.1),
        flip_probability=0.5,
        rotation_degrees=(-180, 180),
        zoom=(0.65, 1.5),
        brightness=(0.7, 1.3),
        contrast=(0.6, 1.4),
        saturation=(0.6, 1.4),
        hue_degrees=(-10, 10),
        erase_probability=0.5,
        erase_area_fraction=(0.02, 0.2),
    ),
}


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Change every image in its own random way, in a copy; the recipe `none` gives back the input itself.

    `images` and the result are float32 (N, 3, H, W) in [0, 1], in the same memory format.
    """
    if recipe == Recipe():
        return images
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    parameters = draw_parameters(recipe, len(images), generator).to(images.device, non_blocking=True)
    images = _warp(images, parameters[:, :6])
    images = _recolour(images, parameters[:, 6:16])
    if recipe.erase_probability > 0:
        inside = _is_inside(parameters[:, 16:], images)
        images = torch.where(inside, images.mean((2, 3), keepdim=True), images)
    images = images.clamp_(0, 1)
    # Converted last: on a CPU the steps above take 1.3 to 10 times as long on interleaved channels.
    return images.contiguous(memory_format=torch.channels_last) if channels_last else images


def draw_parameters(recipe: Recipe, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw what happens to each image of a batch, as float32 (N, 20) on the CPU.

    The columns: 6 of the map from a place in the result to its place in the input (2x3, in half sides from
    the centre); 9 of the colour matrix (3x3), and the share of the image's mean grey to add; 4 of the erased
    box (left, top, right, bottom, in shares of the sides).
    """
    draws = torch.rand((15, batch_size), generator=generator)
    geometry = _compose_geometry(recipe, draws[:6])
    colour = _compose_colour(recipe, draws[6:10])
    boxes = _compose_boxes(recipe, draws[10:])
    return torch.cat([geometry, colour, boxes], dim=1)


def mix(
    images: Tensor,
    targets: Tensor,
    num_classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with those of another image of the batch.

    MixUp blends whole images, CutMix pastes a rectangle; the share of the partner is drawn per image from
    Beta(alpha, alpha). An alpha of 0 turns its kind off; with both on, a batch takes either at random.

    Args:
        images: float32 (N, 3, H, W).
        targets: int64 (N,).
        num_classes: K.
        mixup_alpha: Of MixUp.
        cutmix_alpha: Of CutMix.
        generator: On the CPU.

    Returns:
        The images, and the share of each class in them, float32 (N, K); with both alphas 0 the input itself,
        and one-hot.

    Source: Zhang et al., "mixup" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019), section 3.1.
    """
    shares = F.one_hot(targets, num_classes).float()
    if not (mixup_alpha or cutmix_alpha):
        return images, shares
    use_cutmix = not mixup_alpha or (cutmix_alpha > 0 and bool(torch.rand((), generator=generator) < 0.5))
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    weight = _draw_beta(cutmix_alpha if use_cutmix else mixup_alpha, len(images), generator)
    if use_cutmix:
        centre = torch.rand((len(images), 2), generator=generator)
        half_side = weight.sqrt()[:, None] / 2
        boxes = torch.cat([centre - half_side, centre + half_side], dim=1)
        pasted = _is_inside(boxes.to(images.device, non_blocking=True), images)
        images = torch.where(pasted, images[partners], images)
        # A box may hang over the border, so only the pixels really pasted count.
        weight = pasted.float().mean((1, 2, 3))
    else:
        weight = weight.to(images.device, non_blocking=True)
        images = images.lerp(images[partners], weight.view(-1, 1, 1, 1))
    return images, shares.lerp(shares[partners], weight[:, None])


def _scale(draws: Tensor, limits: Range) -> Tensor:
    low, high = limits
    return low + (high - low) * draws


def _compose_geometry(recipe: Recipe, draws: Tensor) -> Tensor:
    # Sampling asks where a pixel comes from, so the steps stand in reverse: zoom, turn, flip, shift.
    flip_x, flip_y, turn, zoom, right, down = draws
    angle = torch.deg2rad(_scale(turn, recipe.rotation_degrees))
    zoom = _scale(zoom, recipe.zoom)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    sign_x, sign_y = (torch.where(flip < recipe.flip_probability, -1.0, 1.0) for flip in (flip_x, flip_y))
    shift_x, shift_y = (-2 * _scale(shift, recipe.shift_fraction) for shift in (right, down))
    return torch.stack([sign_x * cos, sign_x * sin, shift_x, -sign_y * sin, sign_y * cos, shift_y], dim=1)


def _compose_colour(recipe: Recipe, draws: Tensor) -> Tensor:
    brightness = _scale(draws[0], recipe.brightness)
    contrast = _scale(draws[1], recipe.contrast)
    saturation = _scale(draws[2], recipe.saturation)
    hue = torch.deg2rad(_scale(draws[3], recipe.hue_degrees))
    to_yiq = torch.tensor(_RGB_TO_YIQ)
    turn = torch.eye(3).repeat(len(hue), 1, 1)
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrix = (brightness * contrast).view(-1, 1, 1) * (to_yiq.inverse() @ turn @ to_yiq)
    # Saturation and hue leave the grey that contrast adds as it is, so one number an image is enough for it.
    return torch.cat([matrix.flatten(1), (brightness * (1 - contrast))[:, None]], dim=1)


def _compose_boxes(recipe: Recipe, draws: Tensor) -> Tensor:
    happens, area, aspect, left, top = draws
    # Width : height from 1:2 to 2:1. A box that does not happen has no area.
    area = _scale(area, recipe.erase_area_fraction) * (happens < recipe.erase_probability)
    ratio = 2.0 ** (2 * aspect - 1)
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    left, top = left * (1 - width), top * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


def _warp(images: Tensor, geometry: Tensor) -> Tensor:
    height, width = images.shape[2:]
    theta = geometry.reshape(-1, 2, 3).clone()
    # Half sides are units of different length where the image is not square.
    theta[:, 0, 1] *= height / width
    theta[:, 1, 0] *= width / height
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.contiguous(), grid, padding_mode="reflection", align_corners=False)


def _recolour(images: Tensor, colour: Tensor) -> Tensor:
    red, green, blue = images.mean((2, 3)).unbind(1)
    luma = _RGB_TO_YIQ[0]
    mean_grey = luma[0] * red + luma[1] * green + luma[2] * blue
    offset = (colour[:, 9] * mean_grey).view(-1, 1, 1)
    return torch.baddbmm(offset, colour[:, :9].reshape(-1, 3, 3), images.flatten(2)).view_as(images)


def _is_inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Tell which pixels have their centre in their image's box, as bool (N, 1, H, W)."""
    height, width = images.shape[2:]
    y = (torch.arange(height, device=boxes.device)[:, None] + 0.5) / height
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    left, top, right, bottom = boxes[:, :, None, None, None].unbind(1)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def _draw_beta(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    # torch draws from Beta with its global generator only.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, size)).float()
