"""Batched augmentation: parameters are drawn per image and applied on the batch's device.

All random numbers come from a CPU generator and reach the device as small tensors: a seed gives the same
changes on a CPU and a GPU, and no step waits for the device. Use it outside autocast, which would round
the pixels to 8 bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Range = tuple[float, float]

# Rows Y, I, Q of the NTSC color space; Y is the luma of ITU-R BT.601. Grays lie on its first axis; in the
# plane of the other two, saturation scales and hue rotates.
_RGB_TO_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The changes to an image, in this order; the defaults change nothing. Draws from ranges are uniform.

    Attributes:
        shift_fraction: Right and down, of width and height. Beyond its border an image is mirrored.
        flip_probability: Of a left-right flip, and independently of an upside-down flip.
        rotation_degrees: Clockwise about the center.
        right_angles: Rotate by a random multiple of 90 degrees instead, and shift by whole pixels: pixels
            only change places, and nothing is blurred by resampling. With the flips, that gives the 8
            orientations of a square. There is then no zoom.
        zoom: Enlargement about the center.
        brightness: Factor on all channels.
        contrast: Factor on the distance from the image's mean gray.
        saturation: Factor on the distance from each pixel's own gray.
        hue_degrees: Rotation about the gray axis in YIQ, which keeps luma (torchvision: in HSV).
        erase_probability: Of covering a rectangle with the image's mean color; see Zhong et al., "Random
            Erasing Data Augmentation" (AAAI 2020).
        erase_area_fraction: Fraction of the image that the rectangle covers, up to a half.
    """

    shift_fraction: Range = (0.0, 0.0)
    flip_probability: float = 0.0
    rotation_degrees: Range = (0.0, 0.0)
    right_angles: bool = False
    zoom: Range = (1.0, 1.0)
    brightness: Range = (1.0, 1.0)
    contrast: Range = (1.0, 1.0)
    saturation: Range = (1.0, 1.0)
    hue_degrees: Range = (0.0, 0.0)
    erase_probability: float = 0.0
    erase_area_fraction: Range = (0.0, 0.0)


_FLIPS = Recipe(flip_probability=0.5, right_angles=True)
_CROPS = replace(_FLIPS, shift_fraction=(-0.1, 0.1))
_COLORS = replace(
    _CROPS, brightness=(0.9, 1.1), contrast=(0.9, 1.1), saturation=(0.9, 1.1), hue_degrees=(-3, 3)
)
_LIGHT = Recipe(
    shift_fraction=(-0.05, 0.05),
    flip_probability=0.5,
    rotation_degrees=(-180, 180),
    zoom=(0.9, 1.1),
    brightness=(0.9, 1.1),
    contrast=(0.9, 1.1),
)
_STANDARD = replace(
    _LIGHT,
    shift_fraction=(-0.1, 0.1),
    zoom=(0.8, 1.25),
    brightness=(0.85, 1.15),
    contrast=(0.8, 1.2),
    saturation=(0.8, 1.2),
    hue_degrees=(-5, 5),
)
_STRONG = replace(
    _STANDARD,
    zoom=(0.65, 1.5),
    brightness=(0.7, 1.3),
    contrast=(0.6, 1.4),
    saturation=(0.6, 1.4),
    hue_degrees=(-10, 10),
    erase_probability=0.5,
    erase_area_fraction=(0.02, 0.2),
)
# Dermoscopy images have no up and down, so all recipes but `none` rotate. Color separates diagnoses
# (red: vascular, blue-gray: regression), so hue hardly changes; skin is bright already, so brightness changes
# less than contrast.
RECIPES: Mapping[str, Recipe] = {
    "none": Recipe(),
    "flips": _FLIPS,
    "crops": _CROPS,
    "colors": _COLORS,
    "light": _LIGHT,
    "standard": _STANDARD,
    "strong": _STRONG,
}


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Return the images, each changed in its own random way; the recipe `none` returns the input itself.

    `images` and the result are float32 (N, 3, H, W) in [0, 1], in the same memory format.
    """
    if recipe == Recipe():
        return images
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    parameters = draw_parameters(recipe, len(images), generator).to(images.device, non_blocking=True)
    images = _warp(images, parameters[:, :6], "nearest" if recipe.right_angles else "bilinear")
    if _changes_color(recipe):
        images = _recolor(images, parameters[:, 6:16])
    if recipe.erase_probability > 0:
        inside = _is_inside(parameters[:, 16:], images)
        images = torch.where(inside, images.mean((2, 3), keepdim=True), images)
    images = images.clamp(0, 1)
    # Converted last: on a CPU the steps above take 1.3 to 10 times as long on interleaved channels.
    return images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def draw_parameters(recipe: Recipe, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw the changes of each image of a batch, as float32 (N, 20) on the CPU.

    The columns: 6 of the map from a position in the result to one in the input (2x3, in half sides from the
    center); 9 of the color matrix (3x3), and the fraction of the image's mean gray to add; 4 of the erased
    box (left, top, right, bottom, as fractions of the sides).
    """
    draws = torch.rand((15, batch_size), generator=generator)
    geometry, color = _compose_geometry(recipe, draws[:6]), _compose_color(recipe, draws[6:10])
    return torch.cat([geometry, color, _compose_boxes(recipe, draws[10:])], dim=1)


