"""Probabilities that mean what they say: temperature, calibration error, and sets that hold the truth.

Fit on val, check on test. What is fitted here never changes which class is the most probable.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Floats, Predictions, compute_mean_interval

_HOTTEST = 20.0  # beyond it, up or down, it is not the temperature that is wrong
_LEAST = np.finfo(np.float32).tiny


@dataclass(frozen=True, kw_only=True)
class ConformalThreshold:
    """What a class's probability must reach for the class to be among those an image may be.

    Attributes:
        coverage: Share of images whose set should hold the true class.
        least_probability: The threshold; 0 where there were too few images to promise that coverage.
        images: How many images it was fitted on.
    """

    coverage: float
    least_probability: float
    images: int


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What conformal sets hold.

    Attributes:
        coverage: Share of images whose set holds the true class.
        interval: 95 % interval of it, by bootstrap over lesions.
        class_coverage: Coverage of each class, of which nothing is promised, (K,); NaN where it has no image.
        mean_size: Classes per set.
        singleton_fraction: Share of sets with one class only.
    """

    coverage: float
    interval: tuple[float, float]
    class_coverage: Floats
    mean_size: float
    singleton_fraction: float


def check_probabilities(predictions: Predictions) -> None:
    """Refuse what no probability can be read from.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    if not len(predictions.targets):
        raise UserError(
            "probabilities are checked on images, but there are none; give a split that has some."
        )
    bad = np.flatnonzero(~np.isfinite(predictions.probabilities).all(axis=1))
    if len(bad):
        raise UserError(
            f"probabilities must be finite, but {len(bad)} of {len(predictions.targets)} images have others "
            f"(first: {predictions.image_ids[bad[0]]}); train again, with a smaller lr."
        )


def fit_temperature(predictions: Predictions) -> float:
    """Find the temperature at which the mean log loss is least: above 1 where the model is too sure.

    It is 1 where every answer is right: the loss would then only ever ask to be surer.
    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    if (predictions.predicted == predictions.targets).all():
        return 1.0
    logs = _take_logs(predictions)
    of_target = logs[np.arange(len(logs)), predictions.targets]

    def compute_loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(logs * scale).sum(axis=1)) - of_target * scale))

    # The loss is convex in 1 / T, so there is one minimum.
    bounds = (-math.log(_HOTTEST), math.log(_HOTTEST))
    found = minimize_scalar(compute_loss, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x)


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Divide the logits by a temperature: the order of the classes stays, how sure the model is changes."""
    if temperature == 1:
        return predictions
    powers = np.exp(_take_logs(predictions) / temperature)
    return replace(predictions, probabilities=powers / powers.sum(axis=1, keepdims=True))


def _take_logs(predictions: Predictions) -> Floats:
    """Give logits whose highest is 0. They are known up to a constant only, which no softmax sees."""
    logs = np.log(np.maximum(predictions.probabilities, _LEAST))
    highest: Floats = logs - logs.max(axis=1, keepdims=True)
    return highest


def compute_reliability(predictions: Predictions, bins: int = 15) -> pd.DataFrame:
    """Compare how sure the model was with how often it was right, in bins of equal width.

    Returns:
        A row per bin (low, high]: images, mean confidence (the highest probability) and accuracy, NaN where
        there is no image.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    confidences = predictions.probabilities.max(axis=1)
    edges = np.linspace(0, 1, bins + 1)
    bin_of = np.searchsorted(edges[1:-1], confidences)
    images = np.bincount(bin_of, minlength=bins)
    right = np.bincount(bin_of, predictions.predicted == predictions.targets, minlength=bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "low": edges[:-1],
                "high": edges[1:],
                "images": images,
                "confidence": np.bincount(bin_of, confidences, minlength=bins) / images,
                "accuracy": right / images,
            }
        )


def compute_ece(predictions: Predictions, bins: int = 15) -> float:
    """Compute the expected calibration error, 0 to 1: how far confidence is from accuracy, on average.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, section 2, equation 3.
    """
    table = compute_reliability(predictions, bins)
    return float((table.images * (table.accuracy - table.confidence).abs()).sum() / table.images.sum())


