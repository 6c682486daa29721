"""What a test says of a model, beside what answering one class for everything would have scored."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.formatting import format_class_table, format_score, format_table, spell_metric
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Metrics,
    Predictions,
    compute_class_table,
    compute_intervals,
    compute_metrics,
    predict_always,
)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The figures of one model on some images.

    Attributes:
        predictions: What the model said.
        classes: The class order.
        lesions: Which lesion each image shows, (N,).
        metrics: Its figures.
        intervals: A 95 % interval for each headline figure, by bootstrap over lesions.
        class_table: A row per class.
        baseline: The figures of always answering `baseline_class`.
        baseline_class: The class with most training images.
    """

    predictions: Predictions
    classes: tuple[str, ...]
    lesions: NDArray[np.str_]
    metrics: Metrics
    intervals: dict[str, tuple[float, float]]
    class_table: pd.DataFrame
    baseline: Metrics
    baseline_class: str

    @property
    def num_lesions(self) -> int:
        """How many lesions the images show."""
        return len(np.unique(self.lesions))

    def to_dict(self, split: str) -> dict[str, float]:
        """Name all figures as MLflow shows them, with `_low` and `_high` for the intervals."""
        figures = self.metrics.to_dict(split)
        for name, (low, high) in self.intervals.items():
            figures |= {f"{split}/{name}_low": low, f"{split}/{name}_high": high}
        figures |= {f"{split}/baseline_{name}": getattr(self.baseline, name) for name in HEADLINES}
        return figures | {
            f"{split}/images": len(self.predictions.targets),
            f"{split}/lesions": self.num_lesions,
        }


def compute_scores(
    predictions: Predictions, lesions: NDArray[np.str_], classes: tuple[str, ...], baseline_class: str
) -> Scores:
    """Compute everything a test reports.

    Args:
        predictions: Of N images.
        lesions: Which lesion each image shows, (N,).
        classes: The class order.
        baseline_class: The class with most training images.
    """
    return Scores(
        predictions=predictions,
        classes=classes,
        lesions=lesions,
        metrics=compute_metrics(predictions),
        intervals=compute_intervals(predictions, lesions),
        class_table=compute_class_table(predictions, classes),
        baseline=compute_metrics(predict_always(classes.index(baseline_class), predictions)),
        baseline_class=baseline_class,
    )


def format_scores(scores: Scores, split: str, knows_lesions: bool = True) -> str:
    """Write the scores as Markdown that also reads well on a terminal."""
    rows = [
        [
            spell_metric(name),
            format_score(getattr(scores.metrics, name), scores.intervals[name]),
            format_score(getattr(scores.baseline, name)),
        ]
        for name in HEADLINES
    ]
    rows.append(["loss (nats)", format_score(scores.metrics.loss), ""])
    shown = f"{len(scores.predictions.targets)} images"
    if knows_lesions:
        shown += f" of {scores.num_lesions} lesions"
    # Beside val/loss of the epochs, it would look better than it is without this word.
    note = "The loss is that after temperature."
    if not knows_lesions:
        note += " The source names no lesions: intervals are by image, too narrow where photos share one."
    return "\n".join(
        [
            f"### {split.capitalize()}: {shown}",
            "",
            format_table(["", "model [95 % interval]", f"always {scores.baseline_class}"], rows),
            "",
            note,
            "",
            format_class_table(scores.class_table),
        ]
    )


def tabulate_predictions(scores: Scores) -> pd.DataFrame:
    """Give a row per image: image_id, lesion_id, true dx, predicted dx, and each class's probability."""
    predictions, classes = scores.predictions, scores.classes
    return pd.DataFrame(
        {
            "image_id": predictions.image_ids,
            "lesion_id": scores.lesions,
            "dx": np.array(classes)[predictions.targets],
            "prediction": np.array(classes)[predictions.predicted],
            **{name: predictions.probabilities[:, k] for k, name in enumerate(classes)},
        }
    )
