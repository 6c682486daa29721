"""What thresholds catch, what referral gains, and what was missed."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from sklearn import metrics as sk

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.operating import OperatingResult, Referral, is_positive, score_positives
from skin_resnet.evaluation.plots.style import (
    BLUE,
    DPI,
    FONT,
    ORANGE,
    QUIET,
    WIDTH_INCH,
    build_layout,
    style_axes,
)

_COLUMNS, _MOST = 6, 24


def plot_roc(
    predictions: Predictions, results: Mapping[str, Sequence[OperatingResult]], title: str
) -> Figure:
    """Plot a ROC per group, with what the thresholds chosen on val reach here and their 95 % intervals.

    Args:
        predictions: Of the images that the results are of.
        results: Of one or two groups; without any, or without images of both kinds, there is no curve.
        title: The beginning of the figure's title.
    """
    figure = Figure(figsize=(WIDTH_INCH, 4.8), dpi=DPI, layout=build_layout())
    figure.suptitle(f"{title}: {len(predictions.targets):,} images", fontsize=FONT + 2)
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (name, group), colour in zip(panels, results.items(), (ORANGE, BLUE), strict=False):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_xlabel("1 - specificity", fontsize=FONT)
        axes.set_ylabel("Sensitivity", fontsize=FONT)
        _draw_roc(axes, predictions, name, group, colour)
    return figure


def _draw_roc(
    axes: Axes, predictions: Predictions, name: str, group: Sequence[OperatingResult], colour: str
) -> None:
    if not group or not group[0].positive_images or not group[0].negative_images:
        style_axes(axes, name.capitalize())
        reason = "no threshold: val has no such image" if not group else "no images of both kinds"
        axes.text(0.5, 0.5, reason, ha="center", fontsize=FONT, color=QUIET)
        return
    positive = is_positive(predictions, group[0].point.positives)
    scores = score_positives(predictions, group[0].point.positives)
    auc = sk.roc_auc_score(positive, scores)
    style_axes(axes, f"{name.capitalize()}: {positive.sum():,} images, AUC {auc:.3f}")
    falls, rises, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    axes.plot(falls, rises, color=colour, linewidth=2)
    for marker, result in zip("os^D", group, strict=False):
        x, y = 1 - result.specificity, result.sensitivity
        low, high = result.specificity_interval
        axes.plot([1 - high, 1 - low], [y, y], color="black", linewidth=1)
        axes.plot([x, x], result.sensitivity_interval, color="black", linewidth=1)
        label = (
            f"{result.point.goal:.0%} on val: sensitivity {y:.2f},\nspecificity {result.specificity:.2f} here"
        )
        axes.plot(x, y, marker, color=colour, markeredgecolor="black", markersize=9, label=label)
    axes.legend(loc="lower right", fontsize=FONT - 1, frameon=False)


def plot_referral(referral: Referral, title: str) -> Figure:
    """Plot the scores of the images that are kept over the share of the least certain that is referred."""
    images = len(referral.accuracy)
    figure = Figure(figsize=(WIDTH_INCH, 4.5), dpi=DPI, layout=build_layout())
    axes = figure.add_subplot()
    style_axes(
        axes, f"{title}: what is right among the rest when the least certain of {images:,} are referred"
    )
    axes.plot(
        referral.referred_fraction,
        referral.accuracy,
        color=BLUE,
        linewidth=1,
        label=f"accuracy (area {referral.area:.3f})",
    )
    axes.plot(
        referral.referred_fraction,
        referral.balanced_accuracy,
        color=ORANGE,
        linewidth=2,
        label="balanced accuracy, while there are images of all classes",
    )
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("Images referred", fontsize=FONT)
    axes.legend(loc="lower right", fontsize=FONT, frameon=False)
    return figure


def plot_gallery(images: NDArray[np.uint8], captions: Sequence[str], title: str) -> Figure:
    """Show the first 24 images in a grid, each under its caption.

    Args:
        images: uint8 (M, S, S, 3).
        captions: One per image, of as many lines as the others.
        title: What they are; how many is added.
    """
    shown = min(len(images), _MOST)
    rows = -(-shown // _COLUMNS)
    lines = captions[0].count("\n") + 1 if shown else 0
    figure = Figure(figsize=(WIDTH_INCH, 0.6 + (1.5 + 0.2 * lines) * rows), dpi=DPI, layout=build_layout())
    count = f"{shown} of {len(images):,}" if len(images) > shown else f"{shown or 'none'}"
    figure.suptitle(f"{title}: {count}", fontsize=FONT + 2)
    if not shown:
        return figure
    for axes in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images[:shown], captions, strict=False):
        axes.imshow(image)
        short = [f"{line[:18]}…" if len(line) > 19 else line for line in caption.splitlines()]
        axes.set_title("\n".join(short), fontsize=FONT - 2)
    return figure
