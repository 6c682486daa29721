"""Grad-CAM of the network's last stage: which regions of an image support a class."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.model.resnet import ResNet

MAX_CLASSES = 12  # each costs a few backward passes, and a row of the figure
_BATCH = 8  # images at a time, for all their activations are kept


def choose_examples(predictions: Predictions, per_class: int = 2, seed: int = 0) -> NDArray[np.int64]:
    """Choose images of each class: half of them predicted right, half wrong, where there are as many.

    Images are ordered by a hash of `seed` and their id, not by the predictions: none is picked for its looks,
    and two models are shown on the same images where both are right. Of more than `MAX_CLASSES` classes,
    those with most images are shown.

    Returns:
        Rows of `predictions`, int64 (M,), by class, the right ones first.
    """
    ids = predictions.image_ids
    order = np.array(
        sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"{seed}:{ids[row]}".encode()).digest())
    )
    targets, is_right = predictions.targets[order], (predictions.predicted == predictions.targets)[order]
    occurring, counts = np.unique(targets, return_counts=True)
    largest = np.sort(occurring[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    chosen = [
        order[(targets == target) & (is_right == right)][: (per_class + right) // 2]
        for target in largest
        for right in (True, False)
    ]
    return np.concatenate(chosen).astype(np.int64)


def compute_gradcam(network: ResNet, images: Tensor, classes: Tensor) -> NDArray[np.float32]:
    """Compute which regions of each image support a class.

    The map is as coarse as the last stage's features, 7 x 7 at 224 pixels.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, section 3.

    Args:
        network: Ready to predict, on the images' device.
        images: Normalised, float (N, 3, S, S).
        classes: The class to explain, int64 (N,).

    Returns:
        Maps float32 (N, S, S), scaled to a maximum of 1; all 0 where nothing supports the class.
    """
    # Imported here because it takes a second, and loads pyplot.
    from captum.attr import LayerGradCam

    gradcam = LayerGradCam(network, network.layer4)
    heats = [
        gradcam.attribute(batch, asked, relu_attributions=True).detach()
        for batch, asked in zip(torch.split(images, _BATCH), torch.split(classes, _BATCH), strict=True)
    ]
    size = (images.shape[2], images.shape[3])
    heat = F.interpolate(torch.cat(heats).float(), size, mode="bilinear", align_corners=False)[:, 0]
    highest = heat.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(highest > 0, heat / highest, 0).cpu().numpy()
    return scaled
