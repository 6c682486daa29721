"""A search in pictures: what it tried, what mattered, what it saved, and how its winner learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from skin_resnet.evaluation.plots.comparison import Curves
from skin_resnet.evaluation.plots.style import (
    BLUE,
    COLOURS,
    DPI,
    FONT,
    GREEN,
    GRID,
    ORANGE,
    QUIET,
    WIDTH_INCH,
    build_layout,
    style_axes,
)

# By name of a part: `linear`, `log`, or the choices in their order.
Scales = Mapping[str, str | tuple[str, ...]]
_SHAPES = {"COMPLETE": ("o", BLUE), "PRUNED": ("v", QUIET), "FAIL": ("x", ORANGE)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial as it is drawn.

    Attributes:
        value: What it scored, or a pruned one's last epoch did; NaN where it gave nothing.
        state: COMPLETE, PRUNED or FAIL.
        params: What was suggested for it.
        epochs: How many it ran.
        label: What to call it; most have none.
    """

    number: int
    value: float
    state: str
    params: Mapping[str, float | str]
    epochs: int
    label: str = ""


def plot_history(points: Sequence[Point], objective: str, *, maximize: bool) -> Figure:
    """Plot every trial's value, and the best so far among those that finished."""
    figure = Figure(figsize=(WIDTH_INCH, 4.5), dpi=DPI, layout=build_layout())
    axes = figure.subplots()
    style_axes(axes, f"{len(points)} trials, and the best so far")
    for state, (marker, colour) in _SHAPES.items():
        shown = [point for point in points if point.state == state and np.isfinite(point.value)]
        if shown:
            name = {"COMPLETE": "finished", "PRUNED": "pruned, at its last epoch", "FAIL": "failed"}[state]
            axes.scatter(
                [p.number for p in shown], [p.value for p in shown],
                marker=marker, color=colour, s=36, label=name, zorder=3,
            )  # fmt: skip
    finished = [point for point in points if point.state == "COMPLETE"]
    values = np.array([point.value for point in finished])
    best = np.maximum.accumulate(values) if maximize else np.minimum.accumulate(values)
    axes.step([point.number for point in finished], best, where="post", color=GREEN, linewidth=2)
    for point in finished:
        if point.label:
            axes.annotate(
                point.label, (point.number, point.value), xytext=(7, -4), textcoords="offset points",
                fontsize=FONT - 1, bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Trial", fontsize=FONT)
    axes.set_ylabel(objective.replace("_", " "), fontsize=FONT)
    axes.legend(frameon=False, fontsize=FONT - 1, loc="best")
    return figure


def plot_importances(importances: Mapping[str, float], count: int) -> Figure:
    """Plot how much each part of the space mattered for being among the better trials."""
    figure = Figure(figsize=(WIDTH_INCH, 0.9 + 0.34 * len(importances)), dpi=DPI, layout=build_layout())
    axes = figure.subplots()
    style_axes(axes, f"Importance (PED-ANOVA) over {count} finished trials")
    names = sorted(importances, key=lambda name: importances[name])
    axes.barh(
        [spell_part(name) for name in names], [importances[name] for name in names], color=BLUE, height=0.7
    )
    axes.grid(visible=False, axis="y")
    axes.set_xlim(left=0)
    return figure


def plot_slices(points: Sequence[Point], scales: Scales, objective: str) -> Figure:
    """Plot the value over each part of the space, a panel a part; later trials are darker."""
    shown = [point for point in points if point.state != "FAIL" and np.isfinite(point.value)]
    names = [name for name in shown[0].params if all(name in point.params for point in shown)]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(WIDTH_INCH, 2.5 * rows), dpi=DPI, layout=build_layout())
    panels = figure.subplots(rows, 3, sharey=True, squeeze=False).ravel()
    shades = np.linspace(0.35, 1, len(shown))
    for axes, name in zip(panels, names, strict=False):
        style_axes(axes, spell_part(name))
        places, ticks = _place([point.params[name] for point in shown], scales[name])
        for state, (marker, colour) in _SHAPES.items():
            chosen = [i for i, point in enumerate(shown) if point.state == state]
            axes.scatter(
                places[chosen], [shown[i].value for i in chosen],
                marker=marker, color=colour, s=24, alpha=shades[chosen] if chosen else None,
            )  # fmt: skip
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_xlim(-0.5, len(ticks) - 0.5)
        elif scales[name] == "log":
            axes.set_xscale("log")
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supylabel(objective.replace("_", " "), fontsize=FONT)
    return figure


