"""Calibrated probabilities (temperature scaling, conformal prediction sets), and the decision rule.

Fitted on val, measured on test. Nothing here changes which class is the most probable; the decision rule may
predict another one.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar

from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Floats, Predictions, choose_highest
from skin_resnet.evaluation.operating import choose_thresholds

_BINS = 15  # of confidence, for reliability and ECE
_TAUS = np.arange(31) * 0.05
_SMOOTHED = 5  # neighbors over which the score of a tau is averaged: rare classes make it jump
_HOTTEST = 20.0  # bound of the temperature and of its inverse: beyond it, the network itself is wrong


class Calibration(TypedDict):
    """What is fitted on val and travels in the checkpoint.

    Attributes:
        temperature: What the logits are divided by.
        tau: Of the decision rule, argmax p / prior**tau; 0 predicts the most probable class.
        decision_weights: prior**-tau of each class, scaled to a sum of 1.
        coverage: Wanted share of images whose prediction set holds the true class.
        least_probability: From which on a class belongs to an image's prediction set.
        thresholds: By name (`melanoma_at_0.90`): the highest one that reaches that sensitivity on val.
    """

    temperature: float
    tau: float
    decision_weights: list[float]
    coverage: float
    least_probability: float
    thresholds: dict[str, float]


def fit_calibration(
    predictions: Predictions, classes: tuple[str, ...], coverage: float, class_counts: NDArray[np.int64]
) -> Calibration:
    """Fit temperature, decision rule, conformal sets and thresholds on the network's predictions on val.

    Args:
        predictions: Before temperature.
        coverage: Wanted share of images whose prediction set holds the true class.
        class_counts: Training images of each class, int64 (K,).

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    temperature = fit_temperature(predictions)
    calibrated = apply_temperature(predictions, temperature)
    tau = fit_tau(calibrated, class_counts)
    return Calibration(
        temperature=temperature,
        tau=tau,
        decision_weights=_weight_classes(class_counts, tau).tolist(),
        coverage=coverage,
        least_probability=fit_conformal(calibrated, coverage),
        thresholds=choose_thresholds(calibrated, classes),
    )


def get_val_predictions(checkpoint: Mapping[str, Any]) -> Predictions:
    """Return the predictions of a checkpoint's network on val, before temperature."""
    return Predictions(
        probabilities=checkpoint["val_probabilities"].numpy(),
        targets=checkpoint["val_targets"].numpy(),
        image_ids=tuple(checkpoint["split"]["val"]),
    )


def fit_tau(predictions: Predictions, class_counts: NDArray[np.int64]) -> float:
    """Find the tau in [0, 1.5] whose decisions argmax p / prior**tau have the highest balanced accuracy.

    With true probabilities, 1 is the best one; a network fitted to few images of a rare class is less sure.
    It is 0 unless what is gained over the plain decision exceeds its standard error: on few images, the
    highest score is luck. The error is that of a difference of 0, as in McNemar's test, with each image
    weighted by the inverse size of its class.
    Source: Menon et al., "Long-tail learning via logit adjustment" (ICLR 2021), section 4.1 (post hoc).
    """
    targets = predictions.targets
    decisions = [decide(predictions, _weight_classes(class_counts, tau)).predicted for tau in _TAUS]
    hits = np.array(decisions) == targets
    shares = 1 / np.bincount(targets)[targets]
    padded = np.pad(hits @ shares / shares.sum(), _SMOOTHED // 2, mode="edge")
    smoothed = np.convolve(padded, np.full(_SMOOTHED, 1 / _SMOOTHED), mode="valid")
    best = smoothed.round(9).argmax()
    gains = shares * (hits[best].astype(int) - hits[0])
    return float(_TAUS[best]) if gains.sum() > np.sqrt((gains**2).sum()) else 0.0


def _weight_classes(counts: NDArray[np.int64], tau: float) -> Floats:
    weights = np.maximum(counts, 1).astype(np.float64) ** -tau
    scaled: Floats = weights / weights.sum()
    return scaled


def decide(predictions: Predictions, weights: ArrayLike) -> Predictions:
    """Predict the class with the highest weighted probability; weights are (K,)."""
    decisions = choose_highest(predictions.probabilities * np.asarray(weights), predictions.targets)
    return replace(predictions, decisions=decisions)


def check_probabilities(predictions: Predictions) -> None:
    """Raise a `UserError` if there is no image, or a probability is not finite."""
    if not len(predictions.targets):
        raise UserError("there are no images to evaluate; pass data that has some.")
    bad = np.flatnonzero(~np.isfinite(predictions.probabilities).all(axis=1))
    if len(bad):
        raise UserError(
            f"the network's output is not finite for {len(bad)} of {len(predictions.targets)} images (first: "
            f"{predictions.image_ids[bad[0]]}); train again with a smaller lr."
        )


def fit_temperature(predictions: Predictions) -> float:
    """Find the temperature with the lowest mean log loss: above 1 where the model is overconfident.

    It is 1 where every prediction is right: the loss would then be lowest at a temperature of 0.
    Source: Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """
    if (predictions.plain.predicted == predictions.targets).all():
        return 1.0
    logs = _take_logs(predictions)
    of_target = logs[np.arange(len(logs)), predictions.targets]

    def compute_loss(log_temperature: float) -> float:
        scale = math.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(logs * scale).sum(axis=1)) - of_target * scale))

    # The loss is convex in 1 / T, so there is one minimum.
    limit = math.log(_HOTTEST)
    found = minimize_scalar(compute_loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-6})
    return math.exp(found.x)


