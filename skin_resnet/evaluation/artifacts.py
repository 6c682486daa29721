"""The files of an evaluation, by artifact path: page, JSON, tables and figures."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import compute_confusion
from skin_resnet.evaluation.operating import find_positives, is_positive, tabulate_missed
from skin_resnet.evaluation.page import format_assessment
from skin_resnet.evaluation.plots import assessment as plots
from skin_resnet.evaluation.plots.explain import plot_gallery, plot_gradcam


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Images that are shown.

    Attributes:
        rows: Which of the evaluated images, int64 (M,).
        pixels: uint8 (M, S, S, 3).
        heats: Their Grad-CAM, float32 (M, S, S).
        missed: Pixels of the missed melanomas, in the order of `tabulate_missed`.
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    heats: NDArray[np.float32]
    missed: NDArray[np.uint8]


def list_artifacts(
    assessment: Assessment,
    split: str,
    title: str,
    notes: Sequence[str] = (),
    examples: Examples | None = None,
) -> dict[str, Any]:
    """Return all files of an evaluation by artifact path.

    Args:
        assessment: Of any split.
        split: Its name, which is also the folder.
        title: What was evaluated, for the figures: `Test, resnet50 epoch 9`.
        notes: Paragraphs at the top of the page.
        examples: Images to show, if any.

    Returns:
        Values are a data frame (a CSV file), a matplotlib figure (PNG), a text, or a dict (JSON).
    """
    files: dict[str, Any] = {
        "evaluation.md": format_assessment(assessment, split, notes),
        "evaluation.json": _to_plain(assessment, split, notes),
        "metrics.csv": assessment.table,
        "per_class.csv": assessment.per_class,
        "subgroups.csv": assessment.subgroups,
        "predictions.csv": assessment.tabulate_predictions(),
        "confusion.png": plots.plot_confusion(assessment.predictions, assessment.classes, title),
        "reliability.png": plots.plot_reliability(assessment, title),
        "referral.csv": assessment.referral,
        "subgroups.png": plots.plot_subgroups(assessment, title),
    }
    if find_positives(assessment.classes):
        files["roc.png"] = plots.plot_roc(assessment, title)
    if examples:
        files |= _show_examples(assessment, examples, title)
    return {f"{split}/{name}": content for name, content in files.items()}


def _to_plain(assessment: Assessment, split: str, notes: Sequence[str]) -> dict[str, Any]:
    """Return everything but the predictions as plain values; NaN becomes None, for JSON has no NaN."""
    frames = {
        "metrics": assessment.table,
        "subgroups": assessment.subgroups,
        "retest": assessment.retest,
        "reliability": assessment.reliability,
    }
    return {
        "split": split,
        "notes": [note for note in notes if note],
        "classes": list(assessment.classes),
        "baseline_class": assessment.baseline_class,
        "intervals_by": "lesion" if assessment.knows_lesions else "image",
        "calibration": assessment.calibration.to_dict(),
        "confusion": compute_confusion(assessment.predictions).tolist(),
        **{
            name: json.loads(frame.to_json(orient="records", double_precision=15))
            for name, frame in frames.items()
        },
    }


def _show_examples(assessment: Assessment, examples: Examples, title: str) -> dict[str, Any]:
    predictions, classes = assessment.predictions, assessment.classes
    files: dict[str, Any] = {
        "gradcam.png": plot_gradcam(examples.pixels, examples.heats, predictions, examples.rows, classes)
    }
    melanoma = find_positives(classes).get("melanoma")
    if melanoma:
        missed = tabulate_missed(predictions, melanoma, classes)
        captions = [
            f"{row.image_id}\n{row.prediction} {row.confidence:.2f}, mel {row.score:.2f}"
            for row in missed.itertuples()
        ]
        heading = f"{title}: missed of {is_positive(predictions, melanoma).sum():,} melanomas, lowest p first"
        files["missed_melanomas.csv"] = missed
        files["missed_melanomas.png"] = plot_gallery(examples.missed, captions, heading)
    return files
