"""The figures of an evaluation: confusion, reliability, ROC, Grad-CAM and missed melanomas."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn import metrics as sk

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import Predictions, compute_confusion, compute_metrics
from skin_resnet.evaluation.operating import find_positives, is_positive, score_positives
from skin_resnet.evaluation.plots import (
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

_MOST_NUMBERS = 25  # classes of a confusion matrix whose cells still have room for numbers
_COLUMNS = 6  # of the gallery


def plot_confusion(predictions: Predictions, classes: tuple[str, ...], title: str) -> Figure:
    """Plot images by true (rows) and predicted class (columns): their number, and share of the row.

    On the diagonal the share is the class's sensitivity. Above 25 classes there are colors only.
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
        _write_cells(axes, counts)
        _name_cells(axes, classes, images)
    axes.set_xlabel("Predicted", fontsize=FONT + 1)
    axes.set_ylabel("True (images)", fontsize=FONT + 1)
    axes.spines[:].set_visible(False)
    score = compute_metrics(predictions).balanced_accuracy
    heading = f"{title}: {images.sum():,} images, balanced accuracy {score:.3f}"
    caption = "Images, and their share of the row; on the diagonal this is the sensitivity."
    axes.set_title(literal(f"{heading}\n{caption}"), fontsize=FONT + 1, loc="left")
    return figure


def _write_cells(axes: Axes, counts: NDArray[np.int64]) -> None:
    """Write count and share where there are images; the diagonal is bold."""
    style: dict[str, Any] = {
        "ha": "center",
        "va": "center",
        "fontsize": FONT if len(counts) <= 10 else FONT - 2,
    }
    for row, images in enumerate(counts.sum(axis=1)):
        if not images:
            axes.text((len(counts) - 1) / 2, row, "no images", color=QUIET, **style)
        for column in np.flatnonzero(counts[row]).tolist():
            share = counts[row, column] / images
            text = f"{counts[row, column]:,}\n" + (f"{share:.0%}" if share >= 0.005 else "<1%")
            weight, color = "bold" if row == column else "normal", "white" if share > 0.6 else "black"
            axes.text(column, row, text, fontweight=weight, color=color, **style)


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
    figure = build_figure(6, f"{title}: {len(assessment.lesions):,} images")
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    half = len(assessment.reliability) // 2
    parts = assessment.reliability.iloc[:half], assessment.reliability.iloc[half:]
    heads = ("Before temperature scaling", f"Temperature {assessment.calibration['temperature']:.2f}")
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
    upper.bar(filled.low, filled.accuracy, width, align="edge", color=BLUE, edgecolor="white")
    # The gap is drawn where the images are, which is rarely the middle of a bin.
    upper.vlines(filled.confidence, filled.accuracy, filled.confidence, color=ORANGE, linewidth=2)
    upper.plot(filled.confidence, filled.confidence, "o", color=ORANGE, markersize=5)
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    bars = lower.bar(filled.low, filled.images, width, align="edge", color=QUIET, edgecolor="white")
    lower.bar_label(bars, fontsize=FONT - 4, padding=2)
    lower.set_ylim(0, 1.25 * bins.images.max())
    lower.set_xlabel("Confidence (highest probability)", fontsize=FONT)


def plot_roc(assessment: Assessment, title: str) -> Figure:
    """Plot a ROC for melanoma and for malignant, and what the thresholds chosen on val reach here."""
    figure = build_figure(4.8, f"{title}: {len(assessment.lesions):,} images")
    groups = find_positives(assessment.classes)
    for axes, (name, positives) in zip(figure.subplots(1, 2), groups.items(), strict=True):
        _draw_roc(axes, assessment, positives, name)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="1 - specificity", ylabel="Sensitivity")
    return figure


