"""The page of a search: what was tried, and the results of retraining and test."""

import json
import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from optuna import Study
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from search.config import SearchConfig
from search.space import BASELINE, Space, build_space
from search.study import MAX_RETRIES, choose_best, drop_retried, find_front, get_study_id, list_ended
from skin_resnet.evaluation.metrics import HEADLINES, Predictions, compare_models, predict_always
from skin_resnet.evaluation.page import format_score, format_table, spell_metric
from skin_resnet.tracking.links import link_run, link_view

MAJORITY, WINNER, DIFFERENCE = "majority class", "winner", "difference"
_EDGE = 0.03  # share of a range that counts as its edge


def describe_trials(config: SearchConfig, study: Study, best: FrozenTrial) -> str:
    """Describe what was tried, what pruning saved, and what failed."""
    trials = study.get_trials(deepcopy=False)
    kept = drop_retried(trials)
    epochs_run = sum(trial.user_attrs.get("epochs", 0) for trial in kept)
    pruned = [trial.user_attrs.get("epochs", 0) for trial in kept if trial.state == TrialState.PRUNED]
    saved = config.epochs * len(pruned) - sum(pruned)
    gap = "" if "gap" in config.objective_names else f"gap {best.user_attrs['gap']:+.3f}, "
    lines = [
        f"- {len(kept)} trials: {_count_states(kept)}; {len(trials) - len(kept)} were killed and run again.",
        f"- Best: trial {best.number} ({best.user_attrs.get('baseline', config.sampler)}), "
        f"{_format_values(config, best)}, {gap}best epoch {best.user_attrs['best_epoch']}.",
        f"- {epochs_run} of {config.epochs * len(kept)} epochs were run; pruning saved {saved}.",
    ]
    if len(config.objective_names) > 1:
        front = find_front(config, study)
        lines += [f"- Pareto front: trial {each.number}, {_format_values(config, each)}." for each in front]
    lines += [f"- **{warning}**" for warning in find_edges(build_space(config), best)]
    if 0 < config.max_gap < best.user_attrs["gap"]:
        lines.append(
            f"- **No trial has a gap within max_gap={config.max_gap:g}; the trial with the smallest gap was "
            "chosen.**"
        )
    failed = [trial for trial in kept if trial.state == TrialState.FAIL]
    reasons = Counter(
        trial.user_attrs.get("failure", f"killed more than {MAX_RETRIES} times") for trial in failed
    )
    lines += [f"- Failed {count} x: {reason.splitlines()[0]}" for reason, count in reasons.most_common(3)]
    return "\n".join(lines)


def describe_progress(config: SearchConfig, study: Study, run_id: str, left_s: float) -> str:
    """Describe the best trial so far, how many have ended, and how long the others take (NaN: unknown)."""
    best = choose_best(config, study)
    ended = list_ended(study.get_trials(deepcopy=False))
    head = f"Best so far: {link_trial(config, best)}" if best else "No trial has finished yet"
    scope = " with retraining" if config.seeds else ""
    left = f"; about {_format_duration(left_s)} left{scope}" if left_s > 0 else ""
    runs = link_view(run_id, name_view(config, study), "the trials' runs")
    return (
        f"**{head}.** {len(ended)} of {config.n_trials} trials have ended: {_count_states(ended)}{left}. "
        f"See {runs}."
    )


def _count_states(trials: Sequence[FrozenTrial]) -> str:
    states = Counter(trial.state for trial in trials)
    names = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
    return ", ".join(f"{states[state]} {name}" for state, name in names.items())


def _format_duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"


def name_view(config: SearchConfig, study: Study) -> str:
    """Return the name of the saved view of the runs table that shows a study's trials and retrainings."""
    return f"search-{config.study}-{get_study_id(study)[:8]}"


def link_trial(config: SearchConfig, trial: FrozenTrial) -> str:
    """Return a link to a finished trial's run, with its objectives."""
    link = link_run(trial.user_attrs["run_id"], f"trial {trial.number}")
    return f"{link}, {_format_values(config, trial)}"


