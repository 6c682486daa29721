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
from skin_resnet.evaluation.plots import COLORS, shorten
from skin_resnet.evaluation.plots import assessment as plots
from skin_resnet.model.classifier import Classifier, Pixels
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import ResNet

MAX_CLASSES = 12  # with Grad-CAM: each costs a few backward passes, and a row of the figure
_BATCH = 8  # images at a time, for all their activations are kept
_MAX_MISSED = 24  # images of missed melanomas


def list_artifacts(
    assessment: Assessment, split: str, title: str, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """Return an evaluation's tables, figures and page (whose first paragraphs are `notes`) by artifact path.

    `title` is what was evaluated, for the figures: `Test, resnet50 epoch 9`.
    """
    title += f": {len(assessment.lesions):,} images"
    score, baseline = (assessment.get(f"{name}balanced_accuracy").value for name in ("", "baseline_"))
    majority = shorten(assessment.baseline_class, 24)
    heading = f"{title}, balanced accuracy {score:.3f} (always {majority} {baseline:.3f})"
    files: dict[str, Any] = {
        "evaluation.md": format_assessment(assessment, split, notes),
        "metrics.csv": assessment.table,
        "per_class.csv": assessment.per_class,
        "subgroups.csv": assessment.subgroups,
        "retest.csv": assessment.retest,
        "reliability.csv": assessment.reliability,
        "referral.csv": assessment.referral,
        "predictions.csv": assessment.tabulate_predictions(),
        "confusion.png": plots.plot_confusion(assessment.predictions, assessment.classes, heading),
        "reliability.png": plots.plot_reliability(assessment, title, COLORS[split]),
    }
    if plots.find_roc_groups(assessment):
        files["roc.png"] = plots.plot_roc(assessment, title, COLORS[split])
    return {f"{split}/{name}": content for name, content in files.items()}


def show_images(
    assessment: Assessment, split: str, title: str, network: ResNet, store: ImageStore
) -> dict[str, Any]:
    """Return the files that show images: Grad-CAM of two of each class, and the missed melanomas.

    Neither is made where there is nothing to see.
    """
    predictions, classes = assessment.predictions, assessment.classes
    files: dict[str, Any] = {}
    if stage := choose_stage(store.pixels.shape[1]):
        rows = choose_examples(predictions)
        pixels = store.pixels[store.find_rows(tuple(np.array(predictions.image_ids)[rows]))]
        images = normalize(to_float(torch.from_numpy(np.array(pixels))))
        heats = compute_gradcam(network, images, torch.from_numpy(predictions.predicted[rows]), stage)
        heading = f"{title}\nGrad-CAM of stage {stage}: what supports the predicted class (brighter: more)"
        figure = plots.plot_gradcam(pixels, heats, predictions, rows, classes, heading)
        files[f"{split}/gradcam.png"] = figure
    if melanoma := find_positives(classes).get("melanoma"):
        files[f"{split}/missed_melanomas.csv"] = missed = tabulate_missed(predictions, melanoma, classes)
        shown = missed.head(_MAX_MISSED)
        if len(shown):
            total = is_positive(predictions, melanoma).sum()
            more = f", the first {len(shown)}" if len(shown) < len(missed) else ""
            heading = f"{title}: {len(missed):,} of {total:,} melanomas missed, lowest p(mel) first{more}"
            captions = [
                f"{row.image_id}\np({row.prediction}) {row.confidence:.2f}\np(mel) {row.score:.2f}"
                for row in shown.itertuples()
            ]
            pixels = store.pixels[store.find_rows(tuple(shown.image_id))]
            files[f"{split}/missed_melanomas.png"] = plots.plot_gallery(pixels, captions, heading)
    return files


def choose_examples(predictions: Predictions) -> NDArray[np.int64]:
    """Choose two images of each class, one predicted right and one wrong, where there are such.

    Images are ordered by a hash of their id, not by the predictions: none is picked for its looks,
    and two models are shown on the same images where both are right. Of more than `MAX_CLASSES` classes,
    those with most images are shown.

    Returns:
        Rows of `predictions`, int64 (M,), by class, the right one first.
    """
    order = np.argsort([hashlib.sha256(each.encode()).hexdigest() for each in predictions.image_ids])
    targets, is_right = predictions.targets[order], (predictions.predicted == predictions.targets)[order]
    occurring, counts = np.unique(targets, return_counts=True)
    largest = np.sort(occurring[np.argsort(-counts, kind="stable")[:MAX_CLASSES]])
    chosen = [
        order[(targets == target) & (is_right == right)][:1] for target in largest for right in (True, False)
    ]
    return np.concatenate(chosen).astype(np.int64)


def choose_stage(image_size: int) -> int | None:
    """Return the last stage whose features have 4 x 4 cells or more; None if that is not one of the last two.

    At 64 pixels the last stage has 2 x 2 cells, and at 32 pixels 1 x 1: such a map has no regions.
    """
    return next((stage for stage, stride in ((4, 32), (3, 16)) if image_size > 3 * stride), None)


def compute_gradcam(network: ResNet, images: Tensor, classes: Tensor, stage: int = 4) -> NDArray[np.float32]:
    """Compute which regions of normalized images, float (N, 3, S, S), support the given classes, int64 (N,).

    The map is as coarse as the features of the network's stage, 7 x 7 at 224 pixels for the last one.
    Source: Selvaraju et al., "Grad-CAM", ICCV 2017, section 3.

    Returns:
        Maps float32 (N, S, S), scaled to a maximum of 1; all 0 where nothing supports the class.
    """
    # Imported here because it takes a second, and loads pyplot.
    from captum.attr import LayerGradCam

    gradcam = LayerGradCam(network, getattr(network, f"layer{stage}"))
    heats = [
        gradcam.attribute(batch, targets, relu_attributions=True).detach()
        for batch, targets in zip(torch.split(images, _BATCH), torch.split(classes, _BATCH), strict=True)
    ]
    heat = F.interpolate(torch.cat(heats).float(), images.shape[2:], mode="bilinear")[:, 0]
    highest = heat.amax(dim=(1, 2), keepdim=True)
    scaled: NDArray[np.float32] = torch.where(highest > 0, heat / highest, 0).cpu().numpy()
    return scaled


def explain_prediction(classifier: Classifier, pixels: Pixels, code: str) -> NDArray[np.float32] | None:
    """Return the mean Grad-CAM of a classifier's networks, (S, S), for an image (S, S, 3) and a class.

    None of an exported model, and of images of 48 pixels or fewer.
    """
    stage = choose_stage(len(pixels))
    if not classifier.networks or not stage:
        return None
    device = classifier.networks[0].fc.weight.device
    image = normalize(to_float(torch.from_numpy(pixels[None]).to(device)))
    target = torch.tensor([classifier.classes.index(code)], device=device)
    heats = [compute_gradcam(network, image, target, stage)[0] for network in classifier.networks]
    return np.asarray(np.mean(heats, axis=0))
