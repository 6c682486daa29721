"""From stored pixels to what the network takes: the only place that knows how."""

import torch
from torch import Tensor
from torch.nn import functional as F

# The mean and standard deviation of ImageNet's channels, which torchvision's weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def to_float(pixels: Tensor) -> Tensor:
    """Convert pixels uint8 (N, H, W, 3) to images float32 (N, 3, H, W) in [0, 1], laid out channels-last."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


def shrink(images: Tensor, size: int) -> Tensor:
    """Shrink square float32 images (N, 3, H, H) to a side of `size`, antialiased, as decoding does."""
    if size == images.shape[2]:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)


def normalize(images: Tensor) -> Tensor:
    """Shift and scale float32 images (N, 3, H, W) in [0, 1] as the ImageNet weights expect, in one pass."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    # Non-blocking, or a GPU would finish all earlier work before these six numbers are copied.
    shift, scale = torch.stack((-mean / std, 1 / std)).view(2, 3, 1, 1).to(images.device, non_blocking=True)
    return torch.addcmul(shift, images, scale)
