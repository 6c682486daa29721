"""Puts an assessment on the open MLflow run: tables, figures, a page for people and a file for programs."""

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skin_resnet.data.store import ImageStore
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.operating import find_positives, tabulate_missed
from skin_resnet.evaluation.plots.calibration import plot_reliability
from skin_resnet.evaluation.plots.confusion import plot_confusion
from skin_resnet.evaluation.plots.explain import blend_heat, plot_gradcam
from skin_resnet.evaluation.plots.operating import plot_gallery, plot_referral, plot_roc
from skin_resnet.evaluation.plots.subgroups import plot_slices
from skin_resnet.evaluation.scores import tabulate_predictions
from skin_resnet.tracking import run as mlflow_run


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Images whose Grad-CAM is shown.

    Attributes:
        rows: Which of the assessed images, int64 (M,).
        pixels: uint8 (M, S, S, 3).
        heats: float32 (M, S, S).
    """

    rows: NDArray[np.int64]
    pixels: NDArray[np.uint8]
    heats: NDArray[np.float32]


def log_assessment(assessment: Assessment, page: str, title: str, split: str) -> None:
    """Log an assessment's page, file, tables and figures under the name of its split."""
    scores = assessment.scores
    mlflow_run.log_text(page, f"{split}/scores.md")
    mlflow_run.log_text(json.dumps(_drop_nans(assessment.to_json(split)), indent=1), f"{split}/scores.json")
    mlflow_run.log_table(scores.class_table, f"{split}/per_class.csv")
    mlflow_run.log_table(assessment.slices, f"{split}/slices.csv")
    mlflow_run.log_table(tabulate_predictions(scores), f"{split}/predictions.csv")
    figures = {
        "confusion": plot_confusion(scores.predictions, scores.classes, title),
        "reliability": plot_reliability(assessment.raw, assessment.calibration.temperature, title),
        "referral": plot_referral(assessment.referral, title),
        "slices": plot_slices(assessment.slices, title),
    }
    if assessment.operating:
        figures["roc"] = plot_roc(scores.predictions, assessment.operating, title)
    for name, figure in figures.items():
        mlflow_run.log_figure(figure, f"{split}/{name}.png")


def log_examples(assessment: Assessment, store: ImageStore, examples: Examples, title: str) -> None:
    """Log the Grad-CAM examples, as a figure and as images of the run, and the missed melanomas."""
    scores = assessment.scores
    figure = plot_gradcam(examples.pixels, examples.heats, scores.predictions, examples.rows, scores.classes)
    mlflow_run.log_figure(figure, "test/gradcam.png")
    shown = zip(examples.rows, examples.pixels, examples.heats, strict=True)
    for number, (row, pixels, heat) in enumerate(shown):
        dx = scores.classes[scores.predictions.targets[row]]
        mlflow_run.log_image(np.hstack([pixels, blend_heat(pixels, heat)]), f"gradcam/{dx}", step=number)
    positives = find_positives(scores.classes).get("melanoma")
    if positives:
        missed = tabulate_missed(scores.predictions, positives, scores.classes)
        mlflow_run.log_table(missed, "test/missed_melanomas.csv")
        captions = [
            f"{m.image_id}\n{m.prediction} {m.confidence:.2f}, mel {m.score:.2f}" for m in missed.itertuples()
        ]
        pixels = store.pixels[store.find_rows(list(missed.image_id))]
        of = np.isin(scores.predictions.targets, list(positives)).sum()
        gallery = plot_gallery(
            pixels, captions, f"{title}: missed of {of:,} melanomas, lowest p of mel first"
        )
        mlflow_run.log_figure(gallery, "test/missed_melanomas.png")


def _drop_nans(value: object) -> object:
    """Write NaN as null: JSON has no other word for what is unknown."""
    if isinstance(value, dict):
        return {key: _drop_nans(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_drop_nans(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value
