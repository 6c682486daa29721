"""Decisions from probabilities: thresholds chosen on val, referral of uncertain images, missed melanomas.

An image is flagged where the summed probability of the positive classes reaches a threshold: melanoma against
the rest, or malignant against benign. Val, where the threshold is chosen, and test share one temperature.
"""

import math
from collections.abc import Collection, Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import Floats, Predictions, compute_share
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES

SENSITIVITIES = (0.90, 0.95)  # wanted on val


def find_positives(classes: tuple[str, ...]) -> dict[str, frozenset[int]]:
    """Return the class indices of melanoma and of malignant; nothing unless the classes are the diagnoses."""
    if classes != HAM10000_CLASSES:
        return {}
    malignant = frozenset(index for index, diagnosis in enumerate(DIAGNOSES) if diagnosis.malignant)
    return {"melanoma": frozenset({classes.index("mel")}), "malignant": malignant}


def score_positives(predictions: Predictions, positives: Collection[int]) -> Floats:
    """Return the summed probability of the positive classes, (N,)."""
    scores: Floats = predictions.probabilities[:, sorted(positives)].sum(axis=1)
    return scores


def is_positive(predictions: Predictions, positives: Collection[int]) -> NDArray[np.bool_]:
    """Return which images truly are positive, (N,)."""
    return np.isin(predictions.targets, sorted(positives))


def choose_threshold(predictions: Predictions, positives: Collection[int], sensitivity: float) -> float:
    """Choose the highest threshold that reaches a sensitivity on images of which some are positive."""
    scores = np.sort(score_positives(predictions, positives)[is_positive(predictions, positives)])
    wanted = math.ceil(sensitivity * len(scores) - 1e-9)  # (0.07 * 100 is a little above 7)
    return float(scores[-wanted])


def choose_thresholds(predictions: Predictions, classes: tuple[str, ...]) -> dict[str, float]:
    """Choose the thresholds of all groups and sensitivities on val, by name: `melanoma_at_0.90`, ..."""
    return {
        f"{group}_at_{goal:.2f}": choose_threshold(predictions, positives, goal)
        for group, positives in find_positives(classes).items()
        if is_positive(predictions, positives).any()
        for goal in SENSITIVITIES
    }


def apply_threshold(
    predictions: Predictions, positives: Collection[int], threshold: float, lesions: NDArray[np.str_]
) -> Iterator[tuple[str, float, float, float, int]]:
    """Measure sensitivity and specificity of a threshold on images that it was not chosen on.

    Yields:
        Name, value, low and high (95 % interval), and number of images; NaN where there are none.
    """
    flagged = score_positives(predictions, positives) >= threshold
    positive = is_positive(predictions, positives)
    for name, hits, inside in (("sensitivity", flagged, positive), ("specificity", ~flagged, ~positive)):
        yield name, *compute_share(hits[inside], lesions[inside]), int(inside.sum())


def compute_referral(predictions: Predictions) -> pd.DataFrame:
    """Compute the accuracy on the rest when the images with the lowest confidence are referred.

    Confidence and accuracy are those of the most probable class. The mean of `accuracy` is 1 minus the AURC
    of Geifman, Uziel, El-Yaniv (ICLR 2019).

    Returns:
        A row per number of images kept, N first, 1 last: referred_fraction, accuracy of the images kept.
    """
    images = np.arange(len(predictions.targets))
    confidences = predictions.probabilities.max(axis=1)
    is_right = pd.Series(predictions.plain.predicted == predictions.targets)
    # Equally confident images share hits and misses evenly: their order does not matter.
    hits = is_right.groupby(confidences).transform("mean")
    kept = hits.iloc[np.argsort(-confidences)].expanding().mean()
    return pd.DataFrame({"referred_fraction": images / len(images), "accuracy": kept.to_numpy()[::-1]})


def tabulate_missed(
    predictions: Predictions, positives: Collection[int], classes: tuple[str, ...]
) -> pd.DataFrame:
    """List positive images that are predicted as a negative class, the most confidently missed first.

    Returns:
        A row per image: image_id, dx, prediction, confidence (the highest probability), and score (the summed
        probability of the positive classes).
    """
    names = np.array(classes)
    missed = is_positive(predictions, positives) & ~np.isin(predictions.predicted, sorted(positives))
    images = pd.DataFrame(
        {
            "image_id": predictions.image_ids,
            "dx": names[predictions.targets],
            "prediction": names[predictions.predicted],
            "confidence": predictions.probabilities.max(axis=1),
            "score": score_positives(predictions, positives),
        }
    )
    return images[missed].sort_values("score", kind="stable", ignore_index=True)
