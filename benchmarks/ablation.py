"""Which parts of the recipe matter: one change at a time from a base, compared on val over several seeds.

    python -m benchmarks.ablation train --data FOLDER --weights FILE [--only NAME,NAME] [--seeds 3]
    python -m benchmarks.ablation report

Two of the first, started at once with different --only, share the cores: each uses one thread. A training
that has finished is not repeated, one that was killed is resumed, so the same command continues. Test is
never evaluated. The runs are in the MLflow experiment `ablation`, and the report is a table in Markdown.
"""

import argparse
import os
import subprocess
import sys
import zlib
from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd

from skin_resnet.commands.compare import read_predictions
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.calibration import apply_temperature, decide, fit_tau, get_val_predictions
from skin_resnet.evaluation.metrics import Predictions, compare_models, compute_metrics
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.classifier import build_network
from skin_resnet.tracking.history import read_run
from skin_resnet.tracking.models import read_finished
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import predict

EXPERIMENT = "ablation"
METRICS = ("loss", "balanced_accuracy", "accuracy", "macro_auc")
BASE: dict[str, object] = {
    "image_size": 64, "train_fraction": 1, "epochs": 10, "batch_size": 64, "optimizer": "adamw",
    "lr": 0.0005, "weight_decay": 0.05, "lr_schedule": "onecycle", "warmup_epochs": 0,
    "class_weighting": "none", "label_smoothing": 0, "ema_decay": 0.99, "augment": "crops",
    "precision": "bf16", "test": "never",
}  # fmt: skip
CHANGES: dict[str, dict[str, object]] = {
    "base": {},
    "augment none": {"augment": "none"},
    "augment flips": {"augment": "flips"},
    "augment colors": {"augment": "colors"},
    "augment light": {"augment": "light"},
    "augment standard": {"augment": "standard"},
    "augment strong": {"augment": "strong"},
    "class weights sqrt": {"class_weighting": "sqrt"},
    "class weights balanced": {"class_weighting": "balanced"},
    "label smoothing 0.05": {"label_smoothing": 0.05},
    "no EMA": {"ema_decay": 0},
    "MixUp 0.2": {"mixup": 0.2},
    "CutMix 0.5": {"cutmix": 0.5},
    "dropout 0.3": {"dropout": 0.3},
    "stochastic depth 0.1": {"stochastic_depth": 0.1},
    "lr 0.001": {"lr": 0.001},
    "lr 0.002": {"lr": 0.002},
    "lr 0.00025": {"lr": 0.00025},
    "layer decay 0.7": {"layer_decay": 0.7},
    "batch size 32": {"batch_size": 32},
    "fp32": {"precision": "fp32"},
    "weight decay 0.2": {"weight_decay": 0.2},
    "cosine": {"lr_schedule": "cosine", "warmup_epochs": 1},
}


def train(names: list[str], seeds: int) -> None:
    """Train what is missing, one seed of all recipes after the other."""
    for seed in range(seeds):
        for name in names:
            if (name, seed) in find_runs():
                continue
            given = {**BASE, **CHANGES[name], "seed": seed}
            command = [sys.executable, "-m", "skin_resnet", "train", "--resume", "auto"]
            for option, value in given.items():
                command += [f"--{option}", str(value)]
            print(f"\n{name}, seed {seed}", flush=True)
            subprocess.run(command, check=True)


def find_runs() -> dict[tuple[str, int], str]:
    """Return the ids of the finished runs by recipe and seed."""
    runs = mlflow.search_runs(
        experiment_names=[EXPERIMENT], filter_string="attributes.status = 'FINISHED'", output_format="list"
    )
    found = {}
    fields = TrainConfig.model_fields
    unchanged = {key: fields[key].default for changes in CHANGES.values() for key in changes}
    for name, changes in CHANGES.items():
        wanted = {key: str(value) for key, value in {**unchanged, **BASE, **changes}.items()}
        for run in runs:
            if all(_is_same(run.data.params[key], value) for key, value in wanted.items()):
                found[name, int(run.data.params["seed"])] = run.info.run_id
    return found


def _is_same(text: str, value: str) -> bool:
    try:
        return float(text) == float(value)
    except ValueError:
        return text == value


