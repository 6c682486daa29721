"""The winner: retrained with several seeds beside the baseline recipe, tested once, and registered."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from optuna import Study
from optuna.trial import FrozenTrial, TrialState

from search.config import SearchConfig
from search.outages import open_child, wait_for_server
from search.space import BASELINE_RECIPE
from search.study import get_study_id
from skin_resnet.commands.compare import read_predictions
from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.commands.train import open_test_split, report
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.data.split import join_lesions
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_metrics,
    compute_percentiles,
    compute_weighted,
    draw_lesions,
)
from skin_resnet.options import format_value
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.run import run_training

MAJORITY, BASELINE, WINNER, DIFFERENCE = "majority class", "baseline recipe", "winner", "difference"


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A recipe trained once more, with another seed.

    Attributes:
        config: As JSON.
        val: Balanced accuracy on val, at its best epoch.
        gap: The train-val gap there.
    """

    recipe: str
    config: str
    run_id: str
    model_uri: str
    val: float
    gap: float


def choose_recipes(
    config: SearchConfig, trials: Sequence[FrozenTrial], best: FrozenTrial
) -> dict[str, TrainConfig]:
    """Return baseline recipe and winner; the baseline recipe alone if it won."""
    baseline = find_baseline(trials)
    fallback = config.training.with_changes(**BASELINE_RECIPE)
    recipes = {BASELINE: _read_config(baseline) if baseline else fallback, WINNER: _read_config(best)}
    return recipes if recipes[WINNER] != recipes[BASELINE] else {BASELINE: recipes[BASELINE]}


