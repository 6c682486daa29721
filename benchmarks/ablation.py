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

import mlflow
import pandas as pd

from skin_resnet.commands.compare import read_predictions
from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.metrics import compare_models, compute_metrics
from skin_resnet.evaluation.page import format_table
from skin_resnet.tracking.history import read_run

EXPERIMENT = "ablation"
BASE: dict[str, object] = {
    "image_size": 64, "epochs": 7, "batch_size": 64, "optimizer": "adamw", "lr": 0.0005, "weight_decay": 0.05,
    "lr_schedule": "onecycle", "warmup_epochs": 0, "class_weighting": "none", "label_smoothing": 0,
    "ema_decay": 0.99, "augment": "crops", "test": "never",
}  # fmt: skip
CHANGES: dict[str, dict[str, object]] = {
    "base": {},
    "augment none": {"augment": "none"},
    "augment flips": {"augment": "flips"},
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
    "batch size 32": {"batch_size": 32},
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
    for name, changes in CHANGES.items():
        wanted = {key: str(value) for key, value in {**BASE, **changes}.items()}
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
    """Print the table: means over the seeds that base and recipe share, and paired differences from base."""
    runs = find_runs()
    seeds_of = {name: {seed for each, seed in runs if each == name} for name in CHANGES}
    rows = []
    for name in CHANGES:
        shared = sorted(seeds_of["base"] & seeds_of[name])
        if shared:
            pairs = {each: [read_run(runs[each, seed], "val") for seed in shared] for each in ("base", name)}
            rows.append([name, str(len(shared)), *_describe(pairs, name)])
    header = [
        "recipe",
        "seeds",
        "loss",
        "balanced acc.",
        "accuracy",
        "macro AUC",
        "gap",
        "AUC - base",
        "bal. - base",
    ]
    print(format_table(header, rows))


def _describe(pairs: dict[str, list], name: str) -> list[str]:
    plain = {each: [read_predictions(run.predictions).plain for run in runs] for each, runs in pairs.items()}
    metrics = pd.DataFrame([vars(compute_metrics(each)) for each in plain[name]]).mean()
    gap = sum(run.metrics["final_gap"] for run in pairs[name]) / len(pairs[name])
    cells = [f"{metrics[key]:.3f}" for key in ("loss", "balanced_accuracy", "accuracy", "macro_auc")]
    cells.append(f"{gap:+.3f}")
    if name == "base":
        return [*cells, "", ""]
    lesions = join_lesions(pairs[name][0].predictions).to_numpy(str)
    _, differences = compare_models(plain, lesions)
    for metric in ("macro_auc", "balanced_accuracy"):
        row = differences[differences.metric == metric].iloc[0]
        cells.append(f"{100 * row.value:+.1f} [{100 * row.low:+.1f}, {100 * row.high:+.1f}]")
    return cells


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