def report() -> None:
    """Print the tables: each recipe's means over the seeds that it shares with the base, and their signal."""
    runs = find_runs()
    models: dict[str, list[Predictions]] = {}
    pairs: dict[str, list[Predictions]] = {}  # the base's, of a recipe's seeds
    gaps = {}
    seeds = sorted(seed for name, seed in runs if name == "base")
    base = [read_run(runs["base", seed], "val") for seed in seeds]
    for name in CHANGES:
        shared = [seed for seed in seeds if (name, seed) in runs]
        found = [read_run(runs[name, seed], "val") for seed in shared]
        if found:
            models[name] = [read_predictions(run.predictions).plain for run in found]
            pairs[name] = [models["base"][seeds.index(seed)] for seed in shared]
            gaps[name] = f"{np.mean([run.metrics['final_gap'] for run in found]):+.3f}"
    lesions = join_lesions(base[0].predictions).to_numpy(str)
    counts = np.array(read_finished(base[0].run_id)["class_counts"])
    models["base, adjusted decision"] = [_adjust_crosswise(each, counts, lesions) for each in models["base"]]
    models["base, 8 views (TTA)"] = [_predict_views(run.run_id) for run in base]
    mean = np.mean([each.probabilities for each in models["base"]], axis=0)
    models["base, ensemble of the seeds"] = [replace(models["base"][0], probabilities=mean)]
    print(_tabulate(models, pairs, gaps, lesions), "\n", _tabulate_signal(models), sep="\n")


def _tabulate(
    models: dict[str, list[Predictions]],
    pairs: dict[str, list[Predictions]],
    gaps: dict[str, str],
    lesions: np.ndarray,
) -> str:
    rows = []
    for name, trainings in models.items():
        scores = pd.DataFrame([vars(compute_metrics(each)) for each in trainings]).mean()
        cells = [name, str(len(trainings)), *(f"{scores[metric]:.3f}" for metric in METRICS)]
        differences = ["", ""]
        if name != "base":
            base = pairs.get(name, models["base"])
            pair = compare_models({"base": base, name: trainings}, lesions)[1].set_index("metric")
            differences = [
                f"{100 * row.value:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]"
                for row in pair.loc[["macro_auc", "balanced_accuracy"]].itertuples()
            ]
        rows.append([*cells, gaps.get(name, ""), *differences])
    header = [
        "recipe",
        "n",
        "loss",
        "balanced acc.",
        "accuracy",
        "macro AUC",
        "gap",
        "AUC - base",
        "bal. - base",
    ]
    return format_table(header, rows)


def _tabulate_signal(models: dict[str, list[Predictions]]) -> str:
    """Compare how far recipes lie apart with how far seeds of one recipe do: the objective's signal."""
    values = pd.concat(
        {
            name: pd.DataFrame([vars(compute_metrics(each)) for each in models[name]])
            for name in CHANGES
            if len(models.get(name, ())) > 1
        }
    )
    within = np.sqrt(values.groupby(level=0).var().mean())
    between = values.groupby(level=0).mean().std()
    rows = [
        [metric, f"{within[metric]:.4f}", f"{between[metric]:.4f}", f"{between[metric] / within[metric]:.1f}"]
        for metric in METRICS
    ]
    return format_table(["val metric", "sd over seeds", "sd over recipes", "ratio"], rows)


def _adjust_crosswise(plain: Predictions, counts: np.ndarray, lesions: np.ndarray) -> Predictions:
    """Decide by p / prior**tau, with tau fitted on the other half of the lesions."""
    half = np.array([zlib.crc32(lesion.encode()) % 2 for lesion in lesions])
    decisions = np.zeros_like(plain.targets)
    for side in (0, 1):
        weights = counts.astype(float) ** -fit_tau(plain.select(half != side), counts)
        decisions[half == side] = decide(plain, weights).predicted[half == side]
    return replace(plain, decisions=decisions)


def _predict_views(run_id: str) -> Predictions:
    checkpoint = read_finished(run_id)
    config = TrainConfig.model_validate(checkpoint["config"])
    data = prepare_data(config)
    fabric = build_fabric("auto", config.precision, devices=1)
    _, val = data.build_loaders(fabric, config.batch_size)
    probabilities = predict(build_network(checkpoint).to(fabric.device), val, fabric, views=8)
    predictions = replace(get_val_predictions(checkpoint), probabilities=probabilities)
    return apply_temperature(predictions, checkpoint["calibration"]["temperature"])


def main() -> None:
    """Train or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["train", "report"])
    parser.add_argument("--only", default=",".join(CHANGES), help="Recipes, comma-separated.")
    parser.add_argument("--seeds", type=int, default=3)
    arguments, options = parser.parse_known_args()
    BASE.update(zip((name.removeprefix("--") for name in options[::2]), options[1::2], strict=True))
    os.environ.update(
        MLFLOW_EXPERIMENT_NAME=EXPERIMENT, OMP_NUM_THREADS="1", MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false"
    )
    if arguments.action == "train":
        train(arguments.only.split(","), arguments.seeds)
    else:
        report()


if __name__ == "__main__":
    main()