def apply_temperature(predictions: Predictions, temperature: float) -> Predictions:
    """Divide the logits by a temperature; the order of the classes stays the same."""
    if temperature == 1:
        return predictions
    powers = np.exp(_take_logs(predictions) / temperature)
    return replace(predictions, probabilities=powers / powers.sum(axis=1, keepdims=True))


def _take_logs(predictions: Predictions) -> Floats:
    """Return logits shifted so that the highest is 0; softmax ignores the shift."""
    logs = np.log(np.maximum(predictions.probabilities, np.finfo(np.float32).tiny))
    highest: Floats = logs - logs.max(axis=1, keepdims=True)
    return highest


def compute_reliability(predictions: Predictions) -> pd.DataFrame:
    """Compare confidence with the accuracy of the most probable class, in 15 bins of equal width.

    Returns:
        A row per bin (low, high]: images, mean confidence (the highest probability) and accuracy, NaN where
        there is no image.
    """
    confidences = predictions.probabilities.max(axis=1)
    edges = np.linspace(0, 1, _BINS + 1)
    bin_of = np.searchsorted(edges[1:-1], confidences)
    is_right = predictions.plain.predicted == predictions.targets
    table = pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "images": np.bincount(bin_of, minlength=_BINS)}
    )
    for name, values in (("confidence", confidences), ("accuracy", is_right)):
        table[name] = np.bincount(bin_of, values, minlength=_BINS) / table.images
    return table


def compute_ece(predictions: Predictions) -> float:
    """Compute the expected calibration error, 0 to 1: the mean distance of confidence from accuracy.

    Source: Guo, Pleiss, Sun, Weinberger, ICML 2017, section 2, equation 3.
    """
    table = compute_reliability(predictions)
    return float((table.images * (table.accuracy - table.confidence).abs()).sum() / table.images.sum())


def compute_brier(predictions: Predictions) -> float:
    """Compute the squared error summed over classes, averaged over images: 0 (perfect) to 2.

    Source: Brier, Monthly Weather Review 78:1 (1950).
    """
    truth = np.eye(predictions.probabilities.shape[1])[predictions.targets]
    return float(np.square(predictions.probabilities - truth).sum(axis=1).mean())


def fit_conformal(predictions: Predictions, coverage: float) -> float:
    """Find the probability from which on a class belongs to an image's prediction set.

    It is 0 where there are too few images to guarantee the coverage.

    The score is 1 minus the probability of the true class (LAC), which gives the smallest sets. Coverage is
    marginal: guaranteed over all classes together, for images exchangeable with those of val. Lesions with
    several photos, and choosing the epoch on val, weaken the guarantee a little; the empirical coverage on
    test shows how much.
    Source: Sadinle, Lei, Wasserman, JASA 114:223 (2019); the finite-sample quantile is that of Angelopoulos,
    Bates, "A Gentle Introduction to Conformal Prediction" (arXiv 2107.07511), section 1.
    """
    images = len(predictions.targets)
    of_target = np.sort(predictions.probabilities[np.arange(images), predictions.targets])
    rank = max(1, math.ceil((images + 1) * coverage - 1e-9))  # (0.07 * 100 is a little above 7)
    return float(of_target[images - rank]) if rank <= images else 0.0


def predict_sets(predictions: Predictions, least_probability: float) -> NDArray[np.bool_]:
    """Return the prediction sets, (N, K). The predicted class is always in: no set is empty."""
    sets: NDArray[np.bool_] = predictions.probabilities >= least_probability
    sets[np.arange(len(sets)), predictions.predicted] = True
    return sets