def find_baseline(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Return the finished trial of the baseline recipe."""
    finished = (trial for trial in trials if trial.state == TrialState.COMPLETE)
    return next((trial for trial in finished if trial.user_attrs.get("baseline") == BASELINE), None)


def _read_config(trial: FrozenTrial) -> TrainConfig:
    return TrainConfig.model_validate_json(trial.user_attrs["config"])


def retrain(
    config: SearchConfig, study: Study, recipes: dict[str, TrainConfig], parent_run_id: str
) -> list[Retrained]:
    """Train each recipe with `config.seeds` seeds, in child runs; skip what a killed search has finished.

    The trials' own seed is not among them: it may be what made the winner win.
    """
    return [
        _retrain_once(study, recipe, each.with_changes(seed=each.seed + number), parent_run_id)
        for number in range(1, config.seeds + 1)
        for recipe, each in recipes.items()
    ]


def _retrain_once(study: Study, recipe: str, config: TrainConfig, parent_run_id: str) -> Retrained:
    key = f"retrained {recipe}, seed {config.seed}"
    kept: dict[str, Any] = study.user_attrs.get(key, {})
    if kept.get("config") == config.model_dump_json() and _has_checkpoint(kept["run_id"]):
        return Retrained(**kept)
    retrained = _train_in_child(study, recipe, config, parent_run_id)
    study.set_user_attr(key, asdict(retrained))
    return retrained


def _has_checkpoint(run_id: str) -> bool:
    try:
        wait_for_server(lambda: finished_runs.download_checkpoint(run_id))
    except UserError:
        return False  # somebody has deleted it
    return True


def _train_in_child(study: Study, recipe: str, config: TrainConfig, parent_run_id: str) -> Retrained:
    name = f"{recipe}, seed {config.seed}"
    print(f"\n{name}")
    tags = {finished_runs.STUDY: get_study_id(study), "search.recipe": recipe}
    with open_child(name, parent_run_id, tags) as (run, tracker):
        result = run_training(config, tracker=tracker)
        run.describe(report(run, result))
        model_uri = wait_for_server(lambda: run.log_model(result.checkpoint_path, result.data.classes))
    return Retrained(
        recipe=recipe,
        config=config.model_dump_json(),
        run_id=run.run_id,
        model_uri=model_uri,
        val=result.best.val.balanced_accuracy,
        gap=result.best.gap,
    )


def evaluate_on_test(run: TrackedRun, retrained: Sequence[Retrained]) -> tuple[pd.DataFrame, str]:
    """Evaluate all recipes and seeds on test, and log each one's metrics on its run.

    Returns:
        What `compare_recipes` returns, and a warning if test was evaluated before, or leaks.
    """
    config = TrainConfig.model_validate_json(retrained[0].config)
    data = prepare_data(config)
    table, warning = open_test_split(run, config, data)
    predictions: dict[str, list[Predictions]] = {}
    for each in retrained:

        def evaluate(run_id: str = each.run_id) -> Predictions:
            checkpoint = read_checkpoint(finished_runs.download_checkpoint(run_id))
            with open_run(run_id=run_id) as child:
                assess_and_log(child, checkpoint, table, data.store, config)
            return read_predictions(finished_runs.read_run(run_id, "test").predictions)

        predictions.setdefault(each.recipe, []).append(wait_for_server(evaluate))
    return compare_recipes(predictions, join_lesions(table).to_numpy(str)), warning


def compare_recipes(recipes: Mapping[str, Sequence[Predictions]], lesions: NDArray[np.str_]) -> pd.DataFrame:
    """Compute each recipe's mean metrics over its seeds, beside the majority class, and their difference.

    All are computed on the same drawn lesions: what is hard for both recipes cancels in their difference. The
    intervals say what other lesions would have changed, not what other seeds would have.

    Args:
        recipes: Predictions of the same N images by recipe, one per seed.
        lesions: Lesion of each image, (N,).

    Returns:
        Columns value, low, high; index recipe and metric. The difference is the winner minus the baseline
        recipe, and missing if that won.
    """
    first = next(iter(recipes.values()))[0]
    # The same for each image: how frequent each class is.
    shares = np.bincount(first.targets, minlength=first.probabilities.shape[1]) / len(first.targets)
    constant = replace(first, probabilities=np.tile(shares, (len(first.targets), 1)))
    weights = draw_lesions(lesions)
    values: dict[tuple[str, str], tuple[float, Any]] = {}
    for recipe, seeds in {MAJORITY: [constant], **recipes}.items():
        metrics = [compute_metrics(each) for each in seeds]
        draws = [compute_weighted(each, weights) for each in seeds]
        for name in HEADLINES:
            mean = float(np.mean([getattr(each, name) for each in metrics]))
            values[recipe, name] = (mean, np.mean([each[name] for each in draws], axis=0))
    if WINNER in recipes:
        for name in HEADLINES:
            pairs = zip(values[WINNER, name], values[BASELINE, name], strict=True)
            values[DIFFERENCE, name] = tuple(winner - baseline for winner, baseline in pairs)
    return pd.DataFrame.from_dict(
        {key: (value, *compute_percentiles(draws)) for key, (value, draws) in values.items()},
        orient="index",
        columns=["value", "low", "high"],
    ).set_axis(pd.MultiIndex.from_tuples(values, names=["recipe", "metric"]))


def register(config: SearchConfig, retrained: Sequence[Retrained], scores: pd.DataFrame | None) -> str:
    """Register the winner's model with the highest val score; return a sentence about it.

    It is not registered if the winner's mean is not above the score of always predicting the majority class.
    """
    best = max((each for each in retrained if each.recipe == retrained[-1].recipe), key=lambda each: each.val)
    data = prepare_data(TrainConfig.model_validate_json(best.config))
    metrics, majority = {"val/balanced_accuracy": best.val}, 1 / len(data.classes)
    if scores is not None:
        metrics["test/balanced_accuracy"] = float(scores.value[best.recipe, "balanced_accuracy"])
        majority = float(scores.value[MAJORITY, "balanced_accuracy"])
    return wait_for_server(
        lambda: finished_runs.register_model(
            best.model_uri, config.model_name, metrics=metrics, baseline=majority, split_hash=data.split.hash
        )
    )


def compute_mean(retrained: Sequence[Retrained], recipe: str, name: str) -> float:
    """Return the mean of `val` or `gap` over a recipe's seeds."""
    return float(np.mean([getattr(each, name) for each in retrained if each.recipe == recipe]))


def write_command(config: TrainConfig) -> str:
    """Return the command that trains with a config: the options that differ from the defaults."""
    defaults = TrainConfig.model_validate({})
    options = [
        f"--{name}={format_value(value)}"
        for name, value in config.model_dump().items()
        if value != getattr(defaults, name)
    ]
    return shlex.join(["skin-resnet", "train", *options])
