"""Metrics of predictions, and their confidence intervals by bootstrap over lesions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from sklearn import metrics as sk

from skin_resnet.errors import UserError

HEADLINES = ("balanced_accuracy", "accuracy", "macro_auc")
PLAIN = ("plain_balanced_accuracy", "plain_accuracy")  # of the plain decision
Floats = NDArray[np.float64]
Score = tuple[float, float, float]  # value, low and high end of the 95 % interval


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Predicted probabilities of some images, and their true classes.

    Attributes:
        probabilities: float64 (N, K), rows sum to 1.
        targets: int64 (N,), class indices.
        decisions: int64 (N,), the predicted classes; None: the most probable ones.
        unfamiliarity: (N,), above 1 where an image is unlike the training images; None: not measured.
    """

    probabilities: Floats
    targets: NDArray[np.int64]
    image_ids: tuple[str, ...]
    decisions: NDArray[np.int64] | None = None
    unfamiliarity: Floats | None = None

    @property
    def predicted(self) -> NDArray[np.int64]:
        """The predicted class of each image, int64 (N,)."""
        if self.decisions is not None:
            return self.decisions
        return choose_highest(self.probabilities, self.targets)

    @property
    def plain(self) -> "Predictions":
        """The same predictions, decided for the most probable class."""
        return replace(self, decisions=None)

    def select(self, inside: NDArray[np.bool_ | np.int64]) -> "Predictions":
        """Return the predictions of some images: of a mask, bool (N,), or of rows in any order."""
        return Predictions(
            probabilities=self.probabilities[inside],
            targets=self.targets[inside],
            image_ids=tuple(np.array(self.image_ids)[inside]),
            decisions=None if self.decisions is None else self.decisions[inside],
        )


