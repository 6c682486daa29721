"""The files of an evaluation, by artifact path: page, tables and figures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from skin_resnet.data.store import ImageStore
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.explain import choose_examples, compute_gradcam
from skin_resnet.evaluation.operating import find_positives, is_positive, tabulate_missed
from skin_resnet.evaluation.page import format_assessment
from skin_resnet.evaluation.plots import assessment as plots
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import ResNet

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
