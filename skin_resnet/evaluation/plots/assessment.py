"""The figures of an evaluation: confusion, reliability, ROC and subgroups."""

from collections.abc import Collection

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from sklearn import metrics as sk

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.formatting import spell_metric
from skin_resnet.evaluation.metrics import Floats, Predictions, compute_confusion, compute_metrics
from skin_resnet.evaluation.operating import find_positives, is_positive, score_positives
from skin_resnet.evaluation.plots.style import (
    BLUE,
    EMPTY,
    FONT,
    ORANGE,
    QUIET,
    WIDTH_INCH,
    build_figure,
    literal,
    name_classes,
    shorten,
    style_axes,
)

_FEW = 10  # images in a reliability bin: the accuracy of fewer means little
_MOST_NUMBERS = 25  # classes of a confusion matrix whose cells still have room for numbers
_MOST_ROWS = 20  # subgroups of one attribute: those with most images
_SUBGROUPS = {
    "sex": "Sex",
    "age": "Age in years",
    "localization": "Localization",
    "dx": "Sensitivity by diagnosis",
}


def plot_confusion(predictions: Predictions, classes: tuple[str, ...], title: str) -> Figure:
    """Plot images by true (rows) and predicted class (columns): their number, and share of the row.

    On the diagonal the share is the class's sensitivity. Above 25 classes there are colours only.
    """
    counts = compute_confusion(predictions)
    images = counts.sum(axis=1)
    shares = counts / np.maximum(images, 1)[:, None]
    shown = min(len(classes), _MOST_NUMBERS)
    width = max(WIDTH_INCH, 0.52 * shown + 1.5)
    figure = build_figure(min(0.86 * width, 0.85 * shown + 1.8), width=width)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    if len(classes) <= _MOST_NUMBERS:
        _write_cells(axes, counts, shares)
        _name_cells(axes, classes, images)
    axes.set_xlabel("Predicted", fontsize=FONT + 1)
    axes.set_ylabel("True (images)", fontsize=FONT + 1)
    axes.spines[:].set_visible(False)
    score = compute_metrics(predictions).balanced_accuracy
    heading = f"{title}: {images.sum():,} images, balanced accuracy {score:.3f}"
    caption = "Images, and their share of the row; on the diagonal this is the sensitivity."
    axes.set_title(literal(f"{heading}\n{caption}"), fontsize=FONT + 1, loc="left")
    return figure


def _write_cells(axes: Axes, counts: NDArray[np.int64], shares: Floats) -> None:
    """Write count and share where there are images, frame the diagonal, grey out rows without images."""
    size = len(counts)
    font = FONT if size <= 10 else FONT - 2
    for row in range(size):
        if counts[row].any():
            frame = Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=QUIET, zorder=2)
        else:
            frame = Rectangle((-0.5, row - 0.5), size, 1, facecolor=EMPTY, edgecolor="white")
            axes.text((size - 1) / 2, row, "no images", ha="center", va="center", fontsize=font, color=QUIET)
        axes.add_patch(frame)
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        axes.text(
            column,
            row,
            f"{counts[row, column]:,}\n" + (f"{share:.0%}" if share >= 0.005 else "<1%"),
            ha="center",
            va="center",
            fontsize=font,
            fontweight="bold" if row == column else "normal",
            color="white" if share > 0.6 else "black",
        )


def _name_cells(axes: Axes, classes: tuple[str, ...], images: NDArray[np.int64]) -> None:
    names = name_classes(classes)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), [f"{name} ({n:,})" for name, n in zip(names, images, strict=True)])
    axes.tick_params(labelsize=FONT, length=0)
    if len(names) * max(map(len, names)) > 60:  # side by side they would touch
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def plot_reliability(assessment: Assessment, title: str) -> Figure:
    """Plot accuracy over confidence, before and after temperature, above the number of images in each bin."""
    images = f"{len(assessment.lesions):,} images"
    figure = build_figure(6, f"{title}: {images} (pale: fewer than {_FEW} in a bin)")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    half = len(assessment.reliability) // 2
    parts = assessment.reliability.iloc[:half], assessment.reliability.iloc[half:]
    heads = ("As predicted", f"Temperature {assessment.calibration.temperature:.2f}")
    names = ("ece_before_temperature", "ece")
    for (upper, lower), head, bins, name in zip(panels.T, heads, parts, names, strict=True):
        style_axes(upper, f"{head}: ECE {assessment.get(name).value:.3f}")
        style_axes(lower, "")
        _draw_bins(upper, lower, bins)
    panels[0, 0].set_ylabel("Bars: accuracy, dots: mean confidence", fontsize=FONT)
    panels[1, 0].set_ylabel("Images", fontsize=FONT)
    return figure


def _draw_bins(upper: Axes, lower: Axes, bins: pd.DataFrame) -> None:
    width = 1 / len(bins)
    filled = bins[bins.images > 0]
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--", zorder=1)
    for is_few, rows in filled.groupby(filled.images < _FEW):
        shade = 0.3 if is_few else 1
        upper.bar(rows.low, rows.accuracy, width, align="edge", color=BLUE, edgecolor="white", alpha=shade)
        # The gap is drawn where the images are, which is rarely the middle of a bin.
        upper.vlines(rows.confidence, rows.accuracy, rows.confidence, color=ORANGE, linewidth=2, alpha=shade)
        upper.plot(rows.confidence, rows.confidence, "o", color=ORANGE, markersize=5, alpha=shade)
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    bars = lower.bar(filled.low, filled.images, width, align="edge", color=QUIET, edgecolor="white")
    lower.bar_label(bars, fontsize=FONT - 4, padding=2)
    lower.set_ylim(0, 1.25 * bins.images.max())
    lower.set_xlabel("Confidence (highest probability)", fontsize=FONT)


