"""What a search found, as one page and figures on its run."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence

import optuna
from optuna import Study
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from search.config import DIRECTIONS, SearchConfig
from search.space import Choice, Part, Range, Space, build_space
from search.trials import drop_retried, find_front, is_within_gap
from search.verdict import Verdict
from search.winner import SEED, WINNER, Retrained, compute_mean
from skin_resnet.evaluation.comparison import format_difference
from skin_resnet.evaluation.formatting import format_score, format_table, spell_metric
from skin_resnet.evaluation.metrics import HEADLINES
from skin_resnet.evaluation.plots import search as plots
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking import search_runs

_EDGE = 0.03  # share of a range that counts as its edge


def log_figures(config: SearchConfig, study: Study, best: FrozenTrial) -> None:
    """Log the figures that need trials only."""
    points = [to_point(config, trial) for trial in drop_retried(study.get_trials(deepcopy=False))]
    objective = config.objective_names[0]
    maximize = DIRECTIONS[objective] == "maximize"
    scales = {name: _get_scale(part) for name, part in build_space(config).parts.items()}
    figures = {
        "history": plots.plot_history(points, objective, maximize=maximize),
        "epochs": plots.plot_epochs(points, config.epochs),
    }
    if best.params:
        figures["slices"] = plots.plot_slices(points, scales, objective)
        figures["parallel_coordinates"] = plots.plot_parallel(points, scales, best.number, maximize=maximize)
    importances = compute_importances(study)
    if importances:
        finished = sum(point.state == "COMPLETE" for point in points)
        figures["importances"] = plots.plot_importances(importances, finished)
    for name, figure in figures.items():
        mlflow_run.log_figure(figure, f"figures/{name}.png")


def _get_scale(part: Part) -> str | tuple[str, ...]:
    if isinstance(part, Choice):
        return tuple(map(str, part.values))
    return "log" if part.log else "linear"


def log_curves(runs: dict[str, str]) -> None:
    """Log the curves of seed recipe and winner side by side, from their runs by recipe."""
    curves = {name: search_runs.read_curves(run_id) for name, run_id in runs.items()}
    metrics = {name: search_runs.read_metrics(run_id) for name, run_id in runs.items()}
    best = {name: (int(each["best/epoch"]), each["best/gap"]) for name, each in metrics.items()}
    images = search_runs.read_tag(next(iter(runs.values())), "split.val")
    mlflow_run.log_figure(plots.plot_recipes(curves, best, images), "figures/recipes.png")


def to_point(config: SearchConfig, trial: FrozenTrial) -> plots.Point:
    """Give a trial as it is drawn."""
    value = math.nan
    if trial.state == TrialState.COMPLETE:
        value = trial.values[0]
    elif trial.intermediate_values:
        value = trial.intermediate_values[max(trial.intermediate_values)]
    return plots.Point(
        number=trial.number,
        value=value,
        state=trial.state.name,
        params=trial.params,
        epochs=trial.user_attrs.get("epochs", 0),
        label=trial.user_attrs.get("baseline", ""),
        may_win=trial.state == TrialState.COMPLETE and is_within_gap(config, trial),
    )


def compute_importances(study: Study) -> dict[str, float]:
    """Compute how much each part mattered; nothing where too few trials finished to tell."""
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < 8:
        return {}
    # PED-ANOVA asks what leads to low values.
    sign = -1 if study.directions[0] == StudyDirection.MAXIMIZE else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return optuna.importance.get_param_importances(
            study, evaluator=PedAnovaImportanceEvaluator(), target=lambda trial: sign * trial.values[0]
        )


def find_edges(space: Space, trial: FrozenTrial) -> list[str]:
    """Tell of each range on whose edge a trial sits, where better may lie beyond; 0 has no beyond."""
    told: list[str] = []
    if "baseline" in trial.user_attrs:
        return told  # no sampler put it there
    for name, part in space.parts.items():
        if not isinstance(part, Range) or name not in trial.params:
            continue
        value, low, high = (float(each) for each in (trial.params[name], part.low, part.high))
        if part.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        place = (value - low) / (high - low)
        if place >= 1 - _EDGE or (place <= _EDGE and part.low > 0):
            told.append(
                f"{plots.spell_part(name)} = {trial.params[name]:.3g} is at the edge of "
                f"{part.low:g} to {part.high:g}: better may lie beyond."
            )
    return told


def describe_trials(config: SearchConfig, trials: Sequence[FrozenTrial], best: FrozenTrial) -> str:
    """Tell what was tried, what the pruner saved, and what failed."""
    kept = drop_retried(trials)
    states = Counter(trial.state.name for trial in kept)
    pruned = [trial for trial in kept if trial.state == TrialState.PRUNED]
    saved = sum(config.epochs - trial.user_attrs.get("epochs", 0) for trial in pruned)
    run = sum(trial.user_attrs.get("epochs", 0) for trial in kept)
    gap = "" if "gap" in config.objective_names else f"gap {best.user_attrs['gap']:+.3f}, "
    lines = [
        f"- {len(kept)} trials: {states['COMPLETE']} finished, {states['PRUNED']} pruned, {states['FAIL']} "
        f"failed; {len(trials) - len(kept)} killed and run again.",
        f"- Best: trial {best.number} ({best.user_attrs.get('baseline', config.sampler)}), "
        f"{_spell_values(config, best)}, {gap}epoch {best.user_attrs['best_epoch']}.",
        f"- {run} epochs were run of {config.epochs * len(kept)} asked for; pruning saved {saved}.",
        *_describe_front(config, kept),
        *(f"- **{told}**" for told in find_edges(build_space(config), best)),
    ]
    if config.max_gap > 0 and best.user_attrs["gap"] > config.max_gap:
        lines.append(f"- **No trial kept its gap within {config.max_gap:g}; this one is the nearest.**")
    failed = [trial for trial in kept if trial.state == TrialState.FAIL]
    reasons = Counter(trial.user_attrs.get("failure", "killed again and again") for trial in failed)
    lines += [f"- Failed {count} x: {reason.splitlines()[0]}" for reason, count in reasons.most_common(3)]
    return "\n".join(lines)


def _spell_values(config: SearchConfig, trial: FrozenTrial) -> str:
    named = zip(config.objective_names, trial.values, strict=True)
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in named)


def _describe_front(config: SearchConfig, trials: Sequence[FrozenTrial]) -> list[str]:
    """List the trials that no other one is better than in every way, where there are several objectives."""
    if len(config.objective_names) == 1:
        return []
    front = find_front(config, trials)
    return [f"- On the Pareto front: trial {each.number}, {_spell_values(config, each)}." for each in front]


def describe_verdict(retrained: list[Retrained], verdict: Verdict | None, best: FrozenTrial) -> str:
    """Tell what retraining and test say of winner and seed recipe."""
    recipes = list(dict.fromkeys(each.recipe for each in retrained))
    header = ["", "val", "gap", *(f"test {spell_metric(name)}" for name in HEADLINES if verdict)]
    rows = []
    for recipe in recipes:
        scores = [format_score(*verdict.figures[recipe][name]) for name in HEADLINES] if verdict else []
        val, gap = (compute_mean(retrained, recipe, name) for name in ("val", "gap"))
        rows.append([recipe, f"{val:.3f}", f"{gap:+.3f}", *scores])
    winner = recipes[-1]
    seeds = sum(each.recipe == winner for each in retrained)
    mean = compute_mean(retrained, winner, "val")
    in_study = best.user_attrs["val/balanced_accuracy"]
    lines = [
        f"Means over {seeds} seed{'s' * (seeds > 1)}; balanced accuracy on val, and its gap to train.",
        "",
        format_table(header, rows),
        "",
        _judge(winner, verdict),
        *(f"- {format_difference(difference)}" for difference in (verdict.differences if verdict else ())),
        f"- Best-of-N optimism: the winner's {in_study:.3f} on val in the study is {mean:.3f} retrained "
        f"({in_study - mean:+.3f}); the best of many tries is in part luck.",
    ]
    return "\n".join(lines)


def _judge(winner: str, verdict: Verdict | None) -> str:
    if winner == SEED:
        return "**No recipe was better on val than the seed recipe itself.**\n"
    if verdict is None:
        return "Test was not opened.\n"
    difference = verdict.differences[HEADLINES.index("balanced_accuracy")]
    if difference.low > 0:
        return f"**The {WINNER} beats the {SEED} on test.**\n"
    if difference.high < 0:
        return f"**The {SEED} beats the {WINNER} on test: what the search found on val did not hold.**\n"
    return (
        f"**The {WINNER} does not beat the {SEED} on test beyond chance: the interval of their difference "
        "holds 0. This test cannot tell so small a difference, or there is none.**\n"
    )
