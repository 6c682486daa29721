"""The winner: retrained with several seeds beside the seed recipe, and only then tested, once."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from optuna import Study
from optuna.trial import FrozenTrial

from search.config import SearchConfig
from search.space import SEED_RECIPE
from search.trials import find_baseline
from search.verdict import Verdict, compare_recipes
from skin_resnet.commands.compare import read_predictions
from skin_resnet.commands.evaluate import assess_and_log
from skin_resnet.commands.train import break_seal, report
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.options import format_value
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking import search_runs
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.run import run_training

SEED, WINNER = "seed recipe", "winner"


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """A recipe trained once more, with a seed of its own.

    Attributes:
        val: Balanced accuracy on val, at its best epoch.
        gap: The generalization gap there.
    """

    recipe: str
    config: TrainConfig
    run_id: str
    checkpoint: Path
    model_uri: str
    val: float
    gap: float


def get_config(trial: FrozenTrial) -> TrainConfig:
    """Give what a trial trained with."""
    return TrainConfig.model_validate_json(trial.user_attrs["config"])


def choose_recipes(
    config: SearchConfig, trials: list[FrozenTrial], best: FrozenTrial
) -> dict[str, TrainConfig]:
    """Give the seed recipe and the winner; the seed recipe alone where it won."""
    seed_trial = find_baseline(trials, SEED)
    seed = get_config(seed_trial) if seed_trial else config.training.with_changes(**SEED_RECIPE)
    winner = get_config(best)
    return {SEED: seed} if winner == seed else {SEED: seed, WINNER: winner}


def retrain(
    config: SearchConfig, study: Study, recipes: dict[str, TrainConfig], parent_run_id: str
) -> list[Retrained]:
    """Train each recipe with `config.seeds` seeds, in child runs; what a killed search finished is kept.

    None is the seed of the trials: with that one, the winner would only repeat what made it the winner.
    """
    return [
        _retrain_once(study, recipe, each.with_changes(seed=each.seed + number), parent_run_id)
        for number in range(1, config.seeds + 1)
        for recipe, each in recipes.items()
    ]


def _retrain_once(study: Study, recipe: str, config: TrainConfig, parent_run_id: str) -> Retrained:
    key = f"retrained {recipe}, seed {config.seed}"
    kept: dict[str, Any] = study.user_attrs.get(key, {})
    if kept.get("config") != config.model_dump_json() or not Path(kept["checkpoint"]).is_file():
        kept = _train_in_child(study, recipe, config, parent_run_id)
        study.set_user_attr(key, kept)
    checkpoint = Path(kept["checkpoint"])
    rest = {name: kept[name] for name in ("run_id", "model_uri", "val", "gap")}
    return Retrained(recipe=recipe, config=config, checkpoint=checkpoint, **rest)


def _train_in_child(study: Study, recipe: str, config: TrainConfig, parent_run_id: str) -> dict[str, Any]:
    print(f"\n{recipe}, seed {config.seed}")
    tags = {search_runs.STUDY: study.user_attrs["id"], "search.recipe": recipe}
    with search_runs.open_child(parent_run_id, f"{recipe}, seed {config.seed}", tags) as run_id:
        result = run_training(config)
        mlflow_run.log_note(report(config, result))
        model_uri = mlflow_run.log_model(result.checkpoint, result.data.classes)
    return {
        "config": config.model_dump_json(),
        "run_id": run_id,
        "checkpoint": str(result.checkpoint.resolve()),
        "model_uri": model_uri,
        "val": result.best.val.balanced_accuracy,
        "gap": result.best.gap,
    }


def score_on_test(retrained: list[Retrained]) -> tuple[Verdict, str]:
    """Open test, once for all recipes and seeds; log each one's scores on its run.

    Returns:
        What test says, and a warning where it was opened before, or leaks.
    """
    config = retrained[0].config
    data = prepare_data(config)
    table, warning = break_seal(config, data)
    predictions: dict[str, list[Predictions]] = {}
    for each in retrained:
        with search_runs.reopen_child(each.run_id):
            assess_and_log(read_checkpoint(each.checkpoint), table, data.store, each.config, "test")
        run = finished_runs.read_run(each.run_id, "test")
        predictions.setdefault(each.recipe, []).append(read_predictions(run.predictions))
    return compare_recipes(predictions, join_lesions(table).to_numpy(str)), warning


def register(config: SearchConfig, retrained: list[Retrained]) -> str:
    """Register the winner's model that is the best on val; tell in a sentence."""
    best = max(choose_winners(retrained), key=lambda each: each.val)
    split_hash = prepare_data(best.config).split.hash
    return search_runs.register_model(best.model_uri, config.model_name, best.val, split_hash)


def choose_winners(retrained: list[Retrained]) -> list[Retrained]:
    """Give the retrained runs of the winner, which may be the seed recipe."""
    return [each for each in retrained if each.recipe == retrained[-1].recipe]


def compute_mean(retrained: list[Retrained], recipe: str, name: str) -> float:
    """Average `val` or `gap` over a recipe's seeds."""
    return float(np.mean([getattr(each, name) for each in retrained if each.recipe == recipe]))


def write_command(config: TrainConfig) -> str:
    """Write the command that trains with a config: the options that differ from the defaults."""
    defaults = TrainConfig.model_validate({})
    options = [
        f"--{name}={format_value(value)}"
        for name, value in config.model_dump().items()
        if value != getattr(defaults, name)
    ]
    return shlex.join(["python", "-m", "skin_resnet", "train", *options])
