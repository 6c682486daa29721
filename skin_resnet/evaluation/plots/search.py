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
_SHAPES = {"COMPLETE": ("o", BLUE), "PRUNED": ("v", QUIET), "FAIL": ("X", ORANGE)}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial as it is drawn.

    Attributes:
        value: What it scored, or a pruned one's last epoch did; NaN where it gave nothing.
        state: COMPLETE, PRUNED or FAIL.
        params: What was suggested for it.
        epochs: How many it ran.
        label: What to call it; most have none.
        may_win: Whether its gap is within the limit.
    """

    number: int
    value: float
    state: str
    params: Mapping[str, float | str]
    epochs: int
    label: str = ""
    may_win: bool = True


def plot_history(points: Sequence[Point], objective: str, *, maximize: bool) -> Figure:
    """Plot every trial's value, and the best so far among those that finished and may win."""
    figure = Figure(figsize=(WIDTH_INCH, 4.7), dpi=DPI, layout=build_layout())
    axes = figure.subplots()
    style_axes(axes, f"{len(points)} trials, and the best so far")
    eligible = [point for point in points if point.state == "COMPLETE" and point.may_win]
    values = np.array([point.value for point in eligible])
    best = np.maximum.accumulate(values) if maximize else np.minimum.accumulate(values)
    if eligible:
        axes.step(
            [*(point.number for point in eligible), points[-1].number], [*best, best[-1]],
            where="post", color=GREEN, linewidth=2, label="best so far",
        )  # fmt: skip
    groups: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        if np.isfinite(point.value):
            groups.setdefault(_describe_point(point), []).append(point)
    for (name, marker), group in groups.items():
        colour = _SHAPES[group[0].state][1]
        is_hollow = group[0].state == "COMPLETE" and not group[0].may_win
        axes.scatter(
            [point.number for point in group], [point.value for point in group],
            marker=marker, facecolors="none" if is_hollow else colour, edgecolors=colour, s=40,
            label=name, zorder=3,
        )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Trial", fontsize=FONT)
    axes.set_ylabel(objective.replace("_", " "), fontsize=FONT)
    # Beside the axes, where it hides no trial.
    figure.legend(frameon=False, fontsize=FONT - 1, loc="outside lower center", ncols=4)
    return figure


def _describe_point(point: Point) -> tuple[str, str]:
    """Give what the legend says of a trial, and its marker."""
    name = {"COMPLETE": "finished", "PRUNED": "pruned, at its last epoch", "FAIL": "failed"}[point.state]
    marker = _SHAPES[point.state][0]
    if point.state == "COMPLETE" and point.label:
        name, marker = point.label, {"seed recipe": "D"}.get(point.label, "s")
    if point.state == "COMPLETE" and not point.may_win:
        name = f"{name}, gap too large"
    return name, marker


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
    axes.set_xlabel("Share of all importance", fontsize=FONT)
    return figure


