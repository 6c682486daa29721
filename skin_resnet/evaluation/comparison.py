"""Paired differences between models on the same images, with their intervals."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_metrics,
    compute_percentiles,
    compute_weighted,
    draw_lesions,
)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric of one model minus that of another, with a paired 95 % interval by bootstrap over lesions."""

    first: str
    second: str
    metric: str
    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def compare_models(models: Mapping[str, Predictions], lesions: NDArray[np.str_]) -> list[Difference]:
    """Compute the difference of each two models, for each headline metric.

    Both metrics of a difference are computed on the same bootstrap draws: what is hard for both cancels out.

    Args:
        models: Predictions by model name, all of the same N images in the same order.
        lesions: Which lesion each image shows, (N,).

    Raises:
        UserError: The models were evaluated on different images.
    """
    first = next(iter(models.values()))
    for name, predictions in models.items():
        same_targets = np.array_equal(predictions.targets, first.targets)
        if predictions.image_ids != first.image_ids or not same_targets:
            raise UserError(
                f"{name} and {next(iter(models))} were evaluated on different images; give runs of one split."
            )
    weights = draw_lesions(lesions)
    points = {name: compute_metrics(predictions) for name, predictions in models.items()}
    draws = {name: compute_weighted(predictions, weights) for name, predictions in models.items()}
    differences = []
    for metric in HEADLINES:
        for second, later in combinations(models, 2):
            low, high = compute_percentiles(draws[later][metric] - draws[second][metric])
            value = getattr(points[later], metric) - getattr(points[second], metric)
            differences.append(
                Difference(first=later, second=second, metric=metric, value=value, low=low, high=high)
            )
    return differences


def format_difference(difference: Difference) -> str:
    """Write a difference in points: `resnet152 minus resnet50: +0.8 points [-0.9, +2.4]`."""
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    verdict = "" if difference.is_clear else ", not significant"
    return (
        f"{difference.first} minus {difference.second}: {value:+.1f} points [{low:+.1f}, {high:+.1f}] "
        f"{difference.metric.replace('_', ' ').replace('auc', 'AUC')}{verdict}"
    )
