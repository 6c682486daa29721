"""How the parts of the images score: a dot and its interval a slice."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skin_resnet.evaluation.formatting import spell_metric
from skin_resnet.evaluation.plots.style import BLUE, DPI, FONT, QUIET, WIDTH_INCH, build_layout, style_axes

_TITLES = {
    "sex": "Sex",
    "age": "Age in years",
    "localization": "Localization",
    "dx": "Sensitivity by diagnosis",
}


def plot_slices(slices: pd.DataFrame, title: str, figure: str = "balanced_accuracy") -> Figure:
    """Plot one headline figure by slice, with intervals; the value over all images is a line.

    Balanced accuracy, the mean of the sensitivities, has these below it, by diagnosis.

    Args:
        slices: From `compute_slices`.
        title: What was scored.
        figure: `balanced_accuracy`, `accuracy` or `macro_auc`.
    """
    shown = [figure, "sensitivity"] if figure == "balanced_accuracy" else [figure]
    rows = slices[slices.figure.isin(shown)]
    overall = rows[rows["by"] == "all"].iloc[0]
    parts = {by: rows[rows["by"] == by] for by in _TITLES if (rows["by"] == by).any()}
    heights = [len(part) + 1.2 for part in parts.values()]
    page = Figure(figsize=(WIDTH_INCH, 0.27 * sum(heights) + 1.1), dpi=DPI, layout=build_layout())
    value = "" if np.isnan(overall.value) else f" {overall.value:.3f} (line)"
    counts = f"{overall.images:,} images of {overall.lesions:,} lesions"
    page.suptitle(f"{title}: {spell_metric(figure)}{value}, {counts}", fontsize=FONT + 2)
    if not parts:
        return page
    panels = page.subplots(len(parts), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    lowest = np.nanmin([0.9, *rows.low])
    panels[0].set_xlim(np.floor(lowest * 10) / 10, 1.01)
    for axes, (by, part) in zip(panels, parts.items(), strict=True):
        style_axes(axes, _TITLES[by])
        axes.axvline(overall.value, color=QUIET, linewidth=1.2, zorder=1)
        _draw_rows(axes, part)
    panels[0].set_title("images (lesions), classes", fontsize=FONT - 1, loc="right", color=QUIET)
    panels[-1].set_xlabel("Value with its 95 % interval by bootstrap over lesions", fontsize=FONT)
    return page


def _draw_rows(axes: Axes, part: pd.DataFrame) -> None:
    """Draw a row a slice, the first on top; grey and without a number where it is too small."""
    places = list(range(len(part)))
    axes.hlines(places, part.low, part.high, color=BLUE, linewidth=2)
    axes.plot(part.value, places, "o", color=BLUE, markersize=7, markeredgecolor="white")
    axes.set_yticks(places, [str(name)[:24] for name in part["slice"]])
    axes.set_ylim(len(part) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    for place, label, row in zip(places, axes.get_yticklabels(), part.itertuples(), strict=True):
        colour = QUIET if row.too_small else "black"
        label.set_color(colour)
        counts = f"{row.images:,} ({row.lesions:,})" + ("" if row.by == "dx" else f", {row.classes}")
        beside = axes.get_yaxis_transform()
        axes.text(1.01, place, counts, transform=beside, va="center", fontsize=FONT - 1, color=colour)
        if row.too_small:
            note = "too small to speak of"
            axes.text(0.01, place, note, transform=beside, va="center", fontsize=FONT - 1, color=colour)
