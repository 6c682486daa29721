"""Curves over the epochs of one or several trainings."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skin_resnet.evaluation.page import spell_metric
from skin_resnet.evaluation.plots import COLORS, FONT, HUES, QUIET, build_figure, literal, style_axes


def plot_curves(history: pd.DataFrame, best_epoch: int) -> Figure:
    """Plot loss, balanced accuracy (thin: accuracy) and learning rate over the epochs; mark the best epoch.

    Args:
        history: Indexed by epoch, with columns `train/loss`, `val/loss`, ..., `lr`.
        best_epoch: Which epoch val chose.
    """
    best, last = history.loc[best_epoch], history.index[-1]
    title = (
        f"Best epoch {best_epoch} of {last}: balanced accuracy {best['val/balanced_accuracy']:.3f} on val, "
        f"{best['train/balanced_accuracy']:.3f} on train"
    )
    figure = build_figure(8, title)
    loss, score, lr = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
    for axes, name in ((loss, "Loss"), (score, "Balanced accuracy (thin: accuracy)"), (lr, "Learning rate")):
        style_axes(axes, name)
        axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle=":", zorder=1)
    lr.set_xlim(history.index[0] - 0.5, last + 0.5)
    lr.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    lr.set_xlabel("Epoch", fontsize=FONT)
    score.set_ylim(0, 1)
    _limit_loss(loss, history)
    # Dots show where a value was measured; on a long run they only thicken the line.
    marker = "o" if len(history) <= 25 else ""
    for axes, metric in ((loss, "loss"), (score, "balanced_accuracy")):
        for split, color in COLORS.items():
            values = history[f"{split}/{metric}"]
            axes.plot(values, color=color, linewidth=2, marker=marker, markersize=4, label=split)
        axes.fill_between(
            history.index, history[f"train/{metric}"], values, color=QUIET, alpha=0.12, linewidth=0
        )
        value = best[f"val/{metric}"]
        style = {"markersize": 9, "markeredgecolor": "white", "zorder": 3}
        axes.plot(best_epoch, value, "o", color=color, label=f"epoch {best_epoch}: {value:.3f}", **style)
        axes.legend(frameon=False, fontsize=FONT, loc="upper left", bbox_to_anchor=(1, 1))
    for split, color in COLORS.items():
        score.plot(history[f"{split}/accuracy"], color=color, linewidth=0.9)
    lr.plot(history.lr, color=QUIET, linewidth=1.5, marker=marker, markersize=3)
    lr.set_ylim(0, 1.2 * max(history.lr.max(), 1e-12))
    lr.yaxis.set_major_locator(MaxNLocator(3))
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
        axes.set_title(note, fontsize=FONT, loc="right", color=COLORS[split])


def plot_differences(differences: pd.DataFrame, split: str) -> Figure:
    """Plot the paired differences of models with their 95 % intervals, a panel per metric, a row per pair.

    Args:
        differences: From `compare_models`.
        split: What the models were evaluated on, for the title.
    """
    metrics = list(differences.metric.unique())
    pairs = len(differences) // len(metrics)
    title = f"{split}: differences in points with 95 % intervals, by paired bootstrap over lesions"
    figure = build_figure(1.8 + 0.5 * pairs, title)
    for axes, metric in zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True):
        rows = differences[differences.metric == metric]
        value, low, high = (100 * rows[name].to_numpy() for name in ("value", "low", "high"))
        style_axes(axes, spell_metric(metric))
        axes.axvline(0, color=QUIET, linewidth=1, linestyle="--")
        axes.errorbar(
            value, range(pairs), xerr=[value - low, high - value], fmt="o", color=HUES[0], capsize=4
        )
        for place, number in enumerate(value):
            axes.annotate(f"{number:+.1f}", (number, place), (0, 7), textcoords="offset points", ha="center")
        names = [literal(f"{row.first}\nminus {row.second}") for row in rows.itertuples()]
        axes.set_yticks(range(pairs), names)
        axes.set_ylim(pairs - 0.4, -0.6)
    return figure


def plot_curves_of_models(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot loss and balanced accuracy of val and train over the epochs, a color per model."""
    figure = build_figure(7, f"Curves of {len(histories)} trainings")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, metric in zip(panels, ("loss", "balanced_accuracy"), strict=True):
        style_axes(axes, f"{metric.replace('_', ' ').capitalize()} (solid: val, dashed: train)")
        for number, (name, history) in enumerate(histories.items()):
            style = {"color": HUES[number % len(HUES)], "marker": "o" if len(history) == 1 else ""}
            axes.plot(history[f"val/{metric}"], "-", linewidth=2, label=literal(name), **style)
            axes.plot(history[f"train/{metric}"], "--", linewidth=1.2, **style)
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    panels[1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[1].set_xlabel("Epoch", fontsize=FONT)
    panels[0].legend(frameon=False, fontsize=FONT)
    return figure