def mix(
    images: Tensor,
    targets: Tensor,
    num_classes: int,
    mixup_alpha: float,
    cutmix_alpha: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Mix each image and its target with those of another image of the batch.

    MixUp blends whole images, CutMix pastes a rectangle; the partner's fraction is drawn per image from
    Beta(alpha, alpha). An alpha of 0 turns its kind off; with both on, each batch uses one at random.

    Args:
        images: float32 (N, 3, H, W).
        targets: int64 (N,).
        num_classes: K.
        mixup_alpha: Of MixUp.
        cutmix_alpha: Of CutMix.
        generator: On the CPU.

    Returns:
        The images, and the fraction of each class in them, float32 (N, K).

    Source: Zhang et al., "mixup" (ICLR 2018); Yun et al., "CutMix" (ICCV 2019), section 3.1.
    """
    fractions = F.one_hot(targets, num_classes).float()
    if not (mixup_alpha or cutmix_alpha):
        return images, fractions
    use_cutmix = not mixup_alpha or (cutmix_alpha > 0 and bool(torch.rand((), generator=generator) < 0.5))
    partners = torch.randperm(len(images), generator=generator).to(images.device, non_blocking=True)
    weight = _draw_beta(cutmix_alpha if use_cutmix else mixup_alpha, len(images), generator)
    if use_cutmix:
        center = torch.rand((len(images), 2), generator=generator)
        half_side = weight.sqrt()[:, None] / 2
        boxes = torch.cat([center - half_side, center + half_side], dim=1)
        pasted = _is_inside(boxes.to(images.device, non_blocking=True), images)
        images = torch.where(pasted, images[partners], images)
        # The border may cut a box, so the pixels really pasted are counted.
        weight = pasted.float().mean((1, 2, 3))
    else:
        weight = weight.to(images.device, non_blocking=True)
        images = images.lerp(images[partners], weight.view(-1, 1, 1, 1))
    return images, fractions.lerp(fractions[partners], weight[:, None])


def _scale(draws: Tensor, limits: Range) -> Tensor:
    low, high = limits
    return low + (high - low) * draws


def _compose_geometry(recipe: Recipe, draws: Tensor) -> Tensor:
    # Sampling maps result to input, so the steps are in reverse order: zoom, rotate, flip, shift.
    flip_x, flip_y, turn, zoom, right, down = draws
    degrees = 90 * (4 * turn).floor() if recipe.right_angles else _scale(turn, recipe.rotation_degrees)
    angle, zoom = torch.deg2rad(degrees), _scale(zoom, recipe.zoom)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    sign_x, sign_y = (torch.where(flip < recipe.flip_probability, -1.0, 1.0) for flip in (flip_x, flip_y))
    shift_x, shift_y = (-2 * _scale(shift, recipe.shift_fraction) for shift in (right, down))
    return torch.stack([sign_x * cos, sign_x * sin, shift_x, -sign_y * sin, sign_y * cos, shift_y], dim=1)


def _compose_color(recipe: Recipe, draws: Tensor) -> Tensor:
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
    # Saturation and hue do not change the gray that contrast adds, so one number per image is enough for it.
    return torch.cat([matrix.flatten(1), (brightness * (1 - contrast))[:, None]], dim=1)


def _compose_boxes(recipe: Recipe, draws: Tensor) -> Tensor:
    happens, area, aspect, left, top = draws
    # Width : height from 1:2 to 2:1. An image that is not erased has a box without area.
    area = _scale(area, recipe.erase_area_fraction) * (happens < recipe.erase_probability)
    ratio = 2.0 ** (2 * aspect - 1)
    width, height = (area * ratio).sqrt(), (area / ratio).sqrt()
    left, top = left * (1 - width), top * (1 - height)
    return torch.stack([left, top, left + width, top + height], dim=1)


def _warp(images: Tensor, geometry: Tensor, mode: str) -> Tensor:
    height, width = images.shape[2:]
    theta = geometry.reshape(-1, 2, 3).clone()
    # Half sides are units of different length if the image is not square.
    theta[:, 0, 1] *= height / width
    theta[:, 1, 0] *= width / height
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.contiguous(), grid, mode, padding_mode="reflection", align_corners=False)


def _changes_color(recipe: Recipe) -> bool:
    factors = {recipe.brightness, recipe.contrast, recipe.saturation}
    return factors != {(1.0, 1.0)} or recipe.hue_degrees != (0.0, 0.0)


def _recolor(images: Tensor, color: Tensor) -> Tensor:
    red, green, blue = images.mean((2, 3)).unbind(1)
    luma = _RGB_TO_YIQ[0]
    mean_gray = luma[0] * red + luma[1] * green + luma[2] * blue
    offset = (color[:, 9] * mean_gray).view(-1, 1, 1)
    return torch.baddbmm(offset, color[:, :9].reshape(-1, 3, 3), images.flatten(2)).view_as(images)


def _is_inside(boxes: Tensor, images: Tensor) -> Tensor:
    """Return which pixels have their center in their image's box, bool (N, 1, H, W)."""
    height, width = images.shape[2:]
    y = (torch.arange(height, device=boxes.device)[:, None] + 0.5) / height
    x = (torch.arange(width, device=boxes.device) + 0.5) / width
    left, top, right, bottom = boxes[:, :, None, None, None].unbind(1)
    return (left <= x) & (x < right) & (top <= y) & (y < bottom)


def _draw_beta(alpha: float, size: int, generator: torch.Generator) -> Tensor:
    # torch draws from Beta with its global generator only.
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.from_numpy(np.random.default_rng(seed).beta(alpha, alpha, size)).float()
