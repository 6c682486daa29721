"""Which classes are taken for which."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import Floats, Predictions, compute_confusion, compute_metrics
from skin_resnet.evaluation.plots.style import DPI, EMPTY, FONT, QUIET, WIDTH_INCH, build_layout


def plot_confusion(predictions: Predictions, classes: tuple[str, ...], title: str) -> Figure:
    """Plot images by true (rows) and predicted class (columns): how many, and which share of the row.

    On the diagonal the share is the class's sensitivity.
    """
    counts = compute_confusion(predictions)
    images = counts.sum(axis=1)
    shares = counts / np.maximum(images, 1)[:, None]
    width = max(WIDTH_INCH, 0.52 * len(classes) + 1.5)
    height = min(0.86 * width, 0.85 * len(classes) + 1.8)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=build_layout())
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    _write_cells(axes, counts, shares)
    _name_classes(axes, classes, images)
    score = compute_metrics(predictions).balanced_accuracy
    heading = f"{title}: {images.sum():,} images, balanced accuracy {score:.3f}"
    axes.set_title(heading, fontsize=FONT + 2, loc="left", pad=26)
    axes.annotate(
        "Images, and their share of the row; on the diagonal this is the sensitivity.",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=FONT,
        color=QUIET,
    )
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


def _name_classes(axes: Axes, classes: tuple[str, ...], images: NDArray[np.int64]) -> None:
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in classes]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), [f"{name} ({n:,})" for name, n in zip(names, images, strict=True)])
    axes.tick_params(labelsize=FONT, length=0)
    if len(names) * max(map(len, names)) > 60:  # side by side they would touch
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("Predicted", fontsize=FONT + 1)
    axes.set_ylabel("True (images)", fontsize=FONT + 1)
    axes.spines[:].set_visible(False)