def plot_roc(assessment: Assessment, title: str) -> Figure:
    """Plot a ROC for melanoma and for malignant, and what the thresholds chosen on val reach here."""
    figure = build_figure(4.8, f"{title}: {len(assessment.lesions):,} images")
    groups = find_positives(assessment.classes)
    for axes, (name, positives), colour in zip(
        figure.subplots(1, 2), groups.items(), (ORANGE, BLUE), strict=True
    ):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("1 - specificity", fontsize=FONT)
        axes.set_ylabel("Sensitivity", fontsize=FONT)
        _draw_roc(axes, assessment, positives, name, colour)
    return figure


def _draw_roc(axes: Axes, assessment: Assessment, positives: Collection[int], name: str, colour: str) -> None:
    positive = is_positive(assessment.predictions, positives)
    if positive.all() or not positive.any():
        style_axes(axes, name.capitalize())
        axes.text(0.5, 0.5, "no images of both kinds", ha="center", fontsize=FONT, color=QUIET)
        return
    scores = score_positives(assessment.predictions, positives)
    auc = sk.roc_auc_score(positive, scores)
    style_axes(axes, f"{name.capitalize()}: {positive.sum():,} images, AUC {auc:.3f}")
    falls, rises, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    axes.plot(falls, rises, color=colour, linewidth=2)
    chosen = [point for point in assessment.calibration.thresholds if point.startswith(f"{name}_at_")]
    for marker, point in zip("os", chosen, strict=False):
        y, x = (assessment.get(f"{point}_{metric}") for metric in ("sensitivity", "specificity"))
        axes.plot([1 - x.high, 1 - x.low], [y.value, y.value], color="black", linewidth=1)
        axes.plot([1 - x.value, 1 - x.value], [y.low, y.high], color="black", linewidth=1)
        goal = float(point.partition("_at_")[2])
        label = f"{goal:.0%} on val: sensitivity {y.value:.2f},\nspecificity {x.value:.2f} here"
        axes.plot(
            1 - x.value, y.value, marker, color=colour, markeredgecolor="black", markersize=9, label=label
        )
    if chosen:
        axes.legend(loc="lower right", fontsize=FONT - 1, frameon=False)


def plot_subgroups(assessment: Assessment, title: str, metric: str = "balanced_accuracy") -> Figure:
    """Plot one headline metric by subgroup, with intervals; its value over all images is a line.

    Balanced accuracy, the mean of the sensitivities, has these below it, by diagnosis.
    """
    shown = [metric, "sensitivity"] if metric == "balanced_accuracy" else [metric]
    rows = assessment.subgroups[assessment.subgroups.metric.isin(shown)]
    parts = {by: _limit_rows(rows[rows["by"] == by]) for by in _SUBGROUPS if (rows["by"] == by).any()}
    heights = [len(part) + 1.2 for part in parts.values()]
    overall = assessment.get(metric).value
    counts = f"{len(assessment.lesions):,} images of {assessment.get('lesions').value:,.0f} lesions"
    heading = f"{title}: {spell_metric(metric)} {overall:.3f} (line), {counts}"
    figure = build_figure(0.27 * sum(heights) + 1.1, heading)
    if not parts:
        return figure
    panels = figure.subplots(len(parts), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    panels[0].set_xlim(np.floor(np.nanmin([0.9, overall, *rows.low]) * 10) / 10, 1.01)
    for axes, (by, part) in zip(panels, parts.items(), strict=True):
        style_axes(axes, _SUBGROUPS[by])
        axes.axvline(overall, color=QUIET, linewidth=1.2, zorder=1)
        _draw_rows(axes, part)
    panels[0].set_title("images (lesions), classes", fontsize=FONT - 1, loc="right", color=QUIET)
    panels[-1].set_xlabel("Value with its 95 % interval by bootstrap over lesions", fontsize=FONT)
    return figure


def _limit_rows(part: pd.DataFrame) -> pd.DataFrame:
    return part.loc[part.images.nlargest(_MOST_ROWS, keep="first").index.sort_values()]


def _draw_rows(axes: Axes, part: pd.DataFrame) -> None:
    """Draw a row per subgroup, the first on top; grey and without a number where it is too small."""
    places = list(range(len(part)))
    axes.hlines(places, part.low, part.high, color=BLUE, linewidth=2)
    axes.plot(part.value, places, "o", color=BLUE, markersize=7, markeredgecolor="white")
    axes.set_yticks(places, [literal(shorten(name, 24)) for name in part.subgroup])
    axes.set_ylim(len(part) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    beside = axes.get_yaxis_transform()
    for place, label, row in zip(places, axes.get_yticklabels(), part.itertuples(), strict=True):
        is_small = np.isnan(row.value)
        colour = QUIET if is_small else "black"
        label.set_color(colour)
        counts = f"{row.images:,} ({row.lesions:,})" + ("" if row.by == "dx" else f", {row.classes}")
        axes.text(1.01, place, counts, transform=beside, va="center", fontsize=FONT - 1, color=colour)
        if is_small:
            axes.text(
                0.01, place, "too small", transform=beside, va="center", fontsize=FONT - 1, color=colour
            )
