"""From probabilities to decisions: whom a threshold flags, which images to refer, which melanomas are missed.

An image is flagged where the summed probability of the positive classes reaches a threshold: melanoma against
the rest, or malignant against benign. Val, where it is chosen, and test must have the same temperature.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.calibration import check_probabilities, compute_share_interval
from skin_resnet.evaluation.formatting import format_score, format_table
from skin_resnet.evaluation.metrics import Floats, Predictions
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A threshold chosen on val.

    Attributes:
        positives: The class indices that count as positive.
        goal: The sensitivity wanted on val.
        threshold: The highest one that reaches it there.
    """

    positives: frozenset[int]
    goal: float
    threshold: float


@dataclass(frozen=True, kw_only=True)
class OperatingResult:
    """What a threshold does on other images.

    Attributes:
        point: The threshold.
        sensitivity: Share of the positive images that are flagged; NaN where there is none.
        sensitivity_interval: 95 % interval of it, by bootstrap over lesions.
        specificity: Share of the negative images that are not flagged; NaN where there is none.
        specificity_interval: 95 % interval of it.
        positive_images: How many images are positive.
        negative_images: How many are negative.
    """

    point: OperatingPoint
    sensitivity: float
    sensitivity_interval: Interval
    specificity: float
    specificity_interval: Interval
    positive_images: int
    negative_images: int


@dataclass(frozen=True, kw_only=True)
class Referral:
    """What is right among the images that are kept when the least certain ones are referred.

    Attributes:
        referred_fraction: From 0 to almost 1, (N,): all N images kept, then N - 1, ..., then one.
        accuracy: Of the images kept, (N,).
        balanced_accuracy: Of the images kept, (N,); NaN once a class is referred altogether: without its
            hardest classes, it would rise for nothing.
    """

    referred_fraction: Floats
    accuracy: Floats
    balanced_accuracy: Floats

    @property
    def area(self) -> float:
        """The area under the curve of accuracy: 1 minus the AURC of Geifman, Uziel, El-Yaniv (ICLR 2019)."""
        return float(self.accuracy.mean())


def find_positives(classes: tuple[str, ...]) -> dict[str, frozenset[int]]:
    """Give what is looked for in a data set: melanoma and malignant, as class indices.

    Nothing where the classes are not the seven diagnoses: which of them are malignant is then not known.
    """
    if classes != HAM10000_CLASSES:
        return {}
    malignant = frozenset(index for index, diagnosis in enumerate(DIAGNOSES) if diagnosis.malignant)
    return {"melanoma": frozenset({classes.index("mel")}), "malignant": malignant}


def score_positives(predictions: Predictions, positives: Collection[int]) -> Floats:
    """Give the summed probability of the positive classes, (N,)."""
    scores: Floats = predictions.probabilities[:, sorted(positives)].sum(axis=1)
    return scores


def choose_thresholds(
    predictions: Predictions, positives: Collection[int], sensitivities: Sequence[float] = (0.90, 0.95)
) -> tuple[OperatingPoint, ...]:
    """Choose for each sensitivity the highest threshold that reaches it; none where no image is positive.

    Args:
        predictions: Of val.
        positives: The class indices that count as positive.
        sensitivities: The goals, above 0 and up to 1.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    scores = score_positives(predictions, positives)[is_positive(predictions, positives)]
    descending = np.sort(scores)[::-1]
    if not len(descending):
        return ()
    return tuple(
        OperatingPoint(
            positives=frozenset(positives),
            goal=goal,
            # What 0.07 * 100 is above 7 must not count.
            threshold=float(descending[math.ceil(goal * len(descending) - 1e-9) - 1]),
        )
        for goal in sensitivities
    )


def is_positive(predictions: Predictions, positives: Collection[int]) -> NDArray[np.bool_]:
    """Tell which images truly are positive, (N,)."""
    return np.isin(predictions.targets, sorted(positives))


def apply_threshold(
    predictions: Predictions, point: OperatingPoint, lesions: NDArray[np.str_]
) -> OperatingResult:
    """Measure what a threshold does on images that it was not chosen on.

    Args:
        predictions: Of N images.
        point: From `choose_thresholds`.
        lesions: Which lesion each image shows, (N,).

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    flagged = score_positives(predictions, point.positives) >= point.threshold
    positive = is_positive(predictions, point.positives)
    hits, passes = flagged[positive], ~flagged[~positive]
    return OperatingResult(
        point=point,
        sensitivity=float(hits.mean()) if len(hits) else float("nan"),
        sensitivity_interval=compute_share_interval(hits, lesions[positive]),
        specificity=float(passes.mean()) if len(passes) else float("nan"),
        specificity_interval=compute_share_interval(passes, lesions[~positive]),
        positive_images=len(hits),
        negative_images=len(passes),
    )


