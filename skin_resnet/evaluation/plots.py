"""Every figure, drawn for the width at which the MLflow UI shows an artifact: about 900 pixels.

They are built without pyplot and rcParams: nothing stays in memory, and no backend is chosen for the caller.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import (
    EpochResult,
    Floats,
    Predictions,
    compute_confusion,
    compute_metrics,
)

# Okabe, Ito, "Color Universal Design" (2008): two hues that every kind of colour vision tells apart.
_COLOURS = {"train": "#0072B2", "val": "#D55E00"}
_QUIET, _GRID, _EMPTY = "#666666", "#E6E6E6", "#F2F2F2"
_WIDTH_INCH, _DPI, _FONT = 9.0, 100, 11


def plot_curves(history: Sequence[EpochResult], best_epoch: int) -> Figure:
    """Plot loss, balanced accuracy (thin: accuracy) and learning rate over the epochs; mark the best one."""
    best = next(result for result in history if result.epoch == best_epoch)
    first, last = history[0].epoch, history[-1].epoch
    figure = Figure(figsize=(_WIDTH_INCH, 8), dpi=_DPI, layout=_layout())
    figure.suptitle(
        f"Best epoch {best_epoch} of {last}: balanced accuracy {best.val.balanced_accuracy:.3f} on val, "
        f"{best.train.balanced_accuracy:.3f} on train",
        fontsize=_FONT + 2,
    )
    loss, score, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    for axes, title in ((loss, "Loss"), (score, "Balanced accuracy (thin: accuracy)"), (lr, "Learning rate")):
        _style(axes, title)
        axes.axvline(best_epoch, color=_QUIET, linewidth=1, linestyle=":", zorder=1)
    lr.set_xlim(first - 0.5, last + 0.5)
    lr.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lr.set_xlabel("Epoch", fontsize=_FONT)
    _limit_loss(loss, history)
    score.set_ylim(0, 1)
    _label_ends(loss, _draw_lines(loss, history, "loss"))
    thin = _draw_lines(score, history, "accuracy")
    _label_ends(score, thin | _draw_lines(score, history, "balanced_accuracy"))
    _mark_best(loss, best_epoch, best.val.loss, best.train.loss)
    _mark_best(score, best_epoch, best.val.balanced_accuracy, best.train.balanced_accuracy)
    _plot_lr(lr, history)
    return figure


def _layout() -> ConstrainedLayoutEngine:
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=_FONT + 1, loc="left")
    axes.tick_params(labelsize=_FONT - 1, color=_GRID)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_QUIET)


def _limit_loss(axes: Axes, history: Sequence[EpochResult]) -> None:
    """Start at 0 and let no wild epoch press the rest flat: say how high it went instead."""
    losses = np.array([(result.train.loss, result.val.loss) for result in history])
    top = 1.2 * losses[losses <= 2.5 * np.quantile(losses, 0.9)].max(initial=1e-3)
    axes.set_ylim(0, top)
    if losses.max() > top:
        row, column = divmod(int(losses.argmax()), 2)
        split = ("train", "val")[column]
        note = f"off this axis: {split} loss {losses[row, column]:.3g} in epoch {history[row].epoch}"
        axes.set_title(note, fontsize=_FONT, loc="right", color=_COLOURS[split])


def _draw_lines(axes: Axes, history: Sequence[EpochResult], name: str) -> dict[str, tuple[float, str]]:
    """Draw a figure of both splits; give the name, last value and colour of each line."""
    epochs = [result.epoch for result in history]
    lines = {split: [getattr(getattr(result, split), name) for result in history] for split in _COLOURS}
    thin = name == "accuracy"
    for split, values in lines.items():
        axes.plot(
            epochs,
            values,
            color=_COLOURS[split],
            linewidth=0.9 if thin else 2,
            marker=_marker(history),
            markersize=2 if thin else 4,
        )
    if not thin:
        axes.fill_between(epochs, lines["train"], lines["val"], color=_QUIET, alpha=0.12, linewidth=0)
    suffix = " accuracy" if thin else ""
    return {split + suffix: (values[-1], _COLOURS[split]) for split, values in lines.items()}


def _marker(history: Sequence[EpochResult]) -> str:
    # Dots tell where a value was measured; on a long run they only thicken the line.
    return "o" if len(history) <= 25 else ""


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Name each line where it ends; move the names of lines that end close together apart."""
    bottom, top = axes.get_ylim()
    upwards = sorted(ends, key=lambda name: ends[name][0])
    wanted = np.array([(ends[name][0] - bottom) / (top - bottom) for name in upwards])
    rungs = 0.08 * np.arange(len(wanted))
    heights = np.maximum.accumulate(wanted - rungs) + rungs
    heights = np.minimum(heights, 1 - rungs[::-1])
    for name, height in zip(upwards, heights, strict=True):
        colour = ends[name][1]
        axes.text(1.01, height, name, fontsize=_FONT, color=colour, va="center", transform=axes.transAxes)