class TrialProgress:
    """Prints a line for each trial of a study that ends: `4/30 trial 3: adam 0.00045 strong -> 0.612 ...`."""

    def __init__(self, config: SearchConfig, study: Study) -> None:
        self._config, self._study = config, study
        self._start_s = time.monotonic()
        self._shown = {trial.number for trial in list_ended(study.get_trials(deepcopy=False))}
        self._ended_before = len(self._shown)

    def estimate_left_s(self) -> float:
        """Return how long the trials and retrainings that are left will take; NaN if nothing shows it yet."""
        ended = list_ended(self._study.get_trials(deepcopy=False))
        left = max(0, self._config.n_trials - len(ended))
        if left and len(ended) == self._ended_before:
            return math.nan
        trial_s = (time.monotonic() - self._start_s) / max(1, len(ended) - self._ended_before)
        return left * trial_s + estimate_retraining_s(self._config, ended)

    def show(self) -> int:
        """Print the trials that have ended since the last call; return how many have ended in all."""
        for trial in list_ended(self._study.get_trials(deepcopy=False)):
            if trial.number not in self._shown:
                self._shown.add(trial.number)
                print(self._describe(trial), flush=True)
        return len(self._shown)

    def _describe(self, trial: FrozenTrial) -> str:
        options = json.loads(trial.user_attrs.get("config", "{}"))
        recipe = "{optimizer} {lr:.2g} {augment}".format(**options) if options else "not started"
        outcome = {
            TrialState.COMPLETE: f"{trial.values[0]:.3f}" if trial.values else "",
            TrialState.PRUNED: f"pruned in epoch {trial.user_attrs.get('epochs', 0)}",
        }.get(trial.state, "failed")
        line = f"{len(self._shown)}/{self._config.n_trials} trial {trial.number}: {recipe} -> {outcome}"
        if trial.state == TrialState.COMPLETE and (best := choose_best(self._config, self._study)):
            line += f" (best {best.values[0]:.3f}, trial {best.number})"
        left_s = self.estimate_left_s()
        return line if math.isnan(left_s) else f"{line}, {_format_duration(left_s)} left"


def estimate_retraining_s(config: SearchConfig, ended: Sequence[FrozenTrial]) -> float:
    """Return how long retraining winner and baseline recipe will take; NaN before any epoch was run."""
    if not config.seeds:
        return 0.0
    spans = [
        (trial.duration.total_seconds(), trial.user_attrs["epochs"])
        for trial in ended
        if trial.duration and trial.user_attrs.get("epochs")
    ]
    retrained = config.change_for_retraining(config.training)
    work = retrained.epochs * retrained.train_fraction / config.train_fraction
    if isinstance(retrained.image_size, int) and isinstance(config.image_size, int):
        work *= (retrained.image_size / config.image_size) ** 2
    seconds, epochs = map(sum, zip(*spans, strict=True)) if spans else (math.nan, 1)
    return 2 * config.seeds * work * seconds / epochs


def _format_values(config: SearchConfig, trial: FrozenTrial) -> str:
    named = zip(config.objective_names, trial.values, strict=True)
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in named)


def find_edges(space: Space, trial: FrozenTrial) -> list[str]:
    """Return a warning for each range at whose edge a sampled trial lies, except at a lower edge of 0."""
    warnings = []
    for name, each in space.items():
        if isinstance(each, FloatDistribution) and "baseline" not in trial.user_attrs:
            scale = math.log if each.log else float
            value, low, high = (scale(number) for number in (trial.params[name], each.low, each.high))
            place = (value - low) / (high - low)
            if place >= 1 - _EDGE or (place <= _EDGE and each.low > 0):
                warnings.append(
                    f"{name} = {trial.params[name]:.3g} is at the edge of {each.low:g} to {each.high:g}; "
                    "better values may lie beyond it."
                )
    return warnings


