"""The style that all figures share, for the width at which the MLflow UI shows an artifact: about 900 pixels.

Figures are built without pyplot and rcParams: nothing stays in memory, no backend is chosen for the caller.
"""

from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine

# Okabe, Ito, "Color Universal Design" (2008): hues that every kind of colour vision tells apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
HUES = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000")
COLOURS = {"train": BLUE, "val": ORANGE}
QUIET, GRID, EMPTY = "#666666", "#E6E6E6", "#F2F2F2"
WIDTH_INCH, DPI, FONT = 9.0, 100, 11


def build_layout() -> ConstrainedLayoutEngine:
    """Give the margins around a figure's panels."""
    return ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)


def style_axes(axes: Axes, title: str) -> None:
    """Give a panel its title, a light grid, and spines left and below only."""
    axes.set_title(title, fontsize=FONT + 1, loc="left")
    axes.tick_params(labelsize=FONT - 1, color=GRID)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
