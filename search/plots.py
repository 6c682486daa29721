"""Figures of a search: its trials, their hyperparameters, and how baseline recipe and winner learn."""

import warnings
from collections.abc import Callable, Mapping

import optuna
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from optuna import Study
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from search.config import DIRECTIONS, SearchConfig
from search.space import BASELINES, FACTOR
from search.study import choose_best, drop_retried
from skin_resnet.config import BestMetric
from skin_resnet.evaluation.page import spell_metric
from skin_resnet.evaluation.plots import FONT, HUES, QUIET, build_figure, capitalize, draw_legend, style_axes
from skin_resnet.evaluation.plots.curves import FEWEST_EPOCHS, draw_splits, mark_epochs

_FEWEST_TRIALS = 3  # finished or pruned
_FEWEST_FOR_IMPORTANCES = 8  # finished trials
_PANELS = 2, 3  # hyperparameters: the most important ones
_BEST, _OTHERS = "best", "other trials"
_COLORS = {_OTHERS: "#999999", **dict(zip(BASELINES, HUES[1:], strict=False)), _BEST: HUES[0]}


def plot_trials(config: SearchConfig, study: Study, majority: float) -> dict[str, Figure]:
    """Return the figures of a study by name: `trials` and `hyperparameters`, each if there are enough trials.

    Of several objectives, the first one is shown. `majority`: balanced accuracy of the majority class on val.
    """
    trials, best = drop_retried(study.get_trials(deepcopy=False)), choose_best(config, study)
    if sum(trial.state in {TrialState.COMPLETE, TrialState.PRUNED} for trial in trials) < _FEWEST_TRIALS:
        return {}
    groups: dict[str, list[FrozenTrial]] = {name: [] for name in _COLORS}
    for trial in trials:
        is_best = best is not None and trial.number == best.number
        groups[_BEST if is_best else trial.user_attrs.get("baseline", _OTHERS)].append(trial)
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    objective = capitalize(spell_metric(config.objective_names[0]))
    figure = build_figure(4.8, f"{objective} of {len(trials)} trials, {len(finished)} of them finished")
    has_curves = len(config.objective_names) == 1 and config.epochs >= FEWEST_EPOCHS
    panels = figure.subplots(1, 1 + has_curves, sharey=True, squeeze=False)[0]
    for axes, draw in zip(panels, (_draw_values, _draw_learning), strict=False):
        draw(axes, groups)
        if config.objective_names[0] == "val_balanced_accuracy":
            axes.axhline(majority, color=QUIET, linestyle="--", label="majority class")
    draw_legend(figure)
    if len(finished) < _FEWEST_FOR_IMPORTANCES or not _list_tuned(finished[-1]):
        return {"trials": figure}
    title = f"{objective} of {len(finished)} finished trials, by hyperparameter (importance: PED-ANOVA)"
    return {"trials": figure, "hyperparameters": _plot_hyperparameters(config, study, groups, title)}


def _draw_values(axes: Axes, groups: Mapping[str, list[FrozenTrial]]) -> None:
    style_axes(axes, "Trials (crosses: pruned)")
    for name, trials in groups.items():
        done = {trial.number: trial.values[0] for trial in trials if trial.state == TrialState.COMPLETE}
        pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
        last = {trial.number: trial.intermediate_values[max(trial.intermediate_values)] for trial in pruned}
        if done:
            baseline = trials[0].user_attrs.get("baseline") if name == _BEST else None
            label = f"{name}: {baseline}" if baseline else name
            axes.plot([*done], [*done.values()], "o", color=_COLORS[name], label=label)
        axes.plot([*last], [*last.values()], "x", color=_COLORS[name])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Trial", fontsize=FONT)


def _draw_learning(axes: Axes, groups: Mapping[str, list[FrozenTrial]]) -> None:
    style_axes(axes, "Over the epochs")
    curves = [(name, pd.Series(t.intermediate_values)) for name, trials in groups.items() for t in trials]
    for name, curve in curves:
        width = 1 if name == _OTHERS else 2
        axes.plot(curve.sort_index(), color=_COLORS[name], linewidth=width, marker="o" * (len(curve) == 1))
    mark_epochs(axes, max((curve.index.max() for _, curve in curves if len(curve)), default=1))