def _draw_roc(axes: Axes, assessment: Assessment, positives: Collection[int], name: str) -> None:
    positive = is_positive(assessment.predictions, positives)
    if positive.all() or not positive.any():
        style_axes(axes, name.capitalize())
        axes.text(0.5, 0.5, "needs positive and negative images", ha="center", fontsize=FONT, color=QUIET)
        return
    scores = score_positives(assessment.predictions, positives)
    auc = sk.roc_auc_score(positive, scores)
    style_axes(axes, f"{name.capitalize()}: {positive.sum():,} images, AUC {auc:.3f}")
    falls, rises, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    axes.plot(falls, rises, color=BLUE, linewidth=2)
    chosen = [point for point in assessment.calibration["thresholds"] if point.startswith(f"{name}_at_")]
    for marker, point in zip("os", chosen, strict=False):
        y, x = (assessment.get(f"{point}_{metric}") for metric in ("sensitivity", "specificity"))
        goal = float(point.partition("_at_")[2])
        axes.errorbar(
            1 - x.value,
            y.value,
            xerr=[[x.high - x.value], [x.value - x.low]],
            yerr=[[y.value - y.low], [y.high - y.value]],
            fmt=marker,
            color=ORANGE,
            label=f"{goal:.0%} on val: sensitivity {y.value:.2f},\nspecificity {x.value:.2f} here",
        )
    if chosen:
        axes.legend(loc="lower right", fontsize=FONT - 1, frameon=False)


def plot_gradcam(
    images: NDArray[np.uint8],
    heats: NDArray[np.float32],
    predictions: Predictions,
    rows: NDArray[np.int64],
    classes: tuple[str, ...],
) -> Figure:
    """Plot examples, a row per class, the right predictions first.

    Args:
        images: The examples' pixels (M, S, S, 3).
        heats: From `compute_gradcam` for their predicted classes, (M, S, S).
        predictions: Of all N images among which the examples were chosen.
        rows: Which of these the examples are, (M,), from `choose_examples`.
        classes: The class order.
    """
    shown, counts = np.unique(predictions.targets[rows], return_counts=True)
    columns = counts.max()
    names = name_classes(classes, max(5, 46 // columns - 6))
    cells = -(-images.shape[1] // 32)  # the last stage's features, from which the map is computed
    heading = (
        f"Images, and the regions that support the predicted class (Grad-CAM, {cells} x {cells})\n"
        "true → predicted, with its probability"
    )
    height = (WIDTH_INCH - 0.6) / columns / 2 + 0.3
    figure = build_figure(height * len(shown) + 0.8, heading)
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], facecolor=EMPTY)
        axes.set_box_aspect(0.5)
        axes.spines[:].set_visible(False)
    is_right = predictions.predicted == predictions.targets
    for panels, target in zip(grid, shown, strict=True):
        of_class = is_right[predictions.targets == target]
        panels[0].set_ylabel(f"{names[target]}\n{of_class.sum():,} of {len(of_class):,} right", fontsize=FONT)
        examples = np.flatnonzero(predictions.targets[rows] == target)
        for axes, example in zip(panels, examples, strict=False):
            predicted = predictions.predicted[rows[example]]
            p = predictions.probabilities[rows[example], predicted]
            axes.imshow(_overlay(images[example], heats[example]))
            axes.set_title(f"{names[target]} → {names[predicted]}, p {p:.2f}", fontsize=FONT)
    return figure


def _overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Put an image beside itself under its heat: the hotter, the less of the image shines through."""
    opacity = 0.6 * heat[..., None]
    colors = 255 * colormaps["viridis"](heat)[..., :3]
    blend = np.round(image * (1 - opacity) + colors * opacity).astype(np.uint8)
    gap = np.full((len(image), max(1, len(image) // 50), 3), 255, dtype=np.uint8)
    return np.hstack([image, gap, blend])


def plot_gallery(images: NDArray[np.uint8], captions: Sequence[str], title: str) -> Figure:
    """Show images (M, S, S, 3) in a grid with captions; the title counts captions without an image, too."""
    shown, total = len(images), len(captions)
    rows = -(-shown // _COLUMNS)
    lines = captions[0].count("\n") + 1 if shown else 0
    count = f"{shown} of {total:,}" if total > shown else f"{shown or 'none'}"
    figure = build_figure(0.6 + (1.5 + 0.2 * lines) * rows, f"{title}: {count}")
    if not shown:
        return figure
    for axes in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image)
        short = "\n".join(shorten(line, 19) for line in caption.splitlines())
        axes.set_title(literal(short), fontsize=FONT - 2)
    return figure