def compute_brier(predictions: Predictions) -> float:
    """Compute the squared error summed over classes, averaged over images: 0 is perfect, 2 is surely wrong.

    Source: Brier, Monthly Weather Review 78:1 (1950).
    """
    check_probabilities(predictions)
    truth = np.eye(predictions.probabilities.shape[1])[predictions.targets]
    return float(np.square(predictions.probabilities - truth).sum(axis=1).mean())


def fit_conformal(predictions: Predictions, coverage: float = 0.9) -> ConformalThreshold:
    """Find the threshold at which sets of classes hold the true one for a given share of new images.

    The score is 1 minus the probability of the true class (LAC), which gives the smallest sets. The promise
    is for all classes together, and for images drawn like those of val. Lesions with several photos, and an
    epoch that was chosen on val, bend it a little: `check_coverage` on test tells how much.
    Source: Sadinle, Lei, Wasserman, JASA 114:223 (2019); the finite-sample quantile is that of Angelopoulos,
    Bates, "A Gentle Introduction to Conformal Prediction" (arXiv 2107.07511), section 1.

    Raises:
        UserError: There is no image, a probability is not finite, or the coverage is no share.
    """
    check_probabilities(predictions)
    if not 0 < coverage < 1:
        raise UserError(f"coverage must lie between 0 and 1, but is {coverage}; give 0.9, say.")
    images = len(predictions.targets)
    of_target = np.sort(predictions.probabilities[np.arange(images), predictions.targets])
    rank = math.ceil((images + 1) * coverage - 1e-9)  # what 0.07 * 100 is above 7 must not count
    least = of_target[images - rank] if rank <= images else 0
    return ConformalThreshold(coverage=coverage, least_probability=float(least), images=images)


def predict_sets(predictions: Predictions, threshold: ConformalThreshold) -> NDArray[np.bool_]:
    """Tell which classes each image may be, (N, K). The most probable one always is: no set is empty."""
    sets: NDArray[np.bool_] = predictions.probabilities >= threshold.least_probability
    sets[np.arange(len(sets)), predictions.predicted] = True
    return sets


def check_coverage(
    predictions: Predictions, threshold: ConformalThreshold, lesions: NDArray[np.str_]
) -> Coverage:
    """Measure what the sets hold on images that the threshold was not fitted on.

    Args:
        predictions: Of N images.
        threshold: From `fit_conformal`.
        lesions: Which lesion each image shows, (N,).

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    sets = predict_sets(predictions, threshold)
    sizes = sets.sum(axis=1)
    covered = sets[np.arange(len(sets)), predictions.targets]
    classes = sets.shape[1]
    with np.errstate(invalid="ignore"):
        class_coverage = np.bincount(predictions.targets, covered, minlength=classes) / np.bincount(
            predictions.targets, minlength=classes
        )
    return Coverage(
        coverage=float(covered.mean()),
        interval=compute_share_interval(covered, lesions),
        class_coverage=class_coverage,
        mean_size=float(sizes.mean()),
        singleton_fraction=float((sizes == 1).mean()),
    )


def compute_share_interval(hits: NDArray[np.bool_], lesions: NDArray[np.str_]) -> tuple[float, float]:
    """Compute the 95 % interval of the share of images that are hits, by drawing their lesions.

    Where all images are hits, or none is, every draw says the same, however few they are: the interval is
    then the exact binomial one over lesions (Clopper, Pearson, Biometrika 26:404, 1934). NaN without images.

    Args:
        hits: (N,).
        lesions: Which lesion each image shows, (N,).
    """
    if not len(hits):
        return float("nan"), float("nan")
    if hits.all() or not hits.any():
        margin = 1 - 0.025 ** (1 / len(np.unique(lesions)))
        return (1 - margin, 1.0) if hits.all() else (0.0, margin)
    return compute_mean_interval(hits, lesions)
