"""The only module that talks to MLflow: what a run records, and how it ends."""

import contextlib
import importlib.metadata
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import requests
from mlflow.entities import LoggedModelStatus, RunStatus
from numpy.typing import NDArray

import skin_resnet
from skin_resnet.errors import UserError
from skin_resnet.options import FrozenConfig
from skin_resnet.tracking import serving as packaged_model
from skin_resnet.training import interrupts

_logger = logging.getLogger(__name__)

# How an absent server or a failing database shows itself.
OUTAGES = (mlflow.MlflowException, requests.RequestException)


def set_up() -> None:
    """Make MLflow quiet, and quick to give up: called before it is first asked anything."""
    # Tables being made, the monitor starting and files being copied are no news to whoever trains.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # each retry; what comes of them is told
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # MLflow's own seven retries would hold a training for minutes at each epoch, and a mistyped address, too.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


@contextmanager
def open_run(description: str, run_id: str | None = None, parent_run_id: str | None = None) -> Iterator[str]:
    """Open the run that `mlflow run` has begun, or a new one, or an old one again, and give its id.

    However the block is left, the run ends: FINISHED; KILLED where it was interrupted; FAILED, with the
    reason as a tag, on any error.

    Args:
        description: Shown while it is open.
        run_id: An old run to go on with. The one that `mlflow run` has begun then only points to it.
        parent_run_id: The run that this one belongs under.

    Raises:
        UserError: The tracking store cannot be used, from the start or no more.
    """
    set_up()
    try:
        if run_id:
            _point_to(run_id)
            _forget_end(run_id)
        with interrupts.deferred():  # the tables of a new database are made whole, or it is spoilt for good
            experiment_id = None if is_project_run() else _find_experiment(parent_run_id)
            run = mlflow.start_run(
                run_id, experiment_id=experiment_id, description=description, log_system_metrics=True
            )
        if parent_run_id:
            mlflow.set_tag("mlflow.parentRunId", parent_run_id)
    except OUTAGES as error:
        raise UserError(
            f"the run must be tracked, but {mlflow.get_tracking_uri()} does not "
            f"{'have it' if run_id else 'answer'} ({_tell_briefly(error)}); check MLFLOW_TRACKING_URI."
        ) from None
    try:
        interrupts.check()
        yield run.info.run_id
        mlflow.end_run()
    except OUTAGES as error:
        _end_badly(error)
        raise UserError(
            f"the run must be tracked, but {mlflow.get_tracking_uri()} answers no more "
            f"({_tell_briefly(error)}); what was trained is kept: resume the run once it does."
        ) from None
    except BaseException as error:
        _end_badly(error)
        raise


def _find_experiment(run_id: str | None) -> str | None:
    return mlflow.MlflowClient().get_run(run_id).info.experiment_id if run_id else None


def _point_to(run_id: str) -> None:
    """Let the run that `mlflow run` has begun say that an old one goes on."""
    begun = os.environ.get("MLFLOW_RUN_ID")
    if begun and begun != run_id:
        del os.environ["MLFLOW_RUN_ID"]
        client = mlflow.MlflowClient()
        client.set_tag(begun, "resumes", run_id)
        client.set_tag(begun, "mlflow.note.content", f"Goes on with run {run_id}, where all of it is.")


def _forget_end(run_id: str) -> None:
    """Remove from a run that goes on why it failed, and a model that was being logged as it was stopped."""
    client = mlflow.MlflowClient()
    run = client.get_run(run_id)
    if "failure" in run.data.tags:
        client.delete_tag(run_id, "failure")
    for model in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:
            client.delete_logged_model(model.model_id)


