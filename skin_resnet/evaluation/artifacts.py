"""The files of an evaluation, by artifact path: page, tables, figures and images."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from skin_resnet.data.store import ImageStore
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.operating import find_positives, is_positive, tabulate_missed
from skin_resnet.evaluation.page import format_assessment
from skin_resnet.evaluation.plots import assessment as plots
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import ResNet

MAX_CLASSES = 12  # with Grad-CAM: each costs a few backward passes, and a row of the figure
_BATCH = 8  # images at a time, for all their activations are kept
_MAX_MISSED = 24  # images of missed melanomas


def list_artifacts(
    assessment: Assessment, split: str, title: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return all files of an evaluation by artifact path.

    Args:
        assessment: Of any split.
        split: Its name, which is also the folder.
        title: What was evaluated, for the figures: `Test, resnet50 epoch 9`.
        notes: Paragraphs at the top of the page.

    Returns:
        Values are a data frame (a CSV file), a matplotlib figure (PNG), or a text.
    """
    files: dict[str, Any] = {
        "evaluation.md": format_assessment(assessment, split, notes),
        "metrics.csv": assessment.table,
        "per_class.csv": assessment.per_class,
        "subgroups.csv": assessment.subgroups,
        "retest.csv": assessment.retest,
        "reliability.csv": assessment.reliability,
        "referral.csv": assessment.referral,
        "predictions.csv": assessment.tabulate_predictions(),
        "confusion.png": plots.plot_confusion(assessment.predictions, assessment.classes, title),
        "reliability.png": plots.plot_reliability(assessment, title),
    }
    if find_positives(assessment.classes):
        files["roc.png"] = plots.plot_roc(assessment, title)
    return {f"{split}/{name}": content for name, content in files.items()}


def show_images(
    assessment: Assessment, split: str, title: str, network: ResNet, store: ImageStore
) -> dict[str, Any]:
    """Return the files that show images: Grad-CAM of a few of each class, and the missed melanomas."""
    predictions, classes = assessment.predictions, assessment.classes
    ids = np.array(predictions.image_ids)
    rows = choose_examples(predictions)
    pixels = store.pixels[store.find_rows(tuple(ids[rows]))]
    images = normalize(to_float(torch.from_numpy(np.array(pixels))))
    heats = compute_gradcam(network, images, torch.from_numpy(predictions.predicted[rows]))
    files: dict[str, Any] = {
        f"{split}/gradcam.png": plots.plot_gradcam(pixels, heats, predictions, rows, classes)
    }
    melanoma = find_positives(classes).get("melanoma")
    if melanoma:
        missed = tabulate_missed(predictions, melanoma, classes)
        pixels = store.pixels[store.find_rows(tuple(missed.image_id[:_MAX_MISSED]))]
        captions = [
            f"{row.image_id}\n{row.prediction} {row.confidence:.2f}, mel {row.score:.2f}"
            for row in missed.itertuples()
        ]
        heading = f"{title}: missed of {is_positive(predictions, melanoma).sum():,} melanomas, lowest p first"
        files[f"{split}/missed_melanomas.csv"] = missed
        files[f"{split}/missed_melanomas.png"] = plots.plot_gallery(pixels, captions, heading)
    return files


def choose_examples(predictions: Predictions, per_class: int = 2) -> NDArray[np.int64]:
    """Choose images of each class: half of them predicted right, half wrong, where there are as many.

    Images are ordered by a hash of their id, not by the predictions: none is picked for its looks,
    and two models are shown on the same images where both are right. Of more than `MAX_CLASSES` classes,
    those with most images are shown.

    Returns:
        Rows of `predictions`, int64 (M,), by class, the right ones first.
    """
    ids = predictions.image_ids
    order = np.array(sorted(range(len(ids)), key=lambda row: hashlib.sha256(ids[row].encode()).digest()))
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
        images: Normalized, float (N, 3, S, S).
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