def plot_slices(points: Sequence[Point], scales: Scales, objective: str) -> Figure:
    """Plot the value over each part of the space, a panel a part; later trials are darker."""
    shown = [point for point in points if point.state != "FAIL" and np.isfinite(point.value)]
    names = [name for name in shown[0].params if all(name in point.params for point in shown)]
    rows = -(-len(names) // 3)
    figure = Figure(figsize=(WIDTH_INCH, 0.4 + 2.5 * rows), dpi=DPI, layout=build_layout())
    told = (
        f"{len(shown)} trials that gave a value: finished (dots) or pruned (triangles); later ones are darker"
    )
    figure.suptitle(told, fontsize=FONT + 1, x=0.01, ha="left")
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


def plot_parallel(points: Sequence[Point], scales: Scales, winner: int, *, maximize: bool) -> Figure:
    """Plot each finished trial as a line through its params, the better third and the winner in colour."""
    shown = sorted(
        (point for point in points if point.state == "COMPLETE"),
        key=lambda point: point.value if maximize else -point.value,
    )
    names = [name for name in shown[0].params if all(name in point.params for point in shown)]
    figure = Figure(figsize=(WIDTH_INCH, 5), dpi=DPI, layout=build_layout())
    axes = figure.subplots()
    style_axes(axes, f"{len(shown)} finished trials: the better third in blue, the winner in orange")
    heights = np.empty((len(shown), len(names)))
    for column, name in enumerate(names):
        heights[:, column], ticks = _scale([point.params[name] for point in shown], scales[name])
        for height, text in ticks.items():
            axes.text(
                column, height, text, ha="center", va="center", fontsize=FONT - 3, color="#333333", zorder=4,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
            )  # fmt: skip
    third = len(shown) - max(1, len(shown) // 3)
    for order, (point, line) in enumerate(zip(shown, heights, strict=True)):
        is_winner = point.number == winner
        colour = ORANGE if is_winner else BLUE if order >= third else "#BBBBBB"
        axes.plot(
            line, color=colour, linewidth=3 if is_winner else 1.3,
            alpha=1 if is_winner else 0.7, zorder=3 if is_winner else 2,
        )  # fmt: skip
    axes.set_xticks(range(len(names)), [spell_part(name) for name in names], rotation=35, ha="right")
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_yticks([])
    axes.set_ylim(-0.14, 1.14)
    return figure


def _scale(
    values: Sequence[float | str], scale: str | tuple[str, ...]
) -> tuple[NDArray[np.float64], dict[float, str]]:
    """Give how high values lie between 0 and 1, and what is written at which height of their axis."""
    places, choices = _place(values, scale)
    if choices:
        # Not over the values that occur: a choice that no trial made would lend its name to another.
        top = max(1, len(choices) - 1)
        return places / top, {place / top: text for place, text in enumerate(choices)}
    places = np.log(places) if scale == "log" else places
    ends = (min(map(float, values)), max(map(float, values)))
    return (places - places.min()) / (np.ptp(places) or 1.0), {
        height: f"{end:.3g}" for height, end in zip((-0.08, 1.08), ends, strict=True)
    }


def plot_recipes(recipes: Mapping[str, Curves], best: Mapping[str, tuple[int, float]], images: str) -> Figure:
    """Plot train and val balanced accuracy, a panel a recipe; what lies between is the generalization gap.

    Args:
        recipes: Curves by name of the recipe.
        best: Its best epoch, and the gap there.
        images: How many val has, in words.
    """
    figure = Figure(figsize=(WIDTH_INCH, 4.2), dpi=DPI, layout=build_layout())
    panels = figure.subplots(1, len(recipes), sharey=True, squeeze=False)[0]
    for axes, (name, curves) in zip(panels, recipes.items(), strict=True):
        epoch, gap = best[name]
        style_axes(axes, f"{name}: gap {gap:+.3f} at its best epoch, {epoch}")
        lines = {split: _read_line(curves, split) for split in ("train", "val")}
        for split, (epochs, values) in lines.items():
            marker = "o" if len(epochs) <= 25 else ""
            axes.plot(epochs, values, color=COLOURS[split], linewidth=2, marker=marker, ms=4, label=split)
        axes.fill_between(lines["val"][0], lines["train"][1], lines["val"][1], color=QUIET, alpha=0.12)
        axes.axvline(epoch, color=QUIET, linewidth=1, linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Epoch", fontsize=FONT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(f"Balanced accuracy (val: {images})", fontsize=FONT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=FONT, loc="outside lower center", ncols=2)
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
    axes.set_ylabel("Epochs", fontsize=FONT)
    axes.set_xlabel("Trial (blue: finished, grey: pruned, orange: failed)", fontsize=FONT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def spell_part(name: str) -> str:
    """Write a part of the space as one reads it: `lr_factor` is `lr (x usual)`."""
    return name.replace("_factor", " (x usual)").replace("_", " ")