def build_target(config: SearchConfig) -> Callable[[FrozenTrial], float]:
    """Return a target that is low where the first objective is good, as PED-ANOVA expects it."""
    sign = -1 if DIRECTIONS[config.objective_names[0]] == "maximize" else 1
    return lambda trial: sign * trial.values[0]


def _list_tuned(trial: FrozenTrial) -> list[str]:
    return [name for name, space in trial.distributions.items() if not space.single()]


def _plot_hyperparameters(
    config: SearchConfig, study: Study, groups: Mapping[str, list[FrozenTrial]], title: str
) -> Figure:
    groups = {name: [t for t in each if t.state == TrialState.COMPLETE] for name, each in groups.items()}
    last = max((t for each in groups.values() for t in each), key=lambda t: t.number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a target that is not maximized
        importances = optuna.importance.get_param_importances(
            study, target=build_target(config), params=_list_tuned(last)
        )
    figure = build_figure(6, title)
    panels = figure.subplots(*_PANELS, sharey=True).flat
    for axes, name in zip(panels, importances, strict=False):
        style_axes(axes, f"{name.removesuffix(FACTOR)}: {importances[name]:.2f}")
        for group, trials in groups.items():
            x = [last.distributions[name].to_internal_repr(trial.params[name]) for trial in trials]
            axes.plot(x, [trial.values[0] for trial in trials], "o", color=_COLORS[group], label=group)
        _label_values(axes, last.distributions[name], name)
    for axes in list(panels)[len(importances) :]:
        axes.remove()
    draw_legend(figure)
    return figure


def _label_values(axes: Axes, space: optuna.distributions.BaseDistribution, name: str) -> None:
    if isinstance(space, CategoricalDistribution):
        axes.set_xticks(range(len(space.choices)), map(str, space.choices))
        axes.set_xlim(-0.5, len(space.choices) - 0.5)
    elif isinstance(space, FloatDistribution | IntDistribution) and space.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if space.high <= 1000 * space.low else (1,)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    if name.endswith(FACTOR):
        axes.set_xlabel("multiple of its typical value", fontsize=FONT - 1)


def plot_recipes(
    histories: Mapping[str, pd.DataFrame], images: str, majority: float, best_by: BestMetric
) -> Figure:
    """Plot balanced accuracy and loss on train and val, and the gap between them, a column per recipe.

    Args:
        histories: By recipe, a row per epoch with the columns of `engine.to_frame`.
        images: How many images val has, in words.
        majority: Balanced accuracy of the majority class on val.
        best_by: The val metric that chose the best epoch.
    """
    title = f"Values in the best epoch, chosen by {spell_metric(best_by)} on val ({images})"
    figure = build_figure(6.8, title)
    scores, losses = figure.subplots(2, len(histories), sharey="row", squeeze=False)
    for score, loss, (name, history) in zip(scores, losses, histories.items(), strict=True):
        values = history[f"val/{best_by}"]
        best = int(values.idxmin() if best_by == "loss" else values.idxmax())
        draw_splits(score, history, "balanced_accuracy", best, capitalize(name))
        score.axhline(majority, color=QUIET, linestyle="--", label="majority class (val)")
        draw_splits(loss, history, "loss", best, capitalize(name))
        for axes in (score, loss):
            mark_epochs(axes, history.index[-1])
    scores[0].set_ylim(0, 1.02)
    scores[0].set_ylabel("Balanced accuracy", fontsize=FONT)
    every = pd.concat(histories.values())[["train/loss", "val/loss"]]
    # A loss that exploded once would flatten all curves.
    losses[0].set_ylim(0, 1.2 * every.stack().quantile(0.95))
    losses[0].set_ylabel("Loss", fontsize=FONT)
    draw_legend(figure)
    return figure
