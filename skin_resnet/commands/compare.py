"""The command `compare`: several trainings side by side, on the same images."""

import re
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.config import CompareConfig
from skin_resnet.data.split import join_lesions
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import HEADLINES, Predictions, compare_models
from skin_resnet.evaluation.page import LEAK_BANNER, format_score, format_table, print_markdown, spell_metric
from skin_resnet.evaluation.plots.curves import plot_curves_of_models, plot_differences
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.history import FinishedRun
from skin_resnet.tracking.links import describe_location, link_run, show_figure
from skin_resnet.tracking.run import open_run


def compare(config: CompareConfig) -> None:
    """Compare trainings in an MLflow run of its own, from the predictions they stored.

    Raises:
        UserError: A run cannot be read, or the runs were not trained on one split.
    """
    with open_run() as comparison:
        comparison.log_params(config)
        found, note = _read_runs(config)
        runs = name_runs(found)
        comparison.rename(f"compare · {' vs '.join(runs)}")
        predictions = {name: [read_predictions(run.predictions)] for name, run in runs.items()}
        lesions = join_lesions(found[0].predictions).to_numpy(str)
        scores, differences = compare_models(predictions, lesions)
        page = _write_page(runs, lesions, scores, differences, config.split)
        print_markdown(f"{page}\n\n{note}")
        comparison.log_metrics(list_metrics(scores, differences))
        comparison.log_artifacts(
            {
                "comparison.md": page,
                "differences.csv": differences,
                "figures/differences.png": plot_differences(differences, config.split.capitalize()),
                "figures/curves.png": plot_curves_of_models(
                    {name: run.history for name, run in runs.items()}
                ),
            }
        )
        links = "\n".join(f"- {link_run(run.run_id, name)}" for name, run in runs.items())
        figure = show_figure(comparison.run_id, "figures/differences.png")
        comparison.describe("\n\n".join([page, note, links, figure]))
        comparison.set_tags({"compares": " ".join(run.run_id for run in found)})
    print(f"\n{describe_location(comparison.run_id)}")


def _read_runs(config: CompareConfig) -> tuple[list[FinishedRun], str]:
    """Read the runs that are asked for, and check that they are of one split; return how they were found."""
    run_ids, note = list(dict.fromkeys(each.strip() for each in config.runs.split(",") if each.strip())), ""
    if config.runs == "best":
        run_ids, note = finished_runs.find_best_runs(config.split)
    if len(run_ids) < 2:
        raise UserError(
            f"compare needs two different runs or more, but {config.runs!r} is {len(run_ids)}; "
            f"pass runs=ID,ID. {note}".rstrip()
        )
    runs = [finished_runs.read_run(each, config.split) for each in run_ids]
    of_split: dict[str, list[str]] = {}
    for run in runs:
        of_split.setdefault(run.split_hash, []).append(run.run_id)
    if len(of_split) > 1:
        groups = "; ".join(f"{key[:8]}: {', '.join(ids)}" for key, ids in of_split.items())
        raise UserError(f"{len(runs)} runs on {len(of_split)} splits ({groups}); pass runs= of one split.")
    return runs, note


def name_runs(runs: list[FinishedRun]) -> dict[str, FinishedRun]:
    """Name each run by its architecture; where those are equal, by what only its MLflow name says, or its id.

    Of `resnet50 · demo · 32 px · seed 0` and the same with seed 1, that is `seed 0` and `seed 1`.
    """
    archs = [run.arch for run in runs]
    parts = [run.name.split(" · ") for run in runs]
    shared = [
        set.intersection(*(set(own) for own, other in zip(parts, archs, strict=True) if other == arch))
        for arch in archs
    ]
    details = [" ".join(p for p in own if p not in s)[:24] for own, s in zip(parts, shared, strict=True)]
    names = [f"{arch} {detail}".strip() for arch, detail in zip(archs, details, strict=True)]
    return {
        name if names.count(name) == 1 else f"{run.arch} {run.run_id[:8]}": run
        for name, run in zip(names, runs, strict=True)
    }


def _write_page(
    runs: dict[str, FinishedRun],
    lesions: NDArray[np.str_],
    scores: pd.DataFrame,
    differences: pd.DataFrame,
    split: str,
) -> str:
    first = next(iter(runs.values()))
    best, second, *_ = scores.value.xs("balanced_accuracy", level="metric").sort_values(ascending=False).index
    pair = differences[differences["first"].isin([best, second]) & differences.second.isin([best, second])]
    top = scores.loc[(best, "balanced_accuracy")]
    return "\n".join(
        [
            f"**Highest {split} balanced accuracy: {best}, {format_score(top.value, (top.low, top.high))}; "
            f"{format_difference(next(pair.itertuples()))}.**",
            "",
            f"### {split.capitalize()} of {first.data}: {len(lesions)} images of {len(set(lesions))} lesions"
            f", split {first.split_hash[:8]}",
            "",
            _tabulate(runs, scores),
            "",
            *(f"- {format_difference(row)}" for row in differences.itertuples()),
            *(f"\n{name}: {LEAK_BANNER}" for name, run in runs.items() if run.leaks),
        ]
    )


def list_metrics(scores: pd.DataFrame, differences: pd.DataFrame) -> dict[str, float]:
    """Return metrics for MLflow: of each model, and its difference in balanced accuracy to the first one."""
    metrics = {f"{metric} {model}": value for (model, metric), value in scores.value.items()}
    for row in differences[differences.second == scores.index[0][0]].itertuples():
        if row.metric == "balanced_accuracy":
            metrics[f"{row.metric} {row.first} minus {row.second}"] = row.value
    return {re.sub(r"[^\w.: -]", "_", name): value for name, value in metrics.items()}


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
