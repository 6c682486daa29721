"""Several models side by side: their curves, and their differences."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from skin_resnet.evaluation.comparison import Difference
from skin_resnet.evaluation.plots.style import DPI, FONT, HUES, QUIET, WIDTH_INCH, build_layout, style_axes

Curves = Mapping[str, Mapping[int, float]]  # metric name: value by epoch


def plot_curves_of_models(models: Mapping[str, Curves]) -> Figure:
    """Plot val (solid) and train (dashed) loss and balanced accuracy over the epochs, a colour a model."""
    figure = Figure(figsize=(WIDTH_INCH, 7), dpi=DPI, layout=build_layout())
    figure.suptitle(f"Curves of {len(models)} trainings", fontsize=FONT + 2)
    panels = figure.subplots(2, 1, sharex=True)
    for axes, metric, title in zip(
        panels, ("loss", "balanced_accuracy"), ("Loss", "Balanced accuracy"), strict=True
    ):
        style_axes(axes, f"{title} (solid: val, dashed: train)")
        for number, (name, curves) in enumerate(models.items()):
            for split, line in (("train", "--"), ("val", "-")):
                points = sorted(curves.get(f"{split}/{metric}", {}).items())
                epochs, values = [epoch for epoch, _ in points], [value for _, value in points]
                axes.plot(
                    epochs,
                    values,
                    line,
                    color=HUES[number % len(HUES)],
                    linewidth=2 if split == "val" else 1.2,
                    marker="" if len(points) > 1 else "o" if split == "val" else "x",
                    label=name if split == "val" else None,
                )
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    panels[1].xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    panels[1].set_xlabel("Epoch", fontsize=FONT)
    panels[0].legend(frameon=False, fontsize=FONT)
    return figure


def plot_differences(differences: Sequence[Difference], images: int, lesions: int) -> Figure:
    """Plot each difference with its interval, in points; 0 means that neither model is ahead."""
    metrics = list(dict.fromkeys(difference.metric for difference in differences))
    rows = len(differences) // len(metrics)
    figure = Figure(
        figsize=(WIDTH_INCH, 1.2 + len(metrics) * (0.8 + 0.4 * rows)), dpi=DPI, layout=build_layout()
    )
    figure.suptitle(f"Differences on the same {images:,} images of {lesions:,} lesions", fontsize=FONT + 2)
    for axes, metric in zip(
        np.atleast_1d(figure.subplots(len(metrics), 1, sharex=True)), metrics, strict=True
    ):
        style_axes(axes, metric.replace("_", " ").replace("auc", "AUC"))
        shown = [difference for difference in differences if difference.metric == metric]
        axes.axvline(0, color=QUIET, linewidth=1.2)
        for row, difference in enumerate(shown):
            colour = HUES[0] if difference.is_clear else QUIET
            axes.plot([100 * difference.low, 100 * difference.high], [row, row], color=colour, linewidth=2)
            axes.plot(100 * difference.value, row, "o", color=colour, markersize=7)
        axes.set_yticks(range(len(shown)), [f"{d.first} minus {d.second}" for d in shown], fontsize=FONT)
        axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel(
        "Points, with 95 % interval by bootstrap over lesions (grey: may be chance)", fontsize=FONT
    )
    return figure
