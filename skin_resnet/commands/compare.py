"""The command `compare`: several trainings side by side, on the same images."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.config import CompareConfig
from skin_resnet.data.split import join_lesions
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import HEADLINES, Predictions, compare_models
from skin_resnet.evaluation.page import LEAK_BANNER, format_score, format_table, print_markdown, spell_metric
from skin_resnet.evaluation.plots.curves import plot_curves_of_models
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.history import FinishedRun
from skin_resnet.tracking.run import describe_location, open_run


def compare(config: CompareConfig) -> None:
    """Compare trainings in an MLflow run of its own, from the predictions they stored.

    Raises:
        UserError: A run cannot be read, or the runs were not trained on one split.
    """
    with open_run() as comparison:
        comparison.log_params(config)
        runs = _name_runs(_read_runs(config))
        comparison.rename(f"compare · {' vs '.join(runs)}")
        predictions = {name: read_predictions(run.predictions) for name, run in runs.items()}
        lesions = join_lesions(next(iter(runs.values())).predictions).to_numpy(str)
        page, files = _compare(runs, predictions, lesions, config.split)
        print_markdown(page)
        comparison.describe(
            page + "\n\n" + "\n".join(f"- {name}: run {run.run_id}" for name, run in runs.items())
        )
        comparison.log_artifacts(files)
        comparison.set_tags({"compares": " ".join(run.run_id for run in runs.values())})
    print(f"\n{describe_location(comparison.run_id)}")


def _read_runs(config: CompareConfig) -> list[FinishedRun]:
    """Read the runs that are asked for, and check that they are of one split."""
    typed = list(dict.fromkeys(each.strip() for each in config.runs.split(",") if each.strip()))
    run_ids = finished_runs.find_best_runs(config.split) if config.runs == "best" else typed
    if len(run_ids) < 2:
        raise UserError(f"compare needs two different runs or more; {config.runs!r} is {len(run_ids)}.")
    runs = [finished_runs.read_run(each, config.split) for each in run_ids]
    of_split: dict[str, list[str]] = {}
    for run in runs:
        of_split.setdefault(run.split_hash, []).append(run.run_id)
    if len(of_split) > 1:
        groups = "; ".join(f"{key[:8]}: {', '.join(ids)}" for key, ids in of_split.items())
        raise UserError(f"{len(runs)} runs on {len(of_split)} splits ({groups}); pass runs= of one split.")
    return runs


def _name_runs(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Name each run by its architecture; where those are equal, by its MLflow name too, or its id."""
    names = [run.arch for run in runs]
    for more in ("name", "run_id"):
        names = [
            name if names.count(name) == 1 else f"{run.arch} {getattr(run, more)[:24]}"
            for name, run in zip(names, runs, strict=True)
        ]
    return dict(zip(names, runs, strict=True))


def _compare(
    runs: dict[str, FinishedRun], predictions: dict[str, Predictions], lesions: NDArray[np.str_], split: str
) -> tuple[str, dict[str, Any]]:
    """Return the page, and all files by artifact path."""
    scores, differences = compare_models({name: [each] for name, each in predictions.items()}, lesions)
    split_hash = next(iter(runs.values())).split_hash
    page = "\n".join(
        [
            f"### {split.capitalize()}: {len(lesions)} images of {len(set(lesions))} lesions, "
            f"split {split_hash[:8]}",
            "",
            _tabulate(runs, scores),
            "",
            *(f"- {format_difference(row)}" for row in differences.itertuples()),
            *(f"\n{name}: {LEAK_BANNER}" for name, run in runs.items() if run.leaks),
        ]
    )
    return page, {
        "comparison.md": page,
        "differences.csv": differences,
        "figures/curves.png": plot_curves_of_models({name: run.history for name, run in runs.items()}),
    }


def format_difference(row: Any) -> str:
    """Write a row of `compare_models`: `resnet152 minus resnet50: +0.8 points [-0.9, +2.4] macro AUC`."""
    value, low, high = (100 * number for number in (row.value, row.low, row.high))
    verdict = "" if low > 0 or high < 0 else ", not significant"
    points = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    return f"{row.first} minus {row.second}: {points} {spell_metric(row.metric)}{verdict}"


def _tabulate(runs: dict[str, FinishedRun], scores: pd.DataFrame) -> str:
    header = ["", *map(spell_metric, HEADLINES), "gap", "epochs", "minutes", "img/s"]
    rows = []
    for name, run in runs.items():
        cells = [scores.loc[(name, metric)] for metric in HEADLINES]
        rows.append(
            [
                name,
                *(format_score(each.value, (each.low, each.high)) for each in cells),
                f"{run.metrics['final_gap']:+.3f}",
                str(len(run.history)),
                f"{run.history['epoch_s'].sum() / 60:.1f}",
                f"{run.history['images_per_s'].median():.0f}",
            ]
        )
    return format_table(header, rows)


def read_predictions(table: pd.DataFrame) -> Predictions:
    """Read back what `Assessment.tabulate_predictions` returned."""
    classes = list(table.columns[table.columns.get_loc("prediction") + 1 :])
    target, decision = (
        pd.Categorical(table[name], categories=classes).codes.astype(np.int64)
        for name in ("dx", "prediction")
    )
    return Predictions(
        probabilities=table[classes].to_numpy(np.float64),
        targets=target,
        image_ids=tuple(table.image_id),
        decisions=decision,
    )