def _place(
    values: Sequence[float | str], scale: str | tuple[str, ...]
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    """Give where values lie on an axis, and the names of its ticks where they are choices."""
    if isinstance(scale, str):
        return np.array(values, dtype=float), ()
    return np.array([scale.index(str(value)) for value in values], dtype=float), scale


def plot_parallel(points: Sequence[Point], scales: Scales, *, maximize: bool) -> Figure:
    """Plot each finished trial as a line through its params, the better third and the best one in colour."""
    shown = sorted(
        (point for point in points if point.state == "COMPLETE"),
        key=lambda point: point.value if maximize else -point.value,
    )
    names = [name for name in shown[0].params if all(name in point.params for point in shown)]
    figure = Figure(figsize=(WIDTH_INCH, 5), dpi=DPI, layout=build_layout())
    axes = figure.subplots()
    style_axes(axes, f"{len(shown)} finished trials: the better third in blue, the best one in orange")
    heights = np.empty((len(shown), len(names)))
    for column, name in enumerate(names):
        places, ticks = _place([point.params[name] for point in shown], scales[name])
        places = np.log(places) if scales[name] == "log" else places
        span = np.ptp(places) or 1.0
        heights[:, column] = (places - places.min()) / span
        ends = (ticks[0], ticks[-1]) if ticks else _name_ends([point.params[name] for point in shown])
        for height, text in zip((-0.06, 1.06), ends, strict=True):
            axes.text(column, height, text, ha="center", va="center", fontsize=FONT - 2, color=QUIET)
    third = len(shown) - max(1, len(shown) // 3)
    for order, line in enumerate(heights):
        is_best = order == len(shown) - 1
        colour = ORANGE if is_best else BLUE if order >= third else "#BBBBBB"
        axes.plot(line, color=colour, linewidth=3 if is_best else 1.3, alpha=1 if is_best else 0.7)
    axes.set_xticks(range(len(names)), [spell_part(name) for name in names], rotation=35, ha="right")
    axes.set_yticks([])
    axes.set_ylim(-0.12, 1.12)
    return figure


def _name_ends(values: Sequence[float | str]) -> tuple[str, str]:
    numbers = [float(value) for value in values]
    return f"{min(numbers):.3g}", f"{max(numbers):.3g}"


def plot_recipes(recipes: Mapping[str, Curves], gaps: Mapping[str, float]) -> Figure:
    """Plot train and val balanced accuracy, a panel a recipe; what lies between is the generalization gap."""
    figure = Figure(figsize=(WIDTH_INCH, 4.2), dpi=DPI, layout=build_layout())
    panels = figure.subplots(1, len(recipes), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(panels, recipes.items(), strict=True):
        style_axes(axes, f"{name}: gap {gaps[name]:+.3f}")
        lines = {split: _read_line(curves, split) for split in ("train", "val")}
        for split, (epochs, values) in lines.items():
            marker = "o" if len(epochs) <= 25 else ""
            axes.plot(epochs, values, color=COLOURS[split], linewidth=2, marker=marker, ms=4, label=split)
        axes.fill_between(lines["val"][0], lines["train"][1], lines["val"][1], color=QUIET, alpha=0.12)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Epoch", fontsize=FONT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel("Balanced accuracy", fontsize=FONT)
    panels[0].legend(frameon=False, fontsize=FONT, loc="lower right")
    return figure


def _read_line(curves: Curves, split: str) -> tuple[list[int], list[float]]:
    points = sorted(curves[f"{split}/balanced_accuracy"].items())
    return [epoch for epoch, _ in points], [value for _, value in points]


def plot_epochs(points: Sequence[Point], asked: int) -> Figure:
    """Plot how many epochs each trial ran of those asked for."""
    figure = Figure(figsize=(WIDTH_INCH, 3.2), dpi=DPI, layout=build_layout())
    axes: Axes = figure.subplots()
    run, possible = sum(point.epochs for point in points), asked * len(points)
    style_axes(axes, f"Epochs: {run} run of {possible} asked for")
    numbers = [point.number for point in points]
    axes.bar(numbers, [asked] * len(points), color=GRID, width=0.8)
    colours = [_SHAPES[point.state][1] for point in points]
    axes.bar(numbers, [point.epochs for point in points], color=colours, width=0.8)
    axes.set_xlabel("Trial (blue: finished, grey: pruned, orange: failed)", fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def spell_part(name: str) -> str:
    """Write a part of the space as one reads it: `lr_factor` is `lr (x usual)`."""
    return name.replace("_factor", " (x usual)").replace("_", " ")
