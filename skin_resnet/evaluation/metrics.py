"""From predictions to numbers, and to the intervals that say how far a number can be trusted."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk

HEADLINES = ("balanced_accuracy", "accuracy", "macro_auc")
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of some images, and what is true.

    Attributes:
        probabilities: float64 (N, K), rows sum to 1.
        targets: int64 (N,), class indices.
        image_ids: N image ids.
    """

    probabilities: Floats
    targets: NDArray[np.int64]
    image_ids: tuple[str, ...]

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The most probable class of each image, int64 (N,).

        Several equally probable ones are no answer, and count as a wrong one, as the ISIC scorer has it: a
        network that says the same of everything must not score by the order of the classes.
        """
        highest = self.probabilities == self.probabilities.max(axis=1, keepdims=True)
        undecided = highest.sum(axis=1) > 1
        highest[undecided, self.targets[undecided]] = False
        predicted: NDArray[np.int64] = highest.argmax(axis=1)
        return predicted


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The figures of one split: mean cross-entropy in nats, and scores from 0 to 1.

    `balanced_accuracy` (mean sensitivity) and `macro_auc` (mean one-versus-rest AUC) average over the classes
    that occur; where only one occurs, `macro_auc` is NaN.
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_auc: float

    def to_dict(self, split: str) -> dict[str, float]:
        """Name the figures as MLflow shows them: `val/loss`, ..., without those that are NaN."""
        return {f"{split}/{name}": value for name, value in asdict(self).items() if not np.isnan(value)}


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """What one epoch gave.

    Attributes:
        epoch: Counted from 1.
        lr: Learning rate of its last step.
        seconds: Wall time, val included.
        images_per_s: Training images per second, val excluded.
        train: Measured over the epoch, on augmented images, while the network learnt.
        val: Measured at its end.
        timestamp_ms: When it ended, in milliseconds since 1970. Logged again with the same one, a metric is
            the same one to MLflow.
    """

    epoch: int
    lr: float
    seconds: float
    images_per_s: float
    train: Metrics
    val: Metrics
    timestamp_ms: int = 0

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "EpochResult":
        """Read back what `dataclasses.asdict` gave."""
        parts = {name: Metrics(**fields[name]) for name in ("train", "val")}
        return cls(**{**fields, **parts})

    @property
    def gap(self) -> float:
        """The generalization gap: balanced accuracy on train minus that on val."""
        return self.train.balanced_accuracy - self.val.balanced_accuracy


def compute_metrics(predictions: Predictions) -> Metrics:
    """Compute the figures over all images at once: summed over images, divided once."""
    targets, probabilities = predictions.targets, predictions.probabilities
    of_target = probabilities[np.arange(len(targets)), targets]
    return Metrics(
        loss=float(-np.log(np.maximum(of_target, np.finfo(np.float32).tiny)).mean()),
        accuracy=float(sk.accuracy_score(targets, predictions.predicted)),
        balanced_accuracy=float(np.mean(_sensitivities(predictions)[np.unique(targets)])),
        macro_auc=_mean_auc(predictions),
    )


def _sensitivities(predictions: Predictions) -> Floats:
    labels = list(range(predictions.probabilities.shape[1]))
    scores: Floats = sk.recall_score(
        predictions.targets, predictions.predicted, labels=labels, average=None, zero_division=np.nan
    )
    return scores


def _compute_one_versus_rest(predictions: Predictions, compute: Callable[..., float]) -> Floats:
    """Score each class's probability against being of it; NaN where there is no image of it or no other."""
    scores = np.full(predictions.probabilities.shape[1], np.nan)
    for target in np.unique(predictions.targets):
        positive = predictions.targets == target
        if not positive.all():
            scores[target] = compute(positive, predictions.probabilities[:, target])
    return scores


def _mean_auc(predictions: Predictions) -> float:
    aucs = _compute_one_versus_rest(predictions, sk.roc_auc_score)
    return float(np.nanmean(aucs)) if np.isfinite(aucs).any() else float("nan")


