"""The course of a training: loss, balanced accuracy and learning rate over the epochs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from skin_resnet.evaluation.plots.style import COLOURS, FONT, QUIET, build_figure, style_axes


def plot_curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Plot loss, balanced accuracy (thin: accuracy) and learning rate over the epochs; mark the best epoch.

    Args:
        history: Indexed by epoch, with columns `train/loss`, `val/loss`, ..., `lr`.
        best_epoch: Which epoch val chose.
    """
    best = history.loc[best_epoch]
    first, last = history.index[0], history.index[-1]
    val, train = best["val/balanced_accuracy"], best["train/balanced_accuracy"]
    title = f"Best epoch {best_epoch} of {last}: balanced accuracy {val:.3f} on val, {train:.3f} on train"
    figure = build_figure(8, title)
    loss, score, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    for axes, name in ((loss, "Loss"), (score, "Balanced accuracy (thin: accuracy)"), (lr, "Learning rate")):
        style_axes(axes, name)
        axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    lr.set_xlim(first - 0.5, last + 0.5)
    lr.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lr.set_xlabel("Epoch", fontsize=FONT)
    _limit_loss(loss, history)
    score.set_ylim(0, 1)
    _label_ends(loss, _draw_lines(loss, history, "loss"))
    thin = _draw_lines(score, history, "accuracy")
    _label_ends(score, thin | _draw_lines(score, history, "balanced_accuracy"))
    _mark_best(loss, best_epoch, best["val/loss"], best["train/loss"])
    _mark_best(score, best_epoch, val, train)
    _plot_lr(lr, history.lr)
    return figure


def _limit_loss(axes: Axes, history: pd.DataFrame) -> None:
    """Start at 0, and cut off outliers that would flatten the curve: name the highest in the title."""
    losses = history[["train/loss", "val/loss"]]
    values = losses.to_numpy()
    top = 1.2 * values[values <= 2.5 * np.quantile(values, 0.9)].max(initial=1e-3)
    axes.set_ylim(0, top)
    if values.max() > top:
        epoch, name = losses.stack().idxmax()
        split = name.partition("/")[0]
        note = f"off this axis: {split} loss {values.max():.3g} in epoch {epoch}"
        axes.set_title(note, fontsize=FONT, loc="right", color=COLOURS[split])


def _draw_lines(axes: Axes, history: pd.DataFrame, metric: str) -> dict[str, tuple[float, str]]:
    """Draw a metric of both splits; return name, last value and colour of each line."""
    is_thin = metric == "accuracy"
    lines = {split: history[f"{split}/{metric}"] for split in COLOURS}
    for split, values in lines.items():
        width, size = (0.9, 2) if is_thin else (2, 4)
        axes.plot(values, color=COLOURS[split], linewidth=width, marker=_marker(history), markersize=size)
    if not is_thin:
        axes.fill_between(history.index, lines["train"], lines["val"], color=QUIET, alpha=0.12, linewidth=0)
    suffix = " accuracy" if is_thin else ""
    return {split + suffix: (values.iloc[-1], COLOURS[split]) for split, values in lines.items()}


def _marker(history: pd.DataFrame | pd.Series) -> str:
    # Dots show where a value was measured; on a long run they only thicken the line.
    return "o" if len(history) <= 25 else ""


def _label_ends(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Name each line at its end; move the names of lines that end close together apart."""
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
    """Mark val with a dot, and write its value on the side away from train."""
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


def _plot_lr(axes: Axes, lrs: pd.Series) -> None:
    axes.plot(lrs, color=QUIET, linewidth=1.5, marker=_marker(lrs), markersize=3)
    # A cosine nears 0 in its last epochs only, and keeps its shape on a linear axis; a staircase does not.
    if lrs.min() > 0 and lrs.quantile(0.1) < lrs.max() / 100:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.2 * max(lrs.max(), 1e-12))
        axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda lr, _: f"{lr:g}"))
