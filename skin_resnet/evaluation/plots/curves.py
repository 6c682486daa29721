"""Curves over the epochs of one or several trainings."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skin_resnet.evaluation.page import spell_metric
from skin_resnet.evaluation.plots import (
    COLORS,
    FONT,
    HUES,
    QUIET,
    build_figure,
    capitalize,
    draw_legend,
    literal,
    shorten,
    style_axes,
)

FEWEST_EPOCHS = 3  # of a curve beside others; fewer show no course
_MOST_DOTS = 25  # epochs whose values are marked; on a long run dots only thicken the line


def plot_curves(
    history: pd.DataFrame, best_epoch: int, baseline: Mapping[str, float], baseline_class: str
) -> Figure:
    """Plot balanced accuracy, accuracy, loss and learning rate over the epochs; mark the best epoch.

    `baseline` has the val metrics `accuracy` and `balanced_accuracy` of always predicting `baseline_class`.
    """
    figure = build_figure(6.8, f"Best epoch {best_epoch} of {history.index[-1]}, chosen on val")
    (score, loss), (accuracy, lr) = figure.subplots(2, 2, sharex=True)
    majority = literal(f"majority class {shorten(baseline_class, 24)} (val)")
    for axes, metric in ((score, "balanced_accuracy"), (accuracy, "accuracy")):
        draw_splits(axes, history, metric, best_epoch)
        axes.axhline(baseline[metric], color=QUIET, linestyle="--", label=majority)
        axes.set_ylim(0, 1.02)
    draw_splits(loss, history, "loss", best_epoch)
    _limit_loss(loss, history)
    style_axes(lr, "Learning rate")
    lr.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    lr.plot(history.lr, color="black", linewidth=1.5, marker=_choose_marker(history), markersize=4)
    lr.set_ylim(0, 1.1 * max(history.lr.max(), 1e-12))
    lr.yaxis.set_major_formatter("{x:g}")
    for axes in (accuracy, lr):
        mark_epochs(axes, history.index[-1])
    draw_legend(figure)
    return figure


def draw_splits(axes: Axes, history: pd.DataFrame, metric: str, best_epoch: int, name: str = "") -> None:
    """Draw a metric on train and val with the gap between them shaded; name its values in the best epoch."""
    best = {split: history.loc[best_epoch, f"{split}/{metric}"] for split in ("val", "train")}
    scores = ", ".join(f"{split} {value:.3f}" for split, value in best.items())
    style_axes(axes, f"{name or capitalize(spell_metric(metric))}: {scores}")
    axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    marker = _choose_marker(history)
    train, val = (history[f"{split}/{metric}"] for split in ("train", "val"))
    for split, values in (("train", train), ("val", val)):
        axes.plot(values, color=COLORS[split], linewidth=2, marker=marker, markersize=4, label=split)
    axes.fill_between(history.index, train, val, color=QUIET, alpha=0.12, linewidth=0)
    color = COLORS["val"]
    axes.plot(best_epoch, best["val"], "o", color=color, markersize=9, mec="white", label="best epoch")


def mark_epochs(axes: Axes, last: int) -> None:
    """Label the axis of epochs, which starts at 1."""
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.set_xlabel("Epoch", fontsize=FONT)


def _choose_marker(history: pd.DataFrame) -> str:
    return "o" if len(history) <= _MOST_DOTS else ""


def _limit_loss(axes: Axes, history: pd.DataFrame) -> None:
    """Start at 0, and cut off outliers that would flatten the curve: name the highest below the title."""
    losses = history[["train/loss", "val/loss"]]
    values = losses.to_numpy()
    top = 1.2 * values[values <= 2.5 * np.quantile(values, 0.9)].max(initial=1e-3)
    axes.set_ylim(0, top)
    if values.max() > top:
        epoch, name = losses.stack().idxmax()
        note = f"off this axis: {name.partition('/')[0]} loss {values.max():.3g} in epoch {epoch}"
        axes.set_title(f"{axes.get_title(loc='left')}\n{note}", fontsize=FONT, loc="left")


def plot_differences(differences: pd.DataFrame, split: str) -> Figure:
    """Plot differences from `compare_models` with their intervals, a panel per metric, a row per pair."""
    metrics = list(differences.metric.unique())
    pairs = len(differences) // len(metrics)
    title = f"{split}: differences in points with 95 % intervals, by paired bootstrap over lesions"
    figure = build_figure(1.8 + 0.5 * pairs, title)
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        rows = differences[differences.metric == metric]
        value, low, high = (100 * rows[name].to_numpy() for name in ("value", "low", "high"))
        style_axes(axes, capitalize(spell_metric(metric)))
        axes.axvline(0, color=QUIET, linewidth=1, linestyle="--")
        errors = value - low, high - value
        axes.errorbar(value, range(pairs), xerr=errors, fmt="o", color=HUES[0], capsize=4)
        for place, number in enumerate(value):
            axes.annotate(f"{number:+.1f}", (number, place), (0, 7), textcoords="offset points", ha="center")
        names = [literal(f"{row.first}\nminus {row.second}") for row in rows.itertuples()]
        axes.set_yticks(range(pairs), names)
        axes.set_ylim(pairs - 0.4, -0.6)
    return figure


def plot_curves_of_models(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot loss and balanced accuracy of val and train over the epochs, a color per model."""
    figure = build_figure(7, f"{len(histories)} trainings: val (solid) and train (dashed)")
    panels = figure.subplots(2, 1, sharex=True)
    longest = max(histories.values(), key=len)
    for axes, metric in zip(panels, ("balanced_accuracy", "loss"), strict=True):
        style_axes(axes, capitalize(spell_metric(metric)))
        for number, (name, history) in enumerate(histories.items()):
            style = {"color": HUES[number % len(HUES)], "marker": _choose_marker(longest), "markersize": 4}
            axes.plot(history[f"val/{metric}"], "-", linewidth=2, label=literal(name), **style)
            axes.plot(history[f"train/{metric}"], "--", linewidth=1.2, **style)
        axes.set_ylim(bottom=0)
    panels[0].set_ylim(0, 1.02)
    mark_epochs(panels[1], longest.index[-1])
    draw_legend(figure)
    return figure