def format_operating(results: Mapping[str, Sequence[OperatingResult]]) -> str:
    """Write what thresholds do as Markdown, by group name; a group without one says why."""
    rows = [
        [
            name,
            f"{result.point.goal:.2f}",
            f"{result.point.threshold:.4f}",
            format_score(result.sensitivity, result.sensitivity_interval),
            format_score(result.specificity, result.specificity_interval),
        ]
        for name, group in results.items()
        for result in group
    ]
    header = ["positive", "goal on val", "threshold", "sensitivity [95 %]", "specificity [95 %]"]
    table = [format_table(header, rows)] if rows else []
    notes = [
        f"No threshold for {name}: val has no such image." for name, group in results.items() if not group
    ]
    return "\n\n".join([*table, *notes])


def compute_referral(predictions: Predictions) -> Referral:
    """Compute what is right among the rest when the images whose highest probability is lowest are referred.

    Equally certain images share hits and misses evenly, so the order they come in does not matter.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    images = len(predictions.targets)
    doubts = -predictions.probabilities.max(axis=1)
    _, level, ties = np.unique(doubts, return_inverse=True, return_counts=True)
    truth = (predictions.targets[:, None] == np.unique(predictions.targets)).astype(np.float64)
    right = truth * (predictions.predicted == predictions.targets)[:, None]

    def accumulate(values: Floats) -> Floats:
        """Sum values (N, classes) from the surest image on; each tied image counts as the mean of its tie."""
        sums = np.zeros((len(ties), values.shape[1]))
        np.add.at(sums, level, values)
        total: Floats = np.repeat(sums / ties[:, None], ties, axis=0).cumsum(axis=0)
        return total[::-1]

    kept, hits = accumulate(truth), accumulate(right)
    shares = np.divide(hits, kept, out=np.full_like(hits, np.nan), where=kept > 0)
    return Referral(
        referred_fraction=np.arange(images) / images,
        accuracy=hits.sum(axis=1) / np.arange(images, 0, -1),
        balanced_accuracy=shares.mean(axis=1),
    )


def tabulate_missed(
    predictions: Predictions, positives: Collection[int], classes: tuple[str, ...]
) -> pd.DataFrame:
    """List positive images that are taken for a negative class, the most surely missed first.

    Returns:
        A row per image: image_id, dx, prediction, confidence (its probability), and score (the summed
        probability of the positive classes), by which the rows ascend.
    """
    scores = score_positives(predictions, positives)
    missed = is_positive(predictions, positives) & ~np.isin(predictions.predicted, sorted(positives))
    rows = np.flatnonzero(missed)[np.argsort(scores[missed], kind="stable")]
    return pd.DataFrame(
        {
            "image_id": [predictions.image_ids[row] for row in rows],
            "dx": np.array(classes)[predictions.targets[rows]],
            "prediction": np.array(classes)[predictions.predicted[rows]],
            "confidence": predictions.probabilities[rows].max(axis=1),
            "score": scores[rows],
        }
    )
