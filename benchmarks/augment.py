"""Images a second of recipe `standard` on one CPU thread: this package beside torchvision's transforms.

Torchvision draws once a call, so each image needs a call of its own. The two take turns, so that whatever
else the machine does hits both, and the best round of each counts.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from skin_resnet.data.augment import RECIPES, augment

ROUNDS = 7


def build_torchvision() -> v2.Compose:
    """Build the same changes from torchvision's parts, for one image."""
    recipe = RECIPES["standard"]
    hue = recipe.hue_degrees[1] / 360
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(recipe.flip_probability),
            v2.RandomVerticalFlip(recipe.flip_probability),
            v2.RandomAffine(
                recipe.rotation_degrees,
                translate=(recipe.shift_fraction[1], recipe.shift_fraction[1]),
                scale=recipe.zoom,
                interpolation=InterpolationMode.BILINEAR,
            ),
            v2.ColorJitter(recipe.brightness, recipe.contrast, recipe.saturation, hue),
        ]
    )


def measure(change: Callable[[Tensor], object], images: Tensor) -> float:
    """Measure the images a second of one call on the whole batch."""
    start = time.perf_counter()
    change(images)
    return len(images) / (time.perf_counter() - start)


def main() -> None:
    """Print one line for each image size."""
    torch.set_num_threads(1)
    torchvision = build_torchvision()
    generator = torch.Generator().manual_seed(0)
    for batch_size, side in ((64, 64), (32, 224)):
        images = torch.rand((batch_size, side, side, 3), generator=generator).permute(0, 3, 1, 2)
        rounds = [
            (
                measure(lambda batch: augment(batch, RECIPES["standard"], generator), images),
                measure(lambda batch: torch.stack([torchvision(image) for image in batch]), images),
            )
            for _ in range(ROUNDS)
        ]
        ours, theirs = (max(speeds) for speeds in zip(*rounds, strict=True))
        print(f"{side} px: {ours:.0f} img/s, torchvision {theirs:.0f} img/s, {ours / theirs:.1f}x")


if __name__ == "__main__":
    main()
