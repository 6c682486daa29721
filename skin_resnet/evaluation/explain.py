"""Where a network looks: Grad-CAM of its last stage."""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.model.resnet import ResNet

_BATCH = 8  # images at a time, for all their activations are kept


def choose_examples(predictions: Predictions, per_class: int = 2, seed: int = 0) -> NDArray[np.int64]:
    """Choose images of each class: half of them predicted rightly, half wrongly, where there are as many.

    Images are put in an order drawn from `seed` and their own id, not from the predictions: nobody picked the
    pretty ones, and two models are shown on the same images where both are right.

    Args:
        predictions: Of N images.
        per_class: Images of a class; of an odd number, the larger half is of right ones.
        seed: Which of the possible choices.

    Returns:
        Rows of `predictions`, int64 (M,), by class, the right ones first.
    """
    ids = predictions.image_ids
    order = np.array(
        sorted(range(len(ids)), key=lambda row: hashlib.sha256(f"{seed}:{ids[row]}".encode()).digest())
    )
    targets, is_right = predictions.targets[order], (predictions.predicted == predictions.targets)[order]
    chosen = [
        order[(targets == target) & (is_right == right)][: (per_class + right) // 2]
        for target in np.unique(targets)
        for right in (True, False)
    ]
    return np.concatenate(chosen).astype(np.int64)


def compute_gradcam(network: ResNet, images: Tensor, classes: Tensor) -> NDArray[np.float32]:
    """Compute which places of each image speak for a class.

    The heat is as coarse as the last stage's features, 7 x 7 at 224 pixels. Nothing of this stays on the
    network: no gradient, no hook, and each of its modules is left in the mode it was in.

    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, section 3.

    Args:
        network: On the images' device.
        images: Normalised, float (N, 3, S, S).
        classes: The class asked about, int64 (N,).

    Returns:
        Heat float32 (N, S, S), the hottest place of each image 1; all 0 where nothing speaks for the class.
    """
    # Imported here because it takes a second, and loads pyplot.
    from captum.attr import LayerGradCam

    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        gradcam = LayerGradCam(network, network.layer4)
        heats = [
            gradcam.attribute(batch, asked, relu_attributions=True).detach()
            for batch, asked in zip(torch.split(images, _BATCH), torch.split(classes, _BATCH), strict=True)
        ]
    finally:
        for module, mode in modes.items():
            module.training = mode
    size = (images.shape[2], images.shape[3])
    heat = F.interpolate(torch.cat(heats).float(), size, mode="bilinear", align_corners=False)[:, 0]
    highest = heat.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(highest > 0, heat / highest, 0).cpu().numpy()
    return scaled