def _tell_briefly(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _end_badly(error: BaseException) -> None:
    """End the open run as interrupted or failed, as far as the tracking store can be told."""
    is_killed = isinstance(error, KeyboardInterrupt | SystemExit)
    try:
        log_note("interrupted" if is_killed else f"failed: {error}")
        if not is_killed:
            mlflow.set_tag("failure", f"{type(error).__name__}: {error}"[:5000])
    except OUTAGES:
        _logger.warning("the tracking store does not answer: the run's end is told at the next start")
    with contextlib.suppress(*OUTAGES):
        mlflow.end_run(RunStatus.to_string(RunStatus.KILLED if is_killed else RunStatus.FAILED))


def close_abandoned(run_id: str) -> bool:
    """End a run as KILLED whose process died before it could; say whether it is ended now."""
    client = mlflow.MlflowClient()
    try:
        if client.get_run(run_id).info.status == RunStatus.to_string(RunStatus.RUNNING):
            client.set_tag(run_id, "mlflow.note.content", "killed")
            client.set_terminated(run_id, RunStatus.to_string(RunStatus.KILLED))
    except OUTAGES:
        return False  # it is in another store, or this one is away
    return True


def is_project_run() -> bool:
    """Say whether `mlflow run` started this process, and with it a run."""
    return "MLFLOW_RUN_ID" in os.environ


def get_active_run_id() -> str | None:
    """Give the id of the run that is open in this process."""
    run = mlflow.active_run()
    return run.info.run_id if run else None


def log_params(config: FrozenConfig) -> None:
    """Log every field once: `mlflow run` has logged what was typed, as text, before our code started."""
    run = mlflow.active_run()
    assert run is not None, "params are logged on an open run"
    known = mlflow.MlflowClient().get_run(run.info.run_id).data.params
    mlflow.log_params({name: text for name, text in config.to_params().items() if name not in known})


def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
    """Log figures in one call, without those that are not finite, or that the run shows already.

    A run that goes on after it was killed at its end comes to the same figures again.
    """
    run = mlflow.active_run()
    assert run is not None, "figures are logged on an open run"
    known = mlflow.MlflowClient().get_run(run.info.run_id).data.metrics
    figures = {_clean_name(name): value for name, value in metrics.items() if np.isfinite(value)}
    mlflow.log_metrics({name: v for name, v in figures.items() if known.get(name) != v}, step=step)


def _clean_name(name: str) -> str:
    # A data set's own class names may hold what MLflow's names may not.
    return re.sub(r"[^a-zA-Z0-9_./ -]", "_", name)


def log_table(table: pd.DataFrame, path: str) -> None:
    """Log a table as a CSV artifact."""
    mlflow.log_text(table.to_csv(index=False), path)


def log_text(text: str, path: str) -> None:
    """Log a text artifact."""
    mlflow.log_text(text, path)


def log_artifacts(files: Mapping[str, Any]) -> None:
    """Log files by artifact path: data frames as CSV, figures as PNG, texts, and all else as JSON."""
    for path, content in files.items():
        if isinstance(content, pd.DataFrame):
            mlflow.log_text(content.to_csv(index=False), path)
        elif isinstance(content, str):
            mlflow.log_text(content, path)
        elif path.endswith(".png"):
            mlflow.log_figure(content, path)
        else:
            mlflow.log_dict(content, path)


def log_figure(figure: Any, path: str) -> None:
    """Log a matplotlib figure as a PNG artifact."""
    mlflow.log_figure(figure, path)


def log_image(image: NDArray[np.uint8], key: str, step: int) -> None:
    """Log an image (H, W, 3) of a series, which the run's page shows with a slider over the steps.

    One that the run has already, from before it was stopped, is not logged twice: MLflow would keep both.
    """
    run = mlflow.active_run()
    assert run is not None, "images are logged on an open run"
    name = _clean_name(key)
    # MLflow names the file by key, step, time and a random word.
    start = re.compile(re.escape(name).replace("/", "[~#]") + rf"[+%]step[+%]{step}[+%].*\.png")
    known = mlflow.MlflowClient().list_artifacts(run.info.run_id, "images")
    if not any(start.fullmatch(Path(each.path).name) for each in known):
        mlflow.log_image(image, key=name, step=step)


def set_tags(tags: dict[str, Any]) -> None:
    """Set tags on the open run."""
    mlflow.set_tags(tags)


def read_tags(run_id: str) -> dict[str, str]:
    """Read a run's tags."""
    tags: dict[str, str] = mlflow.MlflowClient().get_run(run_id).data.tags
    return tags


def log_note(text: str) -> None:
    """Write the run's description, Markdown, as the MLflow UI shows it first."""
    mlflow.set_tag("mlflow.note.content", text)


def log_model(checkpoint: Path, classes: tuple[str, ...]) -> str:
    """Log the best checkpoint, and the model that serves it; give the model's URI."""
    mlflow.log_artifact(str(checkpoint), "checkpoint")
    package = Path(skin_resnet.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        # A copy without caches: MLflow takes along whatever lies in the folder.
        code = Path(folder) / package.name
        _copy_sources(package, code)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=packaged_model.__file__,
            code_paths=[str(code)],
            artifacts={"checkpoint": str(checkpoint)},
            signature=packaged_model.build_signature(classes),
            input_example=packaged_model.draw_example(),
            pip_requirements=[
                f"{name}=={importlib.metadata.version(name).split('+')[0]}"
                for name in packaged_model.REQUIREMENTS
            ],
        )
    return str(info.model_uri)


def _copy_sources(package: Path, target: Path) -> None:
    for file in package.rglob("*"):
        if file.suffix in {".py", ".csv"}:
            (target / file.relative_to(package)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(package)).write_bytes(file.read_bytes())


def describe_location(run_id: str) -> str:
    """Say where a run is, and how to look at it."""
    run = mlflow.MlflowClient().get_run(run_id)
    uri = mlflow.get_tracking_uri()
    look = (
        uri
        if uri.startswith("http")
        else f"mlflow server --backend-store-uri {uri}   then http://127.0.0.1:5000"
    )
    return f"run {run_id} ({run.info.run_name}) in {uri}\nlook at it: {look}"
