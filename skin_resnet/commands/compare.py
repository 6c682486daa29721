"""The command `compare`: several trainings side by side, on the same images."""

import re
from contextlib import ExitStack
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.commands.config import CompareConfig
from skin_resnet.config import RuntimeOptions
from skin_resnet.data.split import join_lesions
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    PLAIN,
    Predictions,
    compare_models,
    is_better,
    predict_always,
)
from skin_resnet.evaluation.page import LEAK_BANNER, format_score, format_table, print_markdown, spell_metric
from skin_resnet.evaluation.plots.curves import plot_curves_of_models, plot_differences
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking.history import FinishedRun
from skin_resnet.tracking.links import describe_location, link_run, show_figure
from skin_resnet.tracking.run import is_project_run, open_run
from skin_resnet.tracking.store import prepare_store

_LONGEST = 40  # characters of a run's label
_QUOTE = "'"  # around what is typed after `mlflow run -P`
_REFUSED = re.compile(r"[^\w.: -]")  # in the name of a metric


def compare(config: CompareConfig) -> None:
    """Compare trainings in an MLflow run of its own, from the predictions they stored.

    Raises:
        UserError: A run cannot be read, or the runs were not trained on one split.
    """
    with ExitStack() as stack:
        # Refused before a run is opened; what `mlflow run` has opened ends with the reason.
        comparison = stack.enter_context(open_run("compare")) if is_project_run() else None
        prepare_store()
        found, note = _read_runs(config)
        runs = name_runs(found)
        lesions = join_lesions(found[0].predictions).to_numpy(str)
        always, baseline = predict_baseline(found[0].predictions)
        models = {name: [read_predictions(run.predictions)] for name, run in runs.items()}
        scores, differences = compare_models({always: [baseline], **models}, lesions)
        page = _write_page(runs, lesions, scores, differences, config.split)
        chosen = [f": {run.name}, {run.run_id[:8]}" for run in found]
        names = [f"- {name}{each}" for name, each in zip(runs, chosen, strict=True)]
        print_markdown("\n\n".join([page, note, "\n".join(names)]))
        comparison = comparison or stack.enter_context(open_run("compare"))
        comparison.log_params(config)
        comparison.rename(f"compare · {' vs '.join(runs)}")
        comparison.log_metrics(list_metrics(scores, differences))
        paired = differences[differences.second != always]
        histories = {name: run.history for name, run in runs.items()}
        comparison.log_artifacts(
            {
                "comparison.md": page,
                "differences.csv": differences,
                "figures/differences.png": plot_differences(paired, config.split.capitalize()),
                "figures/curves.png": plot_curves_of_models(histories),
            }
        )
        pairs = zip(runs.items(), chosen, strict=True)
        links = [f"- {link_run(run.run_id, name)}{each}" for (name, run), each in pairs]
        figure = show_figure(comparison.run_id, "figures/differences.png")
        comparison.describe("\n\n".join([page, note, "\n".join(links), figure]))
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
    """Name each run by its architecture; of several, with the options that differ (`seed 1`), or its id."""
    names = []
    for run in runs:
        params = [each.params for each in runs if each.arch == run.arch]
        differing = [
            f" {name} {text.strip(_QUOTE)}"
            for name, text in run.params.items()
            if name not in RuntimeOptions.model_fields and {each.get(name) for each in params} != {text}
        ]
        names.append(f"{run.arch}{''.join(differing)}")
    return {
        name if names.count(name) == 1 and len(name) <= _LONGEST else f"{run.arch} {run.run_id[:8]}": run
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
    always, *_ = scores.index[0]
    paired = differences[differences.second != always]
    ranked = scores.value.xs("balanced_accuracy", level="metric").drop(always).sort_values(ascending=False)
    best, second, *_ = ranked.index
    pair = paired[paired["first"].isin([best, second]) & paired.second.isin([best, second])]
    top = scores.loc[(best, "balanced_accuracy")]
    against = differences[(differences.second == always) & (differences.metric == "balanced_accuracy")]
    weak = [row.first for row in against.itertuples() if not is_better(row.low)]
    return "\n".join(
        [
            f"**Highest {split} balanced accuracy: {best}, {format_score(top.value, (top.low, top.high))}; "
            f"{format_difference(next(pair.itertuples()))}.**",
            *([f"\n**Not better than {always} in balanced accuracy: {', '.join(weak)}.**"] if weak else []),
            "",
            f"### {split.capitalize()} of {first.data}: {len(lesions)} images of {len(set(lesions))} lesions"
            f", split {first.split_hash[:8]}",
            "",
            _tabulate_scores(scores),
            "",
            *(f"- {format_difference(row)}" for row in paired.itertuples()),
            "",
            _tabulate_cost(runs),
            *(f"\n{name}: {LEAK_BANNER}" for name, run in runs.items() if run.leaks),
        ]
    )


def list_metrics(scores: pd.DataFrame, differences: pd.DataFrame) -> dict[str, float]:
    """Return metrics for MLflow: of each model, and its difference in balanced accuracy to the first one.

    MLflow shows one section for what precedes the slash: the models side by side.
    """
    metrics = {(metric, str(model)): value for (model, metric), value in scores.value.items()}
    first = scores.index.unique("model")[1]  # after the baseline
    for row in differences[differences.second == first].itertuples():
        if row.metric == "balanced_accuracy":
            metrics[f"{row.metric}_difference", f"{row.first} minus {row.second}"] = row.value
    return {f"{kind}/{_REFUSED.sub('_', name)}": value for (kind, name), value in metrics.items()}


def format_difference(row: Any) -> str:
    """Write a row of `compare_models`: `resnet152 minus resnet50: +0.8 points [-0.9, +2.4] macro AUC`."""
    value, low, high = (100 * number for number in (row.value, row.low, row.high))
    verdict = "" if low > 0 or high < 0 else ", not significant"
    points = f"{value:+.1f} points [{low:+.1f}, {high:+.1f}]"
    return f"{row.first} minus {row.second}: {points} {spell_metric(row.metric)}{verdict}"


def _tabulate_scores(scores: pd.DataFrame) -> str:
    cells = {key: format_score(each.value, (each.low, each.high)) for key, each in scores.iterrows()}
    models = scores.index.unique("model")
    rows = [[str(model), *(cells[model, metric] for metric in HEADLINES)] for model in models]
    rows += [[f"{model}, plain", *(cells[model, metric] for metric in PLAIN), ""] for model in models[1:]]
    note = "Plain: the most probable class is predicted, whatever its prior."
    return f"{format_table(['', *map(spell_metric, HEADLINES)], rows)}\n\n{note}"


def _tabulate_cost(runs: dict[str, FinishedRun]) -> str:
    rows = [
        [
            name,
            f"{run.metrics['final_gap']:+.3f}",
            str(len(run.history)),
            f"{run.history['epoch_s'].sum() / 60:.1f}",
            f"{run.history['images_per_s'].median():.0f}",
        ]
        for name, run in runs.items()
    ]
    return format_table(["", "final gap", "epochs", "minutes", "img/s"], rows)


def predict_baseline(table: pd.DataFrame) -> tuple[str, Predictions]:
    """Return what always predicting the most frequent class is called, and its predictions."""
    predictions = read_predictions(table)
    most = int(np.bincount(predictions.targets).argmax())
    return f"always {_list_classes(table)[most]}", predict_always(most, predictions)


def _list_classes(table: pd.DataFrame) -> list[str]:
    return list(table.columns[table.columns.get_loc("prediction") + 1 :])


def read_predictions(table: pd.DataFrame) -> Predictions:
    """Read back what `Assessment.tabulate_predictions` returned."""
    classes = _list_classes(table)
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
