"""Metrics of predictions, and their confidence intervals by bootstrap over lesions."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn import metrics as sk

HEADLINES = ("balanced_accuracy", "accuracy", "macro_auc")
Floats = NDArray[np.float64]
_AUC_CHUNK = 256  # positive images compared with all negatives at a time, for the sake of memory


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted probabilities of some images, and their true classes.

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

        A tie between several classes counts as a wrong prediction, as in the ISIC scorer: a network with the
        same output for every image must not score by the order of the classes.
        """
        highest = self.probabilities == self.probabilities.max(axis=1, keepdims=True)
        tied = highest.sum(axis=1) > 1
        highest[tied, self.targets[tied]] = False
        predicted: NDArray[np.int64] = highest.argmax(axis=1)
        return predicted

    def select(self, inside: NDArray[np.bool_]) -> "Predictions":
        """Return the predictions of the images where `inside`, bool (N,), is true."""
        return Predictions(
            probabilities=self.probabilities[inside],
            targets=self.targets[inside],
            image_ids=tuple(np.array(self.image_ids)[inside]),
        )


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """The metrics of one split: mean cross-entropy in nats, and scores from 0 to 1.

    `balanced_accuracy` (mean sensitivity) and `macro_auc` (mean one-versus-rest AUC) average over the classes
    that occur; where only one occurs, `macro_auc` is NaN.
    """

    loss: float
    accuracy: float
    balanced_accuracy: float
    macro_auc: float

    def to_dict(self, split: str) -> dict[str, float]:
        """Return the metrics under their MLflow keys, `val/loss`, ..., without NaNs."""
        return {f"{split}/{name}": value for name, value in asdict(self).items() if not np.isnan(value)}


def compute_metrics(predictions: Predictions) -> Metrics:
    """Compute the metrics over all images at once: summed over images, divided once."""
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


def _compute_aucs(predictions: Predictions) -> Floats:
    """Compute each class's one-versus-rest AUC, from ranks, (K,); NaN without images of it, or of others."""
    truth = np.eye(predictions.probabilities.shape[1], dtype=bool)[predictions.targets]
    positives = truth.sum(axis=0)
    ranks = rankdata(predictions.probabilities, axis=0)
    wins = (ranks * truth).sum(axis=0) - positives * (positives + 1) / 2
    with np.errstate(invalid="ignore"):
        aucs: Floats = wins / (positives * (len(truth) - positives))
    return aucs


def _compute_average_precisions(predictions: Predictions) -> Floats:
    scores = np.full(predictions.probabilities.shape[1], np.nan)
    for target in np.unique(predictions.targets):
        positive = predictions.targets == target
        if not positive.all():
            scores[target] = sk.average_precision_score(positive, predictions.probabilities[:, target])
    return scores


def _mean_auc(predictions: Predictions) -> float:
    aucs = _compute_aucs(predictions)
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
                "auc": _compute_aucs(predictions),
                "ap": _compute_average_precisions(predictions),
            }
        )


def compute_confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count images by true class (rows) and predicted class (columns), int64 (K, K)."""
    labels = list(range(predictions.probabilities.shape[1]))
    counts: NDArray[np.int64] = sk.confusion_matrix(predictions.targets, predictions.predicted, labels=labels)
    return counts


def predict_always(target: int, like: Predictions) -> Predictions:
    """Return the predictions of a model that is certain of the same class for every image."""
    probabilities = np.zeros_like(like.probabilities)
    probabilities[:, target] = 1
    return Predictions(probabilities=probabilities, targets=like.targets, image_ids=like.image_ids)


def compute_intervals(
    predictions: Predictions, lesions: NDArray[np.str_], *, replicates: int = 1000
) -> dict[str, tuple[float, float]]:
    """Compute a 95 % interval of each headline metric by drawing lesions with replacement.

    Args:
        predictions: Of N images.
        lesions: Which lesion each image shows, (N,).
        replicates: How many times lesions are drawn.
    """
    draws = compute_weighted(predictions, draw_lesions(lesions, replicates=replicates))
    return {name: compute_percentiles(draws[name]) for name in HEADLINES}


def draw_lesions(lesions: NDArray[Any], *, replicates: int = 1000, seed: int = 0) -> Floats:
    """Draw lesions with replacement; return how often each draw has each image, float64 (replicates, N).

    The photos of one lesion are not independent, so lesions are drawn, not images. The same lesions give the
    same draws: two models' metrics can be subtracted draw by draw.
    Source: Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3 (percentile interval).
    """
    names, lesion_of = np.unique(lesions, return_inverse=True)
    shares = np.full(len(names), 1 / len(names))
    draws = np.random.default_rng(seed).multinomial(len(names), shares, size=replicates)
    weights: Floats = draws[:, lesion_of].astype(np.float64)
    return weights


def compute_percentiles(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the middle `level` of the finite draws; NaN where there is none."""
    if not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compute_mean_interval(values: ArrayLike, lesions: NDArray[Any]) -> tuple[float, float]:
    """Compute a 95 % interval of the mean of values (N,) by drawing their lesions (N,)."""
    weights = draw_lesions(lesions)
    return compute_percentiles(weights @ np.asarray(values, dtype=np.float64) / weights.sum(axis=1))


def compute_share_interval(hits: NDArray[np.bool_], lesions: NDArray[Any]) -> tuple[float, float]:
    """Compute the 95 % interval of the share of images that are hits, (N,), by drawing their lesions (N,).

    If all images are hits, or none is, so is every draw, however few there are: the interval is then the
    exact binomial one over lesions (Clopper, Pearson, Biometrika 26:404, 1934). NaN without images.
    """
    if not len(hits):
        return float("nan"), float("nan")
    if hits.all() or not hits.any():
        margin = 1 - 0.025 ** (1 / len(np.unique(lesions)))
        return (1 - margin, 1.0) if hits.all() else (0.0, margin)
    return compute_mean_interval(hits, lesions)


def compute_weighted(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    """Compute the headline metrics for many weightings of the images, (B, N), at once; each (B,).

    A draw that lacks one of the classes has no balanced accuracy and no macro AUC (NaN): a mean over fewer
    classes is a different metric, and would shift the intervals of rare classes upwards.
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
    """Compute an AUC for each row of weights (B, N): the chance that a positive outranks a negative."""
    positives, negatives = weights[:, positive], weights[:, ~positive]
    counts = negatives.astype(np.float32)  # sums of whole and half weights: exact below 8 million images
    wins = np.zeros(len(weights))
    for start in range(0, positives.shape[1], _AUC_CHUNK):
        chunk = slice(start, start + _AUC_CHUNK)
        # 1 where the positive's score is higher, 1/2 for a tie.
        outranks = (np.sign(scores[positive][chunk, None] - scores[~positive]) + 1) / 2
        wins += (positives[:, chunk] * (counts @ outranks.T.astype(np.float32))).sum(axis=1)
    result: Floats = wins / (positives.sum(axis=1) * negatives.sum(axis=1))
    return result