def _mark_best(axes: Axes, epoch: int, val: float, train: float) -> None:
    """Put a dot on val, and its value on the side of it where train is not."""
    place = (epoch - axes.get_xlim()[0]) / np.ptp(axes.get_xlim())
    height = (val - axes.get_ylim()[0]) / np.ptp(axes.get_ylim())
    above = height < 0.12 or (val >= train and height < 0.88)
    axes.plot(epoch, val, marker="o", markersize=9, color=_COLOURS["val"], markeredgecolor="white", zorder=3)
    axes.annotate(
        f"epoch {epoch}: {val:.3f}",
        (epoch, val),
        xytext=(0, 13 if above else -13),
        textcoords="offset points",
        ha="left" if place < 0.1 else "right" if place > 0.9 else "center",
        va="bottom" if above else "top",
        color=_COLOURS["val"],
        fontsize=_FONT,
        fontweight="bold",
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
    )


def _plot_lr(axes: Axes, history: Sequence[EpochResult]) -> None:
    lrs = np.array([result.lr for result in history])
    epochs = [result.epoch for result in history]
    axes.plot(epochs, lrs, color=_QUIET, linewidth=1.5, marker=_marker(history), markersize=3)
    # A cosine nears 0 in its last epochs only, and keeps its shape on a linear axis; a staircase does not.
    if lrs.min() > 0 and np.quantile(lrs, 0.1) < lrs.max() / 100:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.2 * max(lrs.max(), 1e-12))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))


def plot_confusion(predictions: Predictions, classes: tuple[str, ...], title: str) -> Figure:
    """Plot images by true (rows) and predicted class (columns): how many, and which share of the row.

    On the diagonal the share is the class's sensitivity.
    """
    counts = compute_confusion(predictions)
    images = counts.sum(axis=1)
    shares = counts / np.maximum(images, 1)[:, None]
    width = max(_WIDTH_INCH, 0.52 * len(classes) + 1.5)
    height = min(0.86 * width, 0.85 * len(classes) + 1.8)
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=_layout())
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15, aspect="auto")
    _write_cells(axes, counts, shares)
    _name_classes(axes, classes, images)
    score = compute_metrics(predictions).balanced_accuracy
    heading = f"{title}: {images.sum():,} images, balanced accuracy {score:.3f}"
    axes.set_title(heading, fontsize=_FONT + 2, loc="left", pad=26)
    axes.annotate(
        "Images, and their share of the row; on the diagonal this is the sensitivity.",
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 8),
        textcoords="offset points",
        fontsize=_FONT,
        color=_QUIET,
    )
    return figure


def _write_cells(axes: Axes, counts: NDArray[np.int64], shares: Floats) -> None:
    """Write count and share where there are images, frame the diagonal, grey out rows without images."""
    size = len(counts)
    font = _FONT if size <= 10 else _FONT - 2
    for row in range(size):
        if counts[row].any():
            frame = Rectangle((row - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_QUIET, zorder=2)
        else:
            frame = Rectangle((-0.5, row - 0.5), size, 1, facecolor=_EMPTY, edgecolor="white")
            axes.text((size - 1) / 2, row, "no images", ha="center", va="center", fontsize=font, color=_QUIET)
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
    axes.tick_params(labelsize=_FONT, length=0)
    if len(names) * max(map(len, names)) > 60:  # side by side they would touch
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.set_xlabel("Predicted", fontsize=_FONT + 1)
    axes.set_ylabel("True (images)", fontsize=_FONT + 1)
    axes.spines[:].set_visible(False)
