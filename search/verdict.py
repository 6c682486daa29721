"""Two recipes, each trained with several seeds, on the same test: their figures and the paired difference."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skin_resnet.evaluation.comparison import Difference
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_metrics,
    compute_percentiles,
    compute_weighted,
    draw_lesions,
)

Figures = dict[str, tuple[float, tuple[float, float]]]  # by headline: the mean over seeds, and its interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What test says.

    Attributes:
        figures: By recipe.
        differences: The winner minus the seed recipe, by headline; empty where the seed recipe won.
    """

    figures: dict[str, Figures]
    differences: tuple[Difference, ...]


def compare_recipes(recipes: Mapping[str, Sequence[Predictions]], lesions: NDArray[np.str_]) -> Verdict:
    """Compute each recipe's mean over its seeds, and of two recipes the second minus the first.

    Both are computed on the same drawn lesions: what is hard for both cancels. The interval says what other
    lesions would have changed, not what other seeds would have.

    Args:
        recipes: Predictions of the same N images by recipe, one a seed.
        lesions: Which lesion each image shows, (N,).
    """
    weights = draw_lesions(lesions)
    points: dict[str, dict[str, float]] = {}
    draws: dict[str, dict[str, NDArray[np.float64]]] = {}
    for name, seeds in recipes.items():
        metrics = [compute_metrics(predictions) for predictions in seeds]
        weighted = [compute_weighted(predictions, weights) for predictions in seeds]
        points[name] = {key: float(np.mean([getattr(each, key) for each in metrics])) for key in HEADLINES}
        draws[name] = {key: np.mean([each[key] for each in weighted], axis=0) for key in HEADLINES}
    figures = {
        name: {key: (points[name][key], compute_percentiles(draws[name][key])) for key in HEADLINES}
        for name in recipes
    }
    if len(recipes) < 2:
        return Verdict(figures=figures, differences=())
    first, second = recipes
    differences = []
    for key in HEADLINES:
        low, high = compute_percentiles(draws[second][key] - draws[first][key])
        value = points[second][key] - points[first][key]
        differences.append(
            Difference(first=second, second=first, metric=key, value=value, low=low, high=high)
        )
    return Verdict(figures=figures, differences=tuple(differences))
