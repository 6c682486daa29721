"""The figures of an evaluation: confusion, reliability, ROC, Grad-CAM and missed melanomas."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn import metrics as sk

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import Predictions, compute_confusion
from skin_resnet.evaluation.operating import find_positives, is_positive, score_positives
from skin_resnet.evaluation.plots import (
    FONT,
    QUIET,
    build_figure,
    draw_legend,
    literal,
    name_classes,
    shorten,
    style_axes,
)  # fmt: skip

_MOST_NUMBERS = 12  # classes of a confusion matrix whose cells still have room for numbers
_FEWEST_FOR_ROC = 5  # images of each kind; with fewer, the curve is a few steps
_COLUMNS = 6  # of the gallery


def plot_confusion(predictions: Predictions, classes: tuple[str, ...], title: str) -> Figure:
    """Plot images by true (rows) and predicted class (columns): their number, and share of the row.

    On the diagonal the share is the class's sensitivity. Above 12 classes there are colors only.
    """
    counts = compute_confusion(predictions)
    images = counts.sum(axis=1)
    shares = counts / np.maximum(images, 1)[:, None]
    height, caption = 7.4, f"{len(classes)} classes by number, in the order of per_class.csv"
    if len(classes) <= _MOST_NUMBERS:
        height = min(7.4, 0.72 * len(classes) + 2.2)
        caption = "images, and their share of the row: on the diagonal the sensitivity"
    figure = build_figure(height, f"{title}\nRows: true class; {caption}")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
    axes.set_xlabel("Predicted", fontsize=FONT + 1)
    axes.spines[:].set_visible(False)
    if len(classes) <= _MOST_NUMBERS:
        _write_cells(axes, counts)
        _name_cells(axes, classes, images)
    return figure


def _write_cells(axes: Axes, counts: NDArray[np.int64]) -> None:
    """Write count and share on the diagonal, in bold, and elsewhere where there are images."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": FONT}
    for row, images in enumerate(counts.sum(axis=1)):
        if not images:
            axes.text((len(counts) - 1) / 2, row, "no images", color=QUIET, **style)
            continue
        for column in sorted({row, *np.flatnonzero(counts[row]).tolist()}):
            share = counts[row, column] / images
            text = f"{counts[row, column]:,}\n" + ("<1%" if 0 < share < 0.005 else f"{share:.0%}")
            weight, color = "bold" if row == column else "normal", "white" if share > 0.6 else "black"
            axes.text(column, row, text, fontweight=weight, color=color, **style)


def _name_cells(axes: Axes, classes: tuple[str, ...], images: NDArray[np.int64]) -> None:
    codes, names = name_classes(classes, 24, full=False), name_classes(classes, 26, lines=2)
    axes.set_xticks(range(len(codes)), codes)
    axes.set_yticks(range(len(names)), [f"{name}, n = {n:,}" for name, n in zip(names, images, strict=True)])
    axes.tick_params(labelsize=FONT, length=0)
    if len(codes) * max(map(len, codes)) > 60:  # side by side they would touch
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")


def plot_reliability(assessment: Assessment, title: str, color: str) -> Figure:
    """Plot accuracy over confidence after temperature scaling, above the number of images in each bin."""
    figure = build_figure(6, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    before, after = (assessment.get(name).value for name in ("ece_before_temperature", "ece"))
    style_axes(upper, f"Calibration error (ECE) {after:.3f}, before temperature scaling {before:.3f}")
    after_scaling = assessment.reliability.tail(len(assessment.reliability) // 2)
    bins = after_scaling[after_scaling.images > 0]
    right = (bins.accuracy * bins.images).round().astype(int)
    # Not by bootstrap, which would be certain of a bin of one image.
    tests = [binomtest(*pair) for pair in zip(right, bins.images, strict=True)]
    ends = np.array([test.proportion_ci(method="wilson") for test in tests])
    errors = np.abs(bins.accuracy.to_numpy()[:, None] - ends).T
    label = "accuracy, with its 95 % interval (Wilson)"
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--", label="calibrated")
    upper.errorbar(bins.confidence, bins.accuracy, errors, fmt="o", color=color, markersize=7, label=label)
    upper.set(xlim=(0, 1), ylim=(-0.02, 1.03))
    upper.set_ylabel("Accuracy", fontsize=FONT)
    style_axes(lower, "")
    bars = lower.bar((bins.low + bins.high) / 2, bins.images, 0.98 * (bins.high - bins.low), color=QUIET)
    lower.bar_label(bars, fontsize=FONT - 1, padding=2, fmt="{:,.0f}")
    lower.set_ylim(0, 1.4 * bins.images.max())
    lower.set_ylabel("Images", fontsize=FONT)
    lower.set_xlabel("Confidence: the highest probability", fontsize=FONT)
    draw_legend(figure)
    return figure


def find_roc_groups(assessment: Assessment) -> dict[str, frozenset[int]]:
    """Return the positive classes of each ROC that there are enough positive and negative images for."""
    groups = find_positives(assessment.classes)
    positive = {name: is_positive(assessment.predictions, each).sum() for name, each in groups.items()}
    most = len(assessment.lesions) - _FEWEST_FOR_ROC
    return {name: each for name, each in groups.items() if _FEWEST_FOR_ROC <= positive[name] <= most}


def plot_roc(assessment: Assessment, title: str, color: str) -> Figure:
    """Plot the ROC of melanoma and of malignant, and what the thresholds chosen on val reach here."""
    figure = build_figure(5.8, title)
    groups = find_roc_groups(assessment)
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (name, positives) in zip(panels, groups.items(), strict=True):
        _draw_roc(axes, assessment, positives, name, color)
    return figure


def _draw_roc(axes: Axes, assessment: Assessment, positives: Collection[int], name: str, color: str) -> None:
    positive = is_positive(assessment.predictions, positives)
    scores = score_positives(assessment.predictions, positives)
    auc = sk.roc_auc_score(positive, scores)
    style_axes(axes, f"{name.capitalize()}: {positive.sum():,} images, AUC {auc:.3f}")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="1 - specificity", ylabel="Sensitivity")
    falls, rises, _ = sk.roc_curve(positive, scores, drop_intermediate=False)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--")
    axes.plot(falls, rises, color=color, linewidth=2)
    chosen = [point for point in assessment.calibration["thresholds"] if point.startswith(f"{name}_at_")]
    # Where both thresholds reach the same, the square lies in the circle.
    for marker, size, fill, point in zip("os", (10, 5), ("black", "white"), chosen, strict=False):
        y, x = (assessment.get(f"{point}_{metric}") for metric in ("sensitivity", "specificity"))
        goal = float(point.partition("_at_")[2])
        xerr, yerr = [[x.high - x.value], [x.value - x.low]], [[y.value - y.low], [y.high - y.value]]
        label = f"threshold for {goal:.0%} on val:\nsensitivity {y.value:.2f}, specificity {x.value:.2f}"
        style: dict[str, Any] = {"color": "black", "mfc": fill, "markersize": size, "elinewidth": 1}
        axes.errorbar(1 - x.value, y.value, yerr, xerr, marker, label=label, **style)
    if chosen:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), fontsize=FONT - 1, frameon=False)


