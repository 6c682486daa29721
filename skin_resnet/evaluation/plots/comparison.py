"""Several models side by side: their curves, and their differences."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skin_resnet.evaluation.comparison import Difference
from skin_resnet.evaluation.formatting import spell_metric
from skin_resnet.evaluation.plots.style import FONT, HUES, QUIET, build_figure, literal, style_axes


def plot_curves_of_models(histories: Mapping[str, pd.DataFrame]) -> Figure:
    """Plot loss and balanced accuracy of val (solid) and train (dashed) over the epochs, a colour per model.

    Args:
        histories: By model name, each indexed by epoch.
    """
    figure = build_figure(7, f"Curves of {len(histories)} trainings")
    panels = figure.subplots(2, 1, sharex=True)
    for axes, metric in zip(panels, ("loss", "balanced_accuracy"), strict=True):
        style_axes(axes, f"{spell_metric(metric).capitalize()} (solid: val, dashed: train)")
        for number, (name, history) in enumerate(histories.items()):
            for split, line, dot in (("train", "--", "x"), ("val", "-", "o")):
                axes.plot(
                    history[f"{split}/{metric}"],
                    line,
                    color=HUES[number % len(HUES)],
                    linewidth=2 if split == "val" else 1.2,
                    marker="" if len(history) > 1 else dot,
                    label=literal(name) if split == "val" else None,
                )
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    panels[1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[1].set_xlabel("Epoch", fontsize=FONT)
    panels[0].legend(frameon=False, fontsize=FONT)
    return figure


def plot_differences(differences: Sequence[Difference], images: int, lesions: int) -> Figure:
    """Plot each difference with its interval, in points; at 0 neither model is ahead."""
    metrics = list(dict.fromkeys(difference.metric for difference in differences))
    rows = len(differences) // len(metrics)
    title = f"Differences on the same {images:,} images of {lesions:,} lesions"
    figure = build_figure(1.2 + len(metrics) * (0.8 + 0.4 * rows), title)
    panels = np.atleast_1d(figure.subplots(len(metrics), 1, sharex=True))
    for axes, metric in zip(panels, metrics, strict=True):
        style_axes(axes, spell_metric(metric))
        shown = [difference for difference in differences if difference.metric == metric]
        axes.axvline(0, color=QUIET, linewidth=1.2)
        for row, difference in enumerate(shown):
            colour = HUES[0] if difference.is_clear else QUIET
            axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=colour, linewidth=2)
            axes.plot(100 * difference.value, row, "o", color=colour, markersize=7)
        names = [literal(f"{each.first} minus {each.second}") for each in shown]
        axes.set_yticks(range(len(shown)), names, fontsize=FONT)
        axes.set_ylim(len(shown) - 0.5, -0.5)
    note = "Points, with 95 % interval by bootstrap over lesions (grey: not significant)"
    panels[-1].set_xlabel(note, fontsize=FONT)
    return figure
