"""The course of a training: loss, scores and learning rate over the epochs."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.evaluation.plots.style import COLOURS, DPI, FONT, QUIET, WIDTH_INCH, build_layout, style_axes


def plot_curves(history: Sequence[EpochResult], best_epoch: int) -> Figure:
    """Plot loss, balanced accuracy (thin: accuracy) and learning rate over the epochs; mark the best one."""
    best = next(result for result in history if result.epoch == best_epoch)
    first, last = history[0].epoch, history[-1].epoch
    figure = Figure(figsize=(WIDTH_INCH, 8), dpi=DPI, layout=build_layout())
    figure.suptitle(
        f"Best epoch {best_epoch} of {last}: balanced accuracy {best.val.balanced_accuracy:.3f} on val, "
        f"{best.train.balanced_accuracy:.3f} on train",
        fontsize=FONT + 2,
    )
    loss, score, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    for axes, title in ((loss, "Loss"), (score, "Balanced accuracy (thin: accuracy)"), (lr, "Learning rate")):
        style_axes(axes, title)
        axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    lr.set_xlim(first - 0.5, last + 0.5)
    lr.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lr.set_xlabel("Epoch", fontsize=FONT)
    _limit_loss(loss, history)
    score.set_ylim(0, 1)
    _label_ends(loss, _draw_lines(loss, history, "loss"))
    thin = _draw_lines(score, history, "accuracy")
    _label_ends(score, thin | _draw_lines(score, history, "balanced_accuracy"))
    _mark_best(loss, best_epoch, best.val.loss, best.train.loss)
    _mark_best(score, best_epoch, best.val.balanced_accuracy, best.train.balanced_accuracy)
    _plot_lr(lr, history)
    return figure


def _limit_loss(axes: Axes, history: Sequence[EpochResult]) -> None:
    """Start at 0 and let no wild epoch press the rest flat: say how high it went instead."""
    losses = np.array([(result.train.loss, result.val.loss) for result in history])
    top = 1.2 * losses[losses <= 2.5 * np.quantile(losses, 0.9)].max(initial=1e-3)
    axes.set_ylim(0, top)
    if losses.max() > top:
        row, column = divmod(int(losses.argmax()), 2)
        split = ("train", "val")[column]
        note = f"off this axis: {split} loss {losses[row, column]:.3g} in epoch {history[row].epoch}"
        axes.set_title(note, fontsize=FONT, loc="right", color=COLOURS[split])


def _draw_lines(axes: Axes, history: Sequence[EpochResult], name: str) -> dict[str, tuple[float, str]]:
    """Draw a figure of both splits; give the name, last value and colour of each line."""
    epochs = [result.epoch for result in history]
    lines = {split: [getattr(getattr(result, split), name) for result in history] for split in COLOURS}
    thin = name == "accuracy"
    for split, values in lines.items():
        axes.plot(
            epochs,
            values,
            color=COLOURS[split],
            linewidth=0.9 if thin else 2,
            marker=_marker(history),
            markersize=2 if thin else 4,
        )
    if not thin:
        axes.fill_between(epochs, lines["train"], lines["val"], color=QUIET, alpha=0.12, linewidth=0)
    suffix = " accuracy" if thin else ""
    return {split + suffix: (values[-1], COLOURS[split]) for split, values in lines.items()}


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
        axes.text(1.01, height, name, fontsize=FONT, color=colour, va="center", transform=axes.transAxes)


def _mark_best(axes: Axes, epoch: int, val: float, train: float) -> None:
    """Put a dot on val, and its value on the side of it where train is not."""
    place = (epoch - axes.get_xlim()[0]) / np.ptp(axes.get_xlim())
    height = (val - axes.get_ylim()[0]) / np.ptp(axes.get_ylim())
    above = height < 0.12 or (val >= train and height < 0.88)
    axes.plot(epoch, val, marker="o", markersize=9, color=COLOURS["val"], markeredgecolor="white", zorder=3)
    axes.annotate(
        f"epoch {epoch}: {val:.3f}",
        (epoch, val),
        xytext=(0, 13 if above else -13),
        textcoords="offset points",
        ha="left" if place < 0.1 else "right" if place > 0.9 else "center",
        va="bottom" if above else "top",
        color=COLOURS["val"],
        fontsize=FONT,
        fontweight="bold",
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none", "pad": 1},
    )


def _plot_lr(axes: Axes, history: Sequence[EpochResult]) -> None:
    lrs = np.array([result.lr for result in history])
    epochs = [result.epoch for result in history]
    axes.plot(epochs, lrs, color=QUIET, linewidth=1.5, marker=_marker(history), markersize=3)
    # A cosine nears 0 in its last epochs only, and keeps its shape on a linear axis; a staircase does not.
    if lrs.min() > 0 and np.quantile(lrs, 0.1) < lrs.max() / 100:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.2 * max(lrs.max(), 1e-12))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))
