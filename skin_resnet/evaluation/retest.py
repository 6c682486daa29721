"""Test-retest: whether a model says the same of two photos of one lesion, which no label is needed to ask."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.evaluation.formatting import format_class_table, format_score
from skin_resnet.evaluation.metrics import Floats, Predictions, compute_mean_interval
from skin_resnet.evaluation.subgroups import MIN_LESIONS

_FIGURES = {
    "agreement": "pairs of photos with the same prediction",
    "unanimous": "lesions whose photos all have the same prediction",
    "distance": "total variation distance of the probabilities",
    "mel_difference": "absolute difference of the probability of mel",
}
_COLUMNS = ["dx", "lesions", "images", "figure", "value", "low", "high", "others"]


@dataclass(frozen=True, kw_only=True)
class Retest:
    """How far a model's answers agree between photos of one lesion.

    Attributes:
        lesions: How many lesions have several photos.
        images: How many photos these have.
        table: A row per class ("all" first) and figure: dx, lesions, images, figure, value, low and high (a
            95 % interval by bootstrap over lesions), others (the same figure between each of these photos and
            those of other lesions of the class). NaN under `MIN_LESIONS` lesions; without `mel_difference` if
            there is no class mel; empty if no lesion has several photos.
    """

    lesions: int
    images: int
    table: pd.DataFrame

    def to_dict(self, split: str) -> dict[str, float]:
        """Name the figures over all classes as MLflow shows them, with `_low` and `_high`, without NaNs."""
        rows = self.table[(self.table.dx == "all") & self.table.value.notna()]
        ends = (("", "value"), ("_low", "low"), ("_high", "high"))
        return {
            f"{split}/retest_{row.figure}{end}": getattr(row, key)
            for row in rows.itertuples()
            for end, key in ends
        }


def compute_retest(predictions: Predictions, lesions: NDArray[np.str_], classes: tuple[str, ...]) -> Retest:
    """Compare the predictions of photos that show the same lesion; each lesion counts once.

    Args:
        predictions: Of N images.
        lesions: Which lesion each image shows, (N,).
        classes: The class order.
    """
    _, lesion_of, photos = np.unique(lesions, return_inverse=True, return_counts=True)
    several = np.flatnonzero(photos > 1)
    pairs = pd.DataFrame([_compare_lesion(predictions, lesion_of == number, classes) for number in several])
    records: list[tuple[object, ...]] = []
    if len(several):
        records = _summarise("all", pairs)
        for target in sorted(set(pairs.target)):
            records += _summarise(classes[target], pairs[pairs.target == target])
    table = pd.DataFrame(records, columns=_COLUMNS)
    return Retest(lesions=len(several), images=int(photos[several].sum()), table=table)


def _compare_lesion(
    predictions: Predictions, inside: NDArray[np.bool_], classes: tuple[str, ...]
) -> dict[str, float]:
    """Compare a lesion's photos with each other, and with all photos of other lesions of its class."""
    photos, target = predictions.probabilities[inside], predictions.targets[inside][0]
    others = predictions.probabilities[~inside & (predictions.targets == target)]
    pairs = np.triu_indices(len(photos), k=1)
    means = {name: values[pairs].mean() for name, values in _compare(photos, photos, classes).items()}
    if len(others):
        beside = _compare(photos, others, classes)
        means |= {f"{name}_others": values.mean() for name, values in beside.items()}
    return {
        "target": target,
        "photos": len(photos),
        "unanimous": float(means["agreement"] == 1),
        **means,
    }


def _compare(first: Floats, second: Floats, classes: tuple[str, ...]) -> dict[str, Floats]:
    """Compare each row of first (M, K) with each of second (N, K); each figure (M, N)."""
    differences = np.abs(first[:, None] - second[None])
    figures = {
        "agreement": (first.argmax(axis=1)[:, None] == second.argmax(axis=1)).astype(np.float64),
        "distance": differences.sum(axis=2) / 2,
    }
    if "mel" in classes:
        figures["mel_difference"] = differences[:, :, classes.index("mel")]
    return figures


def _summarise(dx: str, pairs: pd.DataFrame) -> list[tuple[object, ...]]:
    """Average over lesions; a row, in the order of the columns, for each figure."""
    records: list[tuple[object, ...]] = []
    for figure in [name for name in _FIGURES if name in pairs]:
        value = low = high = others = float("nan")
        if len(pairs) >= MIN_LESIONS:
            value = float(pairs[figure].mean())
            low, high = compute_mean_interval(pairs[figure], np.arange(len(pairs)))
            others = float(pairs[f"{figure}_others"].mean()) if f"{figure}_others" in pairs else others
        records.append((dx, len(pairs), int(pairs.photos.sum()), figure, value, low, high, others))
    return records


def format_retest(retest: Retest) -> str:
    """Write the comparison as Markdown that also reads well on a terminal."""
    if not retest.lesions:
        return "### Test-retest\n\nNo lesion has several photos here, so nothing can be said."
    head = f"### Test-retest: {retest.images} photos of the {retest.lesions} lesions that have several"
    if retest.lesions < MIN_LESIONS:
        return f"{head}\n\nUnder {MIN_LESIONS} lesions are too few to speak of."
    is_overall = retest.table.dx == "all"
    overall = retest.table[is_overall]
    figures = pd.DataFrame(
        {
            "mean over lesions": overall.figure.map(_FIGURES),
            "same lesion [95 % interval]": [
                format_score(row.value, (row.low, row.high)) for row in overall.itertuples()
            ],
            "others of its class": overall.others,
        }
    )
    of_class = retest.table[~is_overall].set_index(_COLUMNS[:4]).value.unstack(sort=False).reset_index()
    note = f"No number where a class has under {MIN_LESIONS} such lesions."
    return "\n\n".join([head, format_class_table(figures), format_class_table(of_class), note])