def choose_highest(scores: Floats, targets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the class with the highest of each image's scores, (N, K), as int64 (N,).

    A tie between several classes counts as a wrong prediction, as in the ISIC scorer: a network with the
    same output for every image must not score by the order of the classes.
    """
    highest = scores == scores.max(axis=1, keepdims=True)
    tied = highest.sum(axis=1) > 1
    highest[tied, targets[tied]] = False
    chosen: NDArray[np.int64] = highest.argmax(axis=1)
    return chosen


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
    images = len(predictions.targets)
    of_target = predictions.probabilities[np.arange(images), predictions.targets]
    loss = float(-np.log(np.maximum(of_target, np.finfo(np.float32).tiny)).mean())
    scores = compute_weighted(predictions, np.ones((1, images)))
    return Metrics(loss=loss, **{name: float(scores[name][0]) for name in HEADLINES})


def compute_class_table(predictions: Predictions, classes: tuple[str, ...]) -> pd.DataFrame:
    """Compute a row per class: images, sensitivity, specificity, ppv, npv, f1, auc, ap; NaN where undefined.

    `ppv` is also called precision, `ap` is average precision.
    """
    counts = compute_confusion(predictions)
    hits, actual, predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    images = counts.sum()
    aucs, precisions = np.full((2, len(classes)), np.nan)
    for target in np.flatnonzero((actual > 0) & (actual < images)):
        positive, scores = predictions.targets == target, predictions.probabilities[:, target]
        aucs[target] = sk.roc_auc_score(positive, scores)
        precisions[target] = sk.average_precision_score(positive, scores)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "dx": classes,
                "images": actual,
                "sensitivity": hits / actual,
                "specificity": 1 - (predicted - hits) / (images - actual),
                "ppv": hits / predicted,
                "npv": 1 - (actual - hits) / (images - predicted),
                "f1": np.where(actual > 0, 2 * hits / (actual + predicted), np.nan),
                "auc": aucs,
                "ap": precisions,
            }
        )


def compute_confusion(predictions: Predictions) -> NDArray[np.int64]:
    """Count images by true class (rows) and predicted class (columns), int64 (K, K)."""
    labels = range(predictions.probabilities.shape[1])
    counts: NDArray[np.int64] = sk.confusion_matrix(predictions.targets, predictions.predicted, labels=labels)
    return counts


def predict_always(target: int, like: Predictions) -> Predictions:
    """Return the predictions of a model that is certain of the same class for every image."""
    certain = np.eye(like.probabilities.shape[1])[target]
    return replace(like.plain, probabilities=np.tile(certain, (len(like.targets), 1)))


def compute_scores(predictions: Predictions, lesions: NDArray[Any]) -> dict[str, Score]:
    """Compute the metrics in HEADLINES and PLAIN, their intervals by drawing lesions, (N,), many times."""
    values = compute_weighted(predictions, np.ones((1, len(lesions))))
    draws = compute_weighted(predictions, draw_lesions(lesions))
    return {name: (float(values[name][0]), *compute_percentiles(draws[name])) for name in values}


def is_better(low: float, baseline: float = 0.0) -> bool:
    """Return whether a score beats a baseline's: its interval, from `low` on, lies above it; NaN does not."""
    return bool(low > baseline)


def draw_lesions(lesions: NDArray[Any]) -> Floats:
    """Draw lesions with replacement; return how often each draw has each image, float64 (1000, N).

    The photos of one lesion are not independent, so lesions are drawn, not images. The same lesions give the
    same draws: two models' metrics can be subtracted draw by draw.
    Source: Efron, Tibshirani, "An Introduction to the Bootstrap" (1993), section 13.3 (percentile interval).
    """
    names, lesion_of = np.unique(lesions, return_inverse=True)
    weights: Floats = _draw(len(names))[:, lesion_of].astype(np.float64)
    return weights


@lru_cache(maxsize=8)  # an evaluation draws for the same few sizes again and again
def _draw(lesions: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).multinomial(lesions, np.full(lesions, 1 / lesions), size=1000)


def compute_percentiles(draws: Floats) -> tuple[float, float]:
    """Return the ends of the middle 95 % of the finite draws; NaN where there is none."""
    if not np.isfinite(draws).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def compute_mean_interval(values: ArrayLike, lesions: NDArray[Any]) -> tuple[float, float]:
    """Compute a 95 % interval of the mean of values (N,) by drawing their lesions (N,)."""
    weights = draw_lesions(lesions)
    return compute_percentiles(weights @ np.asarray(values, dtype=np.float64) / weights.sum(axis=1))


def compute_share(hits: NDArray[np.bool_], lesions: NDArray[Any]) -> Score:
    """Compute the share of images that are hits, (N,), and its interval by drawing their lesions (N,).

    If all images are hits, or none is, so is every draw, however few there are: the interval is then the
    exact binomial one over lesions (Clopper, Pearson, Biometrika 26:404, 1934). NaN without images.
    """
    if not len(hits):
        return float("nan"), float("nan"), float("nan")
    if hits.all() or not hits.any():
        margin = 1 - 0.025 ** (1 / len(np.unique(lesions)))
        return (1.0, 1 - margin, 1.0) if hits.all() else (0.0, 0.0, margin)
    return float(hits.mean()), *compute_mean_interval(hits, lesions)


def compute_weighted(predictions: Predictions, weights: Floats) -> dict[str, Floats]:
    """Compute HEADLINES and PLAIN for many weightings of the images, (B, N), at once; each (B,).

    A draw that lacks one of the classes has no balanced accuracy and no macro AUC (NaN): a mean over fewer
    classes is a different metric, and would shift the intervals of rare classes upwards.
    """
    scores = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        positives = {target: predictions.targets == target for target in np.unique(predictions.targets)}
        for kind, each in (("", predictions), ("plain_", predictions.plain)):
            hits = weights * (each.predicted == each.targets)
            recalls = [hits[:, one].sum(axis=1) / weights[:, one].sum(axis=1) for one in positives.values()]
            scores[f"{kind}balanced_accuracy"] = np.mean(recalls, axis=0)
            scores[f"{kind}accuracy"] = hits.sum(axis=1) / weights.sum(axis=1)
        aucs = [
            _compute_weighted_auc(one, predictions.probabilities[:, target], weights)
            for target, one in positives.items()
        ]
    return {**scores, "macro_auc": np.mean(aucs, axis=0)}


def _compute_weighted_auc(positive: NDArray[np.bool_], scores: Floats, weights: Floats) -> Floats:
    """Compute an AUC for each row of weights (B, N): the chance that a positive outranks a negative.

    A tie counts half. The negatives are sorted once, so each row takes one pass.
    """
    order = np.flatnonzero(~positive)[np.argsort(scores[~positive])]
    positives = weights[:, positive]
    counts = np.pad(weights[:, order].cumsum(axis=1), ((0, 0), (1, 0)))
    below, not_above = (np.searchsorted(scores[order], scores[positive], side) for side in ("left", "right"))
    wins = (positives * (counts[:, below] + counts[:, not_above])).sum(axis=1) / 2
    result: Floats = wins / (positives.sum(axis=1) * counts[:, -1])
    return result


def compare_models(
    models: Mapping[str, Sequence[Predictions]], lesions: NDArray[np.str_]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compute the metrics in HEADLINES and PLAIN of each model, and each two models' difference in the first.

    All are computed on the same bootstrap draws: what is hard for two models cancels out in their difference.
    Of a model with several trainings, the metrics are means: the intervals cover the choice of lesions, not
    that of seeds.

    Args:
        models: By model name, the predictions of each of its trainings, all of the same N images in order.
        lesions: Which lesion each image shows, (N,).

    Returns:
        The metrics, by model and metric: value, low and high (95 % interval by bootstrap over lesions); and a
        row per metric and pair: metric, first, second, value (first minus second), low, high.

    Raises:
        UserError: The models were evaluated on different images.
    """
    reference, (expected, *_) = next(iter(models.items()))
    weights = draw_lesions(lesions)
    points, draws = {}, {}
    for name, trainings in models.items():
        for each in trainings:
            same_targets = np.array_equal(each.targets, expected.targets)
            if each.image_ids != expected.image_ids or not same_targets:
                raise UserError(
                    f"{name} and {reference} were evaluated on different images; pass runs of one split."
                )
        metrics = [compute_weighted(each, np.ones((1, len(lesions)))) for each in trainings]
        weighted = [compute_weighted(each, weights) for each in trainings]
        for metric in (*HEADLINES, *PLAIN):
            points[name, metric] = float(np.mean([each[metric] for each in metrics]))
            draws[name, metric] = np.mean([each[metric] for each in weighted], axis=0)
    scores = pd.DataFrame(
        [(value, *compute_percentiles(draws[key])) for key, value in points.items()],
        index=pd.MultiIndex.from_tuples(points, names=["model", "metric"]),
        columns=["value", "low", "high"],
    )
    rows = []
    for metric in HEADLINES:
        for second, first in combinations(models, 2):
            value = points[first, metric] - points[second, metric]
            interval = compute_percentiles(draws[first, metric] - draws[second, metric])
            rows.append((metric, first, second, value, *interval))
    differences = pd.DataFrame(rows, columns=["metric", "first", "second", "value", "low", "high"])
    return scores, differences
