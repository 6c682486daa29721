"""What MLflow has of earlier runs: histories, predictions, test accesses, checkpoints and models."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import yaml
from mlflow.entities import LoggedModelStatus, Run

from skin_resnet.errors import UserError, hide_password
from skin_resnet.evaluation.card import CARD
from skin_resnet.evaluation.metrics import Metrics
from skin_resnet.tracking.store import OUTAGES, describe_uri, find_experiment, has_store

# Tags of a search's runs: the study, and of a trial's run the trial's number and how it ended.
STUDY, TRIAL, STATE = "search.study_id", "search.trial", "search.state"
REPRODUCES = "reproduces"  # the tag of a reproduction: the run that it repeats
_BEST_SCORE = "best_val_balanced_accuracy"
_EPOCH_METRICS = (
    *(f"{split}/{field.name}" for split in ("train", "val") for field in fields(Metrics)),
    *("gap", "lr", "epoch_s", "images_per_s"),
)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished training and its predictions.

    Attributes:
        data: Its data's name.
        split_hash: Which split it was trained and evaluated on.
        leaks: Whether that split leaks.
        history: As `read_history` returns it.
        predictions: As `Assessment.tabulate_predictions` returned them.
    """

    run_id: str
    name: str
    arch: str
    data: str
    split_hash: str
    leaks: bool
    params: dict[str, str]
    metrics: dict[str, float]
    history: pd.DataFrame
    predictions: pd.DataFrame


def read_run(run_id: str, split: str) -> FinishedRun:
    """Read a finished training and its predictions on val or test; without any it is a UserError."""
    with explain(f"run {run_id} is not a training with predictions on {split}"):
        run = _get_training(run_id)
        path = _download(run_id, f"{split}/predictions.csv")
        texts = dict.fromkeys(("image_id", "lesion_id", "dx", "prediction"), str)
        return FinishedRun(
            run_id=run_id,
            name=run.info.run_name,
            arch=run.data.params["arch"],
            data=name_data(run.data.params.get("data", "")),
            split_hash=run.data.tags.get("split.hash", ""),
            leaks=run.data.tags.get("split.leaks") == "true",
            params=run.data.params,
            metrics=run.data.metrics,
            history=read_history(run_id),
            predictions=pd.read_csv(path, dtype=texts, keep_default_na=False),
        )


def read_training(run_id: str, folder: Path) -> tuple[dict[str, Any], Path]:
    """Read the options of a finished training, and its split as a CSV in the folder; else a UserError."""
    with explain(f"run {run_id} is not a finished training"):
        _get_training(run_id)
        options = yaml.safe_load(_download(run_id, "config.yaml", folder).read_text(encoding="utf-8"))
        return options, _download(run_id, "data/split.csv", folder)


def read_history(run_id: str) -> pd.DataFrame:
    """Return a training's history as `engine.to_frame` does: a row per epoch, a column per metric key."""
    client = mlflow.MlflowClient()
    logged = client.get_run(run_id).data.metrics
    points = {name: client.get_metric_history(run_id, name) for name in _EPOCH_METRICS if name in logged}
    history = pd.DataFrame({name: {p.step: p.value for p in points[name]} for name in points})
    return history.sort_index().rename_axis("epoch")


def read_scores(run_id: str, split: str) -> pd.DataFrame:
    """Return a run's metrics on a split by name, as `Assessment.table` has them: value, low, high."""
    return pd.read_csv(_download(run_id, f"{split}/metrics.csv"), index_col="name")[["value", "low", "high"]]


def read_card(run_id: str) -> str:
    """Return a run's model card; empty if it has none, or the store does not have the run."""
    with suppress(*OUTAGES, OSError):
        return _download(run_id, CARD).read_text(encoding="utf-8") if has_store() else ""
    return ""


def read_tags(run_id: str) -> dict[str, str]:
    """Return a run's tags."""
    return dict(mlflow.MlflowClient().get_run(run_id).data.tags)


def download_checkpoint(model: str) -> Path:
    """Download the checkpoint of a run (`RUN_ID`, `runs:/RUN_ID`) or a model (`models:/NAME@ALIAS`, ...).

    Without a checkpoint, or such a run or model, it is a UserError.
    """
    with explain(f"{model} is not a checkpoint file, a run with a model, or a model (models:/NAME@ALIAS)"):
        if not has_store():
            raise LookupError("there is no such store")
        run_id = model.removeprefix("runs:/").partition("/")[0]  # of runs:/ID/model, too
        uri = model if model.startswith("models:/") else find_model(run_id)
        return next(Path(mlflow.artifacts.download_artifacts(uri)).rglob("*.pt"))