def compare_recipes(recipes: Mapping[str, Sequence[Predictions]], lesions: NDArray[np.str_]) -> pd.DataFrame:
    """Compute each recipe's mean metrics over its seeds, beside the majority class, and their difference.

    Args:
        recipes: Predictions of the same N images by recipe, one per seed.
        lesions: Lesion of each image, (N,).

    Returns:
        Columns value, low, high; index model and metric. The difference is the winner minus the baseline
        recipe, and missing if that won.
    """
    first = next(iter(recipes.values()))[0]
    majority = predict_always(int(np.bincount(first.targets).argmax()), first)
    scores, pairs = compare_models({MAJORITY: [majority], **recipes}, lesions)
    difference = pairs[(pairs["first"] == WINNER) & (pairs.second == BASELINE)].assign(model=DIFFERENCE)
    return pd.concat([scores, difference.set_index(["model", "metric"])[scores.columns]])


def describe_winner(retrained: pd.DataFrame, scores: pd.DataFrame | None, best: FrozenTrial | None) -> str:
    """Describe the results of retraining and test of winner and baseline recipe.

    Args:
        retrained: A row per recipe and seed; columns recipe, val (balanced accuracy) and gap (the final gap).
        scores: From `compare_recipes`; None without a test.
        best: The winning trial; None if it was trained with other options.
    """
    means = retrained.groupby("recipe", sort=False)[["val", "gap"]].mean()
    winner, seeds = means.index[-1], len(retrained) // len(means)
    shown = means.index if scores is None else scores.index.unique("model")
    columns = shown[shown != DIFFERENCE]  # as a column, it would be the one too many for a terminal
    rows = [
        ["val balanced accuracy", *(f"{means.val[c]:.3f}" if c in means.index else "" for c in columns)],
        ["gap, last epoch", *(f"{means.gap[c]:+.3f}" if c in means.index else "" for c in columns)],
    ]
    if scores is not None:
        labels = {name: spell_metric(name) for name in HEADLINES} | {"plain_accuracy": "accuracy, plain"}
        for name, label in labels.items():
            rows.append([f"test {label}", *(_format_cell(scores, column, name) for column in columns)])
    parts = [
        f"**{_judge(winner, scores)}**",
        f"Mean of {seeds} seed{'s' * (seeds > 1)}; intervals (95 %) by bootstrap over lesions. "
        "Plain: the most probable class is predicted, whatever its prior.",
        format_table(["", *columns], rows),
    ]
    if scores is not None and DIFFERENCE in shown:
        cells = [f"{spell_metric(name)} {_format_cell(scores, DIFFERENCE, name)}" for name in HEADLINES]
        parts.append(f"- Difference, {WINNER} minus {BASELINE}: {', '.join(cells)}.")
    if best:
        mean, in_study = means.val[winner], best.user_attrs["val/balanced_accuracy"]
        is_biased = round(mean, 3) < round(in_study, 3)
        luck = ": the best of many trials is partly luck (selection bias)" if is_biased else ""
        parts.append(
            f"- The winner's balanced accuracy on val was {in_study:.3f} in the study and is {mean:.3f} "
            f"retrained{luck}."
        )
    return "\n\n".join(parts)


def _format_cell(scores: pd.DataFrame, model: str, metric: str) -> str:
    """Write a score with its interval; the majority class has none."""
    score = scores.loc[(model, metric)]
    return format_score(score.value, None if model == MAJORITY else (score.low, score.high))


def _judge(winner: str, scores: pd.DataFrame | None) -> str:
    if winner == BASELINE:
        return "No recipe was better on val than the baseline recipe."
    if scores is None:
        return "Test was not evaluated."
    low, high = scores.loc[(DIFFERENCE, "balanced_accuracy"), ["low", "high"]]
    pair = " against ".join(f"{scores.value[name, 'balanced_accuracy']:.3f}" for name in (WINNER, BASELINE))
    on_test = f"than the {BASELINE} on test, balanced accuracy {pair}"
    if low > 0:
        return f"The {WINNER} is better {on_test}."
    if high < 0:
        return f"The {WINNER} is worse {on_test}: what was found on val did not generalize."
    return f"The {WINNER} is not significantly better {on_test}: the difference's interval contains 0."