def compute_class_table(predictions: Predictions, classes: tuple[str, ...]) -> pd.DataFrame:
    """Compute a row per class: images, sensitivity, specificity, ppv, npv, f1, auc, ap; NaN where undefined.

    `ppv` is also called precision, `ap` is average precision.
    """
    counts = compute_confusion(predictions)
    hits, actual, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    total = counts.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "dx": classes,
                "images": actual,
                "sensitivity": hits / actual,
                "specificity": 1 - (predicted - hits) / (total - actual),
                "ppv": hits / predicted,
                "npv": 1 - (actual - hits) / (total - predicted),
                "f1": np.where(actual > 0, 2 * hits / (actual + predicted), np.nan),
                "auc": _compute_one_versus_rest(predictions, sk.roc_auc_score),
                "ap": _compute_one_versus_rest(predictions, sk.average_precision_score),
            }
        )


def compute_confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count images by true class (rows) and predicted class (columns), int64 (K, K)."""
    labels = list(range(predictions.probabilities.shape[1]))
    counts: NDArray[np.int64] = sk.confusion_matrix(predictions.targets, predictions.predicted, labels=labels)
    return counts


def predict_always(target: int, like: Predictions) -> Predictions:
    """Give the predictions of a model that answers the same class for every image, and is sure of it."""
    probabilities = np.zeros_like(like.probabilities)
    probabilities[:, target] = 1
    return Predictions(probabilities=probabilities, targets=like.targets, image_ids=like.image_ids)


def compute_intervals(
    predictions: Predictions, lesions: NDArray[np.str_], *, replicates: int = 1000
) -> dict[str, tuple[float, float]]:
    """Compute a 95 % interval for each headline figure by drawing lesions with replacement.

    Args:
        predictions: Of N images.
        lesions: Which lesion each image shows, (N,).
        replicates: How many times lesions are drawn.
    """
    figures = compute_weighted(predictions, draw_lesions(lesions, replicates=replicates))
    return {name: compute_percentiles(figures[name]) for name in HEADLINES}


def draw_lesions(lesions: NDArray[Any], *, replicates: int = 1000, seed: int = 0) -> Floats:
    """Draw lesions with replacement; give how often each draw has each image, float64 (replicates, N).

    The photos of one lesion are no independent evidence, so lesions are drawn, not images. The same lesions
    give the same draws: two models' figures can be subtracted draw by draw.
    Source: Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3 (percentile interval).
    """
    names, lesion_of = np.unique(lesions, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), shares, size=replicates)
    weights: Floats = draws[:, lesion_of].astype(np.float64)
    return weights


def compute_percentiles(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Give the ends between which the middle `level` of the known draws lies; NaN where none is known."""
    if not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compute_mean_interval(values: ArrayLike, lesions: NDArray[Any]) -> tuple[float, float]:
    """Compute a 95 % interval of the mean of values (N,) by drawing their lesions (N,)."""
    weights = draw_lesions(lesions)
    return compute_percentiles(weights @ np.asarray(values, dtype=np.float64) / weights.sum(axis=1))


def compute_weighted(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    """Compute the headline figures for many weightings of the images, (B, N), at once; each (B,).

    A draw that lacks one of the classes has no balanced accuracy and no macro AUC: NaN. A mean over fewer
    classes is another figure, and would make the intervals of rare classes too high.
    """
    targets = predictions.targets
    hits = weights * (predictions.predicted == targets)
    sensitivities, aucs = [], []
    for target in np.unique(targets):
        positive = targets == target
        with np.errstate(invalid="ignore", divide="ignore"):
            sensitivities.append(hits[:, positive].sum(axis=1) / weights[:, positive].sum(axis=1))
            aucs.append(_compute_weighted_auc(positive, predictions.probabilities[:, target], weights))
    return {
        "accuracy": hits.sum(axis=1) / weights.sum(axis=1),
        "balanced_accuracy": np.mean(sensitivities, axis=0),
        "macro_auc": np.mean(aucs, axis=0),
    }


def _compute_weighted_auc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Compute an AUC for each row of weights: the chance that a positive outranks a negative."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.nan) != 0)  # of each run of tied scores
    ordered = weights[:, order]
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(axis=1)  # a tie counts half
    result: Floats = wins / (positives.sum(axis=1) * negatives.sum(axis=1))
    return result
