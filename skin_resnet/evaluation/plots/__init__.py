"""All figures; the only place that imports matplotlib. Here is the style that they share.

The width is that at which the MLflow UI shows an artifact, about 900 pixels. Figures are built without pyplot
and rcParams: nothing stays in memory, no backend is chosen for the caller.
"""

import textwrap
from collections.abc import Sequence
from functools import cache

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine

from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES

# Okabe, Ito, "Color Universal Design" (2008): hues that every kind of color vision tells apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
COLORS = {"train": BLUE, "val": ORANGE, "test": GREEN}
# Of models; the first four are no split's.
HUES = ("#000000", "#E69F00", "#56B4E9", PURPLE, BLUE, GREEN, ORANGE, "#F0E442")
QUIET, GRID = "#666666", "#E6E6E6"
WIDTH_INCH, DPI, FONT = 9.0, 100, 11
_TITLE_LENGTH = 92  # characters of a figure's title that fit its width


def build_figure(height: float, title: str) -> Figure:
    """Return an empty figure of a height in inches; its title is wrapped, and written literally."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(WIDTH_INCH, height), dpi=DPI, layout=layout)
    lines = [part for line in title.splitlines() for part in textwrap.wrap(line, _TITLE_LENGTH)]
    figure.suptitle(literal("\n".join(lines)), fontsize=FONT + 2)
    return figure


def draw_legend(figure: Figure) -> None:
    """Write the legend of a figure's first panel below all panels, in the columns that there is room for."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    widths = [len(label) + 8 for label in labels]
    columns = len(labels) if sum(widths) <= 110 else max(1, 110 // max(widths))
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns)


def style_axes(axes: Axes, title: str) -> None:
    """Set a panel's title, a light grid, and spines left and below only."""
    axes.set_title(literal(title), fontsize=FONT + 1, loc="left")
    axes.tick_params(labelsize=FONT - 1, color=GRID)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)


def capitalize(text: str) -> str:
    """Return text that begins with a capital letter, and is otherwise as it was: `Macro AUC`."""
    return text[:1].upper() + text[1:]


def literal(text: str) -> str:
    """Return text that matplotlib draws as it is: no TeX between `$`, and `?` for what the font lacks."""
    known = _list_characters()
    return "".join(char if ord(char) in known or char == "\n" else "?" for char in text).replace("$", r"\$")


def name_classes(classes: Sequence[str], longest: int, lines: int = 1, *, full: bool = True) -> list[str]:
    """Return class names for figures, in lines of at most `longest` characters.

    Of the seven diagnoses this is `Melanoma (mel)`, or the code alone where there is no room or not `full`.
    Other names are cut, or `class 3` where the font lacks a character.
    """
    known = _list_characters()
    names = []
    for index, name in enumerate(classes):
        is_known = full and tuple(classes) == HAM10000_CLASSES
        long = f"{capitalize(DIAGNOSES[index].name)} ({name})" if is_known else name
        text = shorten(long if len(long) <= longest * lines else name, longest * lines)
        wrapped = "\n".join(textwrap.wrap(text, longest)[:lines]) if lines > 1 else text
        names.append(literal(wrapped) if all(ord(char) in known for char in name) else f"class {index}")
    return names


def shorten(text: str, length: int) -> str:
    """Cut a text that is longer than `length`."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


@cache
def _list_characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