def find_best_runs(split: str = "test") -> tuple[list[str], str]:
    """Find each architecture's run with the highest val balanced accuracy, in the experiment of new runs.

    Only finished trainings that were evaluated on `split` qualify, no trials, no reproductions, and none
    whose split leaks. Scores on different splits cannot be compared: of several, the one with the most
    architectures, then runs, is taken, of those with as many the one that was used last.

    Returns:
        The ids, and a sentence on the runs they were chosen from, and those left out.

    Raises:
        UserError: None qualifies.
    """
    experiment = find_experiment()
    score = "test_balanced_accuracy" if split == "test" else "val/balanced_accuracy"
    found = mlflow.search_runs(
        [experiment.experiment_id] if experiment else None,  # MLflow finds that of the environment
        filter_string="attributes.status = 'FINISHED' AND tags.`split.leaks` = 'false' "
        f"AND metrics.`{_BEST_SCORE}` >= 0 AND metrics.`{score}` >= 0",
        order_by=["attributes.start_time DESC"],
        output_format="list",
    )
    of_split: dict[str, list[Run]] = defaultdict(list)
    for run in found:
        if not {TRIAL, REPRODUCES} & set(run.data.tags):
            of_split[run.data.tags["split.hash"]].append(run)
    if not of_split:
        raise UserError(f"runs=best: this experiment has no finished training that was evaluated on {split}")
    chosen, *others = sorted(
        of_split,
        key=lambda key: (len({run.data.params["arch"] for run in of_split[key]}), len(of_split[key])),
        reverse=True,
    )
    best: dict[str, Run] = {}
    for run in sorted(of_split[chosen], key=lambda run: -float(run.data.metrics[_BEST_SCORE])):
        best.setdefault(run.data.params["arch"], run)
    # resnet50 before resnet101
    ids = [best[arch].info.run_id for arch in sorted(best, key=lambda arch: (len(arch), arch))]
    note = f"runs=best: the best run of each architecture, by val, of {_count_runs(of_split[chosen])}"
    if others:
        left_out = "; ".join(_count_runs(of_split[key]) for key in others)
        note += f". Left out, because other splits cannot be compared: {left_out}"
    return ids, f"{note}."


def _count_runs(runs: list[Run]) -> str:
    """Write how many runs of one split there are: `3 runs on demo, split 72abaf7f`."""
    run = runs[0].data
    data = name_data(run.params.get("data", ""))
    return f"{len(runs)} run{'s' * (len(runs) > 1)} on {data}, split {run.tags['split.hash'][:8]}"


def name_data(param: str) -> str:
    """Return a short name of the data in a run's param, which `mlflow run` logs quoted as for a shell."""
    return Path(param.strip("'")).stem


def close_killed(study_id: str, is_alive: Callable[[str, dict[str, str]], bool]) -> list[str]:
    """End the runs of a study that no process works on any more as KILLED, and return their ids.

    `is_alive` returns whether a process works on a running run, by its id and tags.
    """
    where = f"attributes.status = 'RUNNING' AND tags.`{STUDY}` = '{study_id}'"
    runs = mlflow.search_runs(search_all_experiments=True, filter_string=where, output_format="list")
    closed = [run.info.run_id for run in runs if not is_alive(run.info.run_id, run.data.tags)]
    client = mlflow.MlflowClient()
    for run_id in closed:
        client.set_tag(run_id, STATE, "KILLED")
        client.set_terminated(run_id, "KILLED")
    return closed


def close_abandoned(run_id: str) -> str:
    """End a run as KILLED if its process died before it could; return its status, empty if unknown."""
    client = mlflow.MlflowClient()
    try:
        status = str(client.get_run(run_id).info.status)
        if status == "RUNNING":
            client.set_tag(run_id, "mlflow.note.content", "killed")
            client.set_terminated(run_id, status := "KILLED")
    except OUTAGES:
        return ""  # it is in another store, or this one is away
    return status


def read_state(run_id: str) -> tuple[str, float]:
    """Return a run's status (`DELETED` if it was, empty if unknown), and its start in seconds since 1970."""
    with suppress(*OUTAGES):
        if has_store():
            run = mlflow.MlflowClient().get_run(run_id).info
            return "DELETED" if run.lifecycle_stage == "deleted" else str(run.status), run.start_time / 1000
    return "", 0.0


def log_test_access(run_id: str, split_hash: str, model_run_id: str = "") -> str:
    """Log that a run evaluates the test split of a model's run (by default its own): when, and how often.

    Return a warning if other runs of the experiment have evaluated on it before, else nothing.
    """
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    before = client.search_runs([experiment_id], f"tags.`test.accessed` = '{split_hash}'", max_results=1000)
    client.set_tag(run_id, "test.accessed", split_hash)  # by which the next one finds it
    model_run_id = model_run_id or run_id
    with suppress(mlflow.MlflowException):  # the model's run is not in this store
        log = client.get_run(model_run_id).data.tags.get("test.access_log", "").splitlines()
        log.append(f"{datetime.now(UTC).isoformat(timespec='seconds')} by {run_id}")
        client.set_tag(model_run_id, "test.access_log", "\n".join(log))
        client.set_tag(model_run_id, "test.access_count", str(len(log)))
    others = {each.info.run_id for each in before} - {run_id}
    if not others:
        return ""
    client.set_tag(run_id, "test.accessed_before", str(len(others)))
    return (
        f"**This test split was evaluated before, by {len(others)} run{'s' * (len(others) > 1)} of this "
        "experiment.** The more often it is used, the more optimistic it becomes: choose models on val."
    )


def _get_training(run_id: str) -> Run:
    run = mlflow.MlflowClient().get_run(run_id)
    if "best_epoch" not in run.data.metrics:
        raise LookupError("it has no best epoch")
    return run


def find_model(run_id: str) -> str:
    """Return the URI of the last model that a run has logged."""
    run = mlflow.MlflowClient().get_run(run_id)
    models = mlflow.search_logged_models(
        [run.info.experiment_id],
        f"source_run_id = '{run_id}'",
        order_by=[{"field_name": "creation_time", "ascending": False}],
        output_format="list",
    )
    return next(str(model.model_uri) for model in models if model.status == LoggedModelStatus.READY)


def _download(run_id: str, path: str, folder: Path | None = None) -> Path:
    to = str(folder) if folder else None
    return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=path, dst_path=to))


@contextmanager
def explain(problem: str) -> Iterator[None]:
    """Raise a `UserError` with a problem, where the store is and the reason, if MLflow raises anything."""
    try:
        yield
    except (*OUTAGES, OSError, LookupError, StopIteration) as error:
        reason = hide_password(" ".join(str(error).split()))[:200] or "nothing found"
        raise UserError(f"{problem} in {describe_uri()} ({reason})") from None