def plot_gradcam(
    images: NDArray[np.uint8],
    heats: NDArray[np.float32],
    predictions: Predictions,
    rows: NDArray[np.int64],
    classes: tuple[str, ...],
    title: str,
) -> Figure:
    """Plot an image predicted right and one predicted wrong of each class, each beside its heat map.

    Args:
        images: The examples' pixels (M, S, S, 3).
        heats: From `compute_gradcam` for their predicted classes, (M, S, S).
        predictions: Of all N images among which the examples were chosen.
        rows: Which of these the examples are, (M,), from `choose_examples`.
    """
    shown = np.unique(predictions.targets[rows])
    names, labels = name_classes(classes, 26), name_classes(classes, 26, lines=2)
    verdicts = np.where(predictions.predicted == predictions.targets, "right", "wrong")
    if len(shown) < (occurring := len(np.unique(predictions.targets))):
        title += f"\n{len(shown)} of {occurring} classes: those with most images"
    figure = build_figure(1.9 * len(shown) + 0.7, title)
    for panels, target in zip(figure.subplots(len(shown), 2, squeeze=False), shown, strict=True):
        of_class = verdicts[predictions.targets == target]
        label = f"{labels[target]}\n{(of_class == 'right').sum():,} of {len(of_class):,} right"
        panels[0].set_ylabel(label, fontsize=FONT, rotation=0, ha="right", va="center")
        for axes, verdict in zip(panels, ("right", "wrong"), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_box_aspect(0.5)
            axes.spines[:].set_visible(False)
            examples = np.flatnonzero((predictions.targets[rows] == target) & (verdicts[rows] == verdict))
            if not len(examples):
                axes.text(0.5, 0.5, f"none {verdict}", ha="center", fontsize=FONT, color=QUIET)
            for example in examples[:1]:
                predicted = predictions.predicted[rows[example]]
                p = predictions.probabilities[rows[example], predicted]
                axes.imshow(overlay(images[example], heats[example]), aspect="auto")
                axes.set_title(f"{verdict}: {names[predicted]}, p {p:.2f}", fontsize=FONT)
    return figure


def overlay(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Put an image beside itself under its heat."""
    layer = color_heat(heat)
    opacity = layer[..., 3:] / 255
    blend = np.round(image * (1 - opacity) + layer[..., :3] * opacity).astype(np.uint8)
    gap = np.full((len(image), max(1, len(image) // 50), 3), 255, dtype=np.uint8)
    return np.hstack([image, gap, blend])


def color_heat(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return a heat map (S, S) as RGBA (S, S, 4) to lay over its image: the hotter, the more opaque."""
    return np.round(255 * np.dstack([colormaps["viridis"](heat)[..., :3], 0.6 * heat])).astype(np.uint8)


def plot_gallery(images: NDArray[np.uint8], captions: Sequence[str], title: str) -> Figure:
    """Show images (M, S, S, 3), one at least, in a grid, each under its caption."""
    rows, lines = -(-len(images) // _COLUMNS), captions[0].count("\n") + 1
    figure = build_figure(0.6 + (1.5 + 0.2 * lines) * rows, title)
    for axes in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image)
        short = "\n".join(shorten(line, 19) for line in caption.splitlines())
        axes.set_title(literal(short), fontsize=FONT - 1)
    return figure
