"""What a search records in MLflow: a run a study, a child run a trial, and an end for killed ones."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlflow
from mlflow.entities import Metric, Run, RunStatus

from skin_resnet.tracking.run import TrackedRun, open_run

STUDY, TRIAL, STATE = "search.study_id", "search.trial", "search.state"
CHAMPION = "champion"  # the alias of a registered model's best version


def get_tracking_uri() -> str:
    """Give where runs are tracked, for another process."""
    uri: str = mlflow.get_tracking_uri()
    return uri


def set_tracking_uri(uri: str) -> None:
    """Track where another process does."""
    mlflow.set_tracking_uri(uri)


@contextmanager
def open_child(
    parent_run_id: str, name: str, tags: dict[str, str], pruned: type[BaseException] | None = None
) -> Iterator[TrackedRun]:
    """Open a child run; however the block is left, it ends, and the tag `search.state` says how.

    FINISHED; KILLED if it was interrupted, or left by the exception `pruned`; FAILED on any other exception.
    """
    expected = (pruned,) if pruned else ()
    with open_run(name, parent_run_id=parent_run_id, tags=tags, pruned=expected) as run:
        try:
            yield run
        except BaseException as error:
            is_pruned = isinstance(error, expected)
            is_killed = isinstance(error, KeyboardInterrupt | SystemExit)
            run.set_tags({STATE: "PRUNED" if is_pruned else "KILLED" if is_killed else "FAIL"})
            raise
        run.set_tags({STATE: "COMPLETE"})


def close_killed(study_id: str, is_alive: Callable[[str, dict[str, str]], bool]) -> list[str]:
    """End the runs of a study as KILLED that no process works on any more; give their ids.

    Args:
        study_id: Runs with this tag are looked at.
        is_alive: Says of a run that is not ended, by its id and tags, whether a process works on it.
    """
    client = mlflow.MlflowClient()
    runs: list[Run] = mlflow.search_runs(
        search_all_experiments=True,
        filter_string=f"attributes.status = 'RUNNING' AND tags.`{STUDY}` = '{study_id}'",
        output_format="list",
    )
    closed = [run.info.run_id for run in runs if not is_alive(run.info.run_id, run.data.tags)]
    for run_id in closed:
        client.set_tag(run_id, STATE, "KILLED")
        client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
    return closed


def log_progress(run_id: str, figures: dict[str, float], step: int) -> None:
    """Log figures of a study on its run, whichever run is open."""
    now = int(1000 * time.time())
    metrics = [Metric(name, value, now, step) for name, value in figures.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics=metrics)


def register_model(model_uri: str, name: str, val: float, split_hash: str) -> str:
    """Register a model as a version, `champion` where it beats the present one on val; tell in a sentence.

    Args:
        model_uri: From `log_model`.
        name: The registered model's.
        val: Its balanced accuracy on val.
        split_hash: Whose val: figures of different ones cannot be compared.
    """
    tags = {"val/balanced_accuracy": repr(val), "split.hash": split_hash}
    version = mlflow.register_model(model_uri, name, tags=tags).version
    client = mlflow.MlflowClient()
    try:
        champion = client.get_model_version_by_alias(name, CHAMPION)
    except mlflow.MlflowException:
        champion = None  # the first of its name
    told = f"Registered as {name}, version {version}"
    if champion is not None:
        present = float(champion.tags.get("val/balanced_accuracy", "inf"))
        if champion.tags.get("split.hash") != split_hash:
            return f"{told}; version {champion.version} stays champion: it was measured on another val."
        if val <= present:
            return (
                f"{told}; version {champion.version} stays champion, with {present:.3f} on val to {val:.3f}."
            )
    client.set_registered_model_alias(name, CHAMPION, version)
    return f"{told}, the champion: models:/{name}@{CHAMPION}."


def read_curves(run_id: str) -> dict[str, dict[int, float]]:
    """Read balanced accuracy on train and val over the epochs of a training."""
    client = mlflow.MlflowClient()
    return {
        name: {point.step: point.value for point in client.get_metric_history(run_id, name)}
        for name in ("train/balanced_accuracy", "val/balanced_accuracy")
    }


def read_tag(run_id: str, name: str) -> str:
    """Read a tag of a run; empty where it has none."""
    tags: dict[str, str] = mlflow.MlflowClient().get_run(run_id).data.tags
    return tags.get(name, "")


def read_metrics(run_id: str) -> dict[str, float]:
    """Read the last value of each metric of a run."""
    metrics: dict[str, float] = mlflow.MlflowClient().get_run(run_id).data.metrics
    return metrics
