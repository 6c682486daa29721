"""Figures of a search: Optuna's own of its trials, and ours of how the winner learns."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import optuna
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna import Study
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as optuna_plots

from search.config import DIRECTIONS, SearchConfig
from skin_resnet.evaluation.plots import COLORS, DPI, FONT, QUIET, WIDTH_INCH, build_layout, style_axes

_FEWEST_FOR_IMPORTANCES = 8  # finished trials
_MOST_PANELS = 4  # hyperparameters side by side; with more, labels overlap


def plot_trials(config: SearchConfig, study: Study) -> dict[str, Figure]:
    """Return Optuna's figures of a study by name, without those that too few trials have finished for."""
    first, *others = config.objective_names
    # Of several objectives, the first one is shown.
    options: dict[str, Any] = {"target": lambda trial: trial.values[0]} if others else {}
    options["target_name"] = first.replace("_", " ")
    figures = {"history": _draw(optuna_plots.plot_optimization_history, study, **options)}
    if not others:
        curves = _draw(optuna_plots.plot_intermediate_values, study)
        curves.axes[0].set(title="Learning curves", xlabel="Epoch", ylabel=options["target_name"])
        if legend := curves.axes[0].get_legend():
            legend.remove()  # it has an entry per trial
        figures["learning_curves"] = curves
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(finished) < 2:
        return figures
    shown = [name for name, each in finished[-1].distributions.items() if not each.single()]
    if len(finished) >= _FEWEST_FOR_IMPORTANCES:
        target = build_target(config)
        importances = _draw(optuna_plots.plot_param_importances, study, target=target, params=shown)
        importances.axes[0].set(title=f"Importance (PED-ANOVA) over {len(finished)} finished trials")
        importances.axes[0].legend().remove()
        figures["importances"] = importances
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a target that is not maximized
            shown = list(optuna.importance.get_param_importances(study, target=target, params=shown))
    if shown:
        figures["hyperparameters"] = _draw(
            optuna_plots.plot_slice, study, params=shown[:_MOST_PANELS], **options
        )
    return figures


def build_target(config: SearchConfig) -> Callable[[FrozenTrial], float]:
    """Return a target that is low where the first objective is good, as PED-ANOVA expects it."""
    sign = -1 if DIRECTIONS[config.objective_names[0]] == "maximize" else 1
    return lambda trial: sign * trial.values[0]


def _draw(plot: Callable[..., Any], study: Study, **options: object) -> Figure:
    """Draw one of Optuna's figures, and restore the style that it sets for all figures."""
    size: Any = {"figure.figsize": (WIDTH_INCH, 4.5), "figure.dpi": DPI}
    with matplotlib.rc_context(size), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are marked experimental
        plt.switch_backend("agg")
        axes = plot(study, **options)
    figure: Figure = getattr(axes, "flat", [axes])[0].figure
    plt.close(figure)
    figure.set_layout_engine("constrained")
    figure.set_size_inches(WIDTH_INCH, 4.5)
    return figure


def plot_recipes(histories: Mapping[str, pd.DataFrame], images: str) -> Figure:
    """Plot balanced accuracy on train and val, one panel per recipe, with the gap between them shaded.

    Args:
        histories: By recipe, a row per epoch with the columns of `engine.to_frame`.
        images: How many images val has, in words.
    """
    figure = Figure(figsize=(WIDTH_INCH, 4.2), dpi=DPI, layout=build_layout())
    panels = figure.subplots(1, len(histories), sharey=True, squeeze=False)[0]
    for axes, (name, history) in zip(panels, histories.items(), strict=True):
        train, val = (history[f"{split}/balanced_accuracy"] for split in COLORS)
        best = val.idxmax()
        style_axes(axes, f"{name}: gap {train[best] - val[best]:+.3f} at best epoch {best}")
        for split, line in zip(COLORS, (train, val), strict=True):
            marker = "o" if len(line) <= 25 else ""
            axes.plot(line, color=COLORS[split], linewidth=2, marker=marker, ms=4, label=split)
        axes.fill_between(history.index, train, val, color=QUIET, alpha=0.12)
        axes.axvline(best, color=QUIET, linewidth=1, linestyle=":")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("Epoch", fontsize=FONT)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(f"Balanced accuracy (val: {images})", fontsize=FONT)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return figure
