"""Metrics by sex, age, localization and diagnosis, and agreement between several photos of one lesion."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import HEADLINES, Predictions, compute_mean_interval, compute_scores

MIN_IMAGES, MIN_LESIONS = 30, 20  # with fewer, an interval is too wide, and too optimistic, to be of use
_AGE_BANDS = {"under 30": 0, "30-44": 30, "45-59": 45, "60-74": 60, "75 and over": 75}  # first year of each
_UNKNOWN = "unknown"


def compute_subgroups(
    predictions: Predictions, table: pd.DataFrame, lesions: NDArray[np.str_]
) -> pd.DataFrame:
    """Compute the headline metrics by sex, age band and localization, and the sensitivity by diagnosis.

    Balanced accuracy and macro AUC average over the classes that occur in a subgroup: where these differ,
    so does the task, and two subgroups compare only roughly.

    Args:
        predictions: Of N images.
        table: Rows from `extract` of these images, in any order; others are ignored.
        lesions: Which lesion each image of `predictions` shows, (N,).

    Returns:
        A row per subgroup and metric: by ("sex", "age", "localization" or "dx"), subgroup, images, lesions,
        classes (how many occur), metric, value, low and high (95 % interval). The last three are NaN under
        `MIN_IMAGES` or `MIN_LESIONS`, or with one class if not by dx.
    """
    rows = table.set_index("image_id").loc[list(predictions.image_ids)]
    records = [
        {"by": by, "subgroup": str(name), **record}
        for by, names in _list_partitions(rows)
        for name in names.categories[np.unique(names.codes)]
        for record in _measure(by, predictions.select(np.asarray(names == name)), lesions[names == name])
    ]
    return pd.DataFrame(records)


def _list_partitions(rows: pd.DataFrame) -> Iterator[tuple[str, pd.Categorical]]:
    """Yield each image's subgroup by attribute; attributes that are unknown for all images are left out."""
    ages = pd.cut(rows.age, [*_AGE_BANDS.values(), np.inf], right=False, labels=list(_AGE_BANDS))
    sites = rows.localization.value_counts().index.drop(_UNKNOWN, errors="ignore")
    for by, names in (
        ("sex", pd.Categorical(rows.sex)),
        ("age", pd.Categorical(ages.cat.add_categories(_UNKNOWN).fillna(_UNKNOWN))),
        ("localization", pd.Categorical(rows.localization, categories=[*sites, _UNKNOWN])),
        ("dx", pd.Categorical(rows.dx)),
    ):
        if (names != _UNKNOWN).any():
            yield by, names


def _measure(by: str, part: Predictions, lesions: NDArray[np.str_]) -> Iterator[dict[str, Any]]:
    """Yield the counts of a subgroup with each of its metrics."""
    counts = {
        "images": len(part.targets),
        "lesions": len(np.unique(lesions)),
        "classes": len(np.unique(part.targets)),
    }
    is_small = counts["images"] < MIN_IMAGES or counts["lesions"] < MIN_LESIONS
    is_unknown = is_small or (by != "dx" and counts["classes"] < 2)
    scores = {} if is_unknown else compute_scores(part, lesions)
    # The accuracy on one class is its sensitivity.
    names = {"accuracy": "sensitivity"} if by == "dx" else {name: name for name in HEADLINES}
    for name, metric in names.items():
        value, low, high = scores.get(name, (np.nan, np.nan, np.nan))
        yield {**counts, "metric": metric, "value": value, "low": low, "high": high}


def compute_retest(
    predictions: Predictions, lesions: NDArray[np.str_], classes: tuple[str, ...]
) -> pd.DataFrame:
    """Compare the predictions of photos that show the same lesion (test-retest); each lesion counts once.

    Metrics are `agreement` (share of pairs of photos with the same prediction), `unanimous` (share of lesions
    whose photos all have the same prediction), `distance` (total variation of the probabilities) and, where
    there is a class mel, `mel_difference` (absolute difference of its probability).

    Returns:
        A row per class ("all" first) and metric: dx, lesions and images (of the lesions with several photos),
        metric, value, low and high (95 % interval by bootstrap over lesions), others (the same metric between
        each of these photos and those of other lesions of the class). NaN under `MIN_LESIONS` lesions; empty
        if no lesion has several photos.
    """
    names, photos = np.unique(lesions, return_counts=True)
    several = names[photos > 1]
    pairs = pd.DataFrame([_compare_lesion(predictions, lesions == lesion, classes) for lesion in several])
    parts = {"all": pairs}
    if len(several):
        parts |= {classes[int(target)]: part for target, part in pairs.groupby("target")}
    records = [row for dx, part in parts.items() for row in _summarize(dx, part)]
    columns = ["dx", "lesions", "images", "metric", "value", "low", "high", "others"]
    return pd.DataFrame(records, columns=columns)


def _compare_lesion(
    predictions: Predictions, inside: NDArray[np.bool_], classes: tuple[str, ...]
) -> dict[str, float]:
    """Compare a lesion's photos with each other, and with all photos of other lesions of its class."""
    photos, target = np.flatnonzero(inside), predictions.targets[inside][0]
    others = np.flatnonzero(~inside & (predictions.targets == target))
    pairs, beside = np.triu_indices(len(photos), k=1), _compare(predictions, photos, photos, classes)
    means = {name: values[pairs].mean() for name, values in beside.items()}
    row = {"target": target, "photos": len(photos), **means, "unanimous": float(means["agreement"] == 1)}
    if len(others):
        beside = _compare(predictions, photos, others, classes)
        row |= {f"{name}_others": values.mean() for name, values in beside.items()}
    return row


def _compare(
    predictions: Predictions, first: NDArray[np.int64], second: NDArray[np.int64], classes: tuple[str, ...]
) -> dict[str, NDArray[np.float64]]:
    """Compare the images of rows first, (M,), with those of rows second, (N,); each metric (M, N)."""
    probabilities, predicted = predictions.probabilities, predictions.predicted
    differences = np.abs(probabilities[first][:, None] - probabilities[second])
    metrics = {
        "agreement": (predicted[first][:, None] == predicted[second]).astype(np.float64),
        "distance": differences.sum(axis=2) / 2,
    }
    if "mel" in classes:
        metrics["mel_difference"] = differences[:, :, classes.index("mel")]
    return metrics


def _summarize(dx: str, pairs: pd.DataFrame) -> Iterator[dict[str, Any]]:
    for metric in ("agreement", "unanimous", "distance", "mel_difference"):
        if metric not in pairs:
            continue
        row = {"dx": dx, "lesions": len(pairs), "images": int(pairs.photos.sum()), "metric": metric}
        if len(pairs) >= MIN_LESIONS:
            low, high = compute_mean_interval(pairs[metric], np.arange(len(pairs)))
            row |= {"value": float(pairs[metric].mean()), "low": low, "high": high}
            if f"{metric}_others" in pairs:
                row["others"] = float(pairs[f"{metric}_others"].mean())
        yield row
