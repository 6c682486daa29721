"""The headline figures part by part: a good mean may hide a sex, an age, a site or a diagnosis that fails."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_intervals,
    compute_mean_interval,
    compute_metrics,
)

MIN_IMAGES, MIN_LESIONS = 30, 20  # below, an interval is too wide, and too optimistic, to be worth printing
_AGE_BANDS = {"under 30": 0, "30-44": 30, "45-59": 45, "60-74": 60, "75 and over": 75}  # first year of each
_UNKNOWN = "unknown"
_MISSING = (np.nan, np.nan, np.nan)


def compute_slices(predictions: Predictions, table: pd.DataFrame, lesions: NDArray[np.str_]) -> pd.DataFrame:
    """Compute the headline figures by sex, age band and localization, and the sensitivity by diagnosis.

    A slice's balanced accuracy and macro AUC average over the classes that occur in it: where `classes`
    differ, so does the task, and two slices only compare roughly.

    Args:
        predictions: Of N images.
        table: Rows from `extract` of these images, in any order; others are ignored.
        lesions: Which lesion each image of `predictions` shows, (N,).

    Returns:
        A row per slice and figure: by ("all", "sex", "age", "localization" or "dx"), slice, images, lesions,
        classes (how many occur), figure, value, low and high (a 95 % interval), too_small. A slice is too
        small, and its numbers NaN, under `MIN_IMAGES` or `MIN_LESIONS`, or with one class if not by dx.
    """
    rows = table.set_index("image_id").loc[list(predictions.image_ids)]
    records = []
    for by, names in _list_partitions(rows):
        for name in names.categories[np.unique(names.codes)]:
            inside = np.asarray(names == name)
            figures, counts = _measure(by, _select(predictions, inside), lesions[inside])
            for figure, (value, low, high) in figures.items():
                number = {"figure": figure, "value": value, "low": low, "high": high}
                records.append({"by": by, "slice": name, **counts, **number, "too_small": np.isnan(value)})
    return pd.DataFrame(records)


def _list_partitions(rows: pd.DataFrame) -> Iterator[tuple[str, pd.Categorical]]:
    """Name each image's slice; an attribute that is unknown for all images makes no partition."""
    yield "all", pd.Categorical(["all"] * len(rows))
    ages = pd.cut(rows.age, [*_AGE_BANDS.values(), np.inf], right=False, labels=list(_AGE_BANDS))
    sites = sorted(
        set(rows.localization), key=lambda site: (site == _UNKNOWN, -sum(rows.localization == site))
    )
    for by, names in (
        ("sex", pd.Categorical(rows.sex)),
        ("age", pd.Categorical(ages.cat.add_categories(_UNKNOWN).fillna(_UNKNOWN))),
        ("localization", pd.Categorical(rows.localization, categories=sites)),
        ("dx", pd.Categorical(rows.dx)),
    ):
        if (names != _UNKNOWN).any():
            yield by, names


def _measure(
    by: str, part: Predictions, lesions: NDArray[np.str_]
) -> tuple[dict[str, tuple[float, float, float]], dict[str, int]]:
    """Give each figure of a slice with its interval, and what the slice holds."""
    counts = {
        "images": len(part.targets),
        "lesions": len(np.unique(lesions)),
        "classes": len(np.unique(part.targets)),
    }
    names = ("sensitivity",) if by == "dx" else HEADLINES
    too_few = counts["images"] < MIN_IMAGES or counts["lesions"] < MIN_LESIONS
    if too_few or (by != "dx" and counts["classes"] < 2):
        return dict.fromkeys(names, _MISSING), counts
    if by == "dx":
        hits = part.predicted == part.targets
        return {"sensitivity": (float(hits.mean()), *compute_mean_interval(hits, lesions))}, counts
    metrics, intervals = compute_metrics(part), compute_intervals(part, lesions)
    return {name: (getattr(metrics, name), *intervals[name]) for name in names}, counts


def _select(predictions: Predictions, inside: NDArray[np.bool_]) -> Predictions:
    return Predictions(
        probabilities=predictions.probabilities[inside],
        targets=predictions.targets[inside],
        image_ids=tuple(np.array(predictions.image_ids)[inside]),
    )
