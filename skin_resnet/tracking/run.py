"""An MLflow run, from its start to its end: the same life cycle for runs, child runs and searches."""

import contextlib
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.entities import LoggedModelStatus, Metric, Param, RunTag

from skin_resnet.errors import UserError, hide_password
from skin_resnet.evaluation.artifacts import list_artifacts
from skin_resnet.evaluation.assess import Assessment, assess
from skin_resnet.evaluation.metrics import HEADLINES
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.evaluation.plots.curves import plot_curves
from skin_resnet.options import FrozenConfig
from skin_resnet.tracking import records, serving
from skin_resnet.tracking.links import cut, save_view
from skin_resnet.tracking.store import OUTAGES, describe_uri, find_experiment, prepare_store
from skin_resnet.training import interrupts
from skin_resnet.training.engine import EpochResult, to_frame
from skin_resnet.training.run import TrainResult, TrainStart

_LONGEST = 7_900  # characters of a description: MLflow cuts what is longer than 8,000, with a warning
_MADE_UP_NAME = re.compile(r"[a-z]+-[a-z]+-\d+|compare|evaluate")  # or what it is called at first


@contextmanager
def open_run(
    name: str | None = None,
    *,
    run_id: str | None = None,
    parent_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
    pruned: tuple[type[BaseException], ...] = (),
) -> Iterator["TrackedRun"]:
    """Open the run that `mlflow run` has created, a new run, or a run that is resumed.

    The run ends with the block: FINISHED; KILLED if it was interrupted or left by an exception in `pruned`;
    FAILED, with the reason in the tag `failure`, on any other exception.

    Args:
        name: What the run is, in a few words. It replaces a name that MLflow made up, not one that the
            user gave to `mlflow run`; None: the training in the run names it.
        run_id: A run to resume. The run that `mlflow run` has created then only points to it.
        parent_run_id: The run under which a new run is shown.
        tags: Set at the start, besides the versions of the code.
        pruned: Exceptions that end the run early without being a failure.

    Raises:
        UserError: The tracking store cannot be used, or stops answering.
    """
    prepare_store()
    run = _set_up(name, run_id, parent_run_id, {**records.read_versions(), **(tags or {})})
    try:
        interrupts.check()
        try:
            yield run
            _end(run.run_id, "FINISHED")
        except Exception as error:
            # Out of C++, as in `torch.save` or where figures are drawn, an interrupt comes as another error,
            # but not as a UserError, whose reason must not be lost.
            if not isinstance(error, (UserError, *pruned)):
                interrupts.check()
            raise
    except BaseException as error:
        is_killed = isinstance(error, (KeyboardInterrupt, SystemExit, *pruned))
        _end_early(run, "KILLED" if is_killed else "FAILED", error)
        if isinstance(error, OUTAGES):
            raise _explain_outage(error, "; what was trained is kept, so resume the run then") from None
        raise
    run.remove_checkpoints()


@interrupts.deferred()  # or an interrupted run would count as running, or a new database lack some tables
def _set_up(
    name: str | None, run_id: str | None, parent_run_id: str | None, tags: Mapping[str, str]
) -> "TrackedRun":
    before = mlflow.active_run()
    try:
        run = TrackedRun(_start(name, run_id, parent_run_id))
        if name:
            run.rename(name)
        run.set_tags(tags)
        return run
    except OUTAGES as error:
        active = mlflow.active_run()
        if active is not None and active is not before:  # it was created, but not completely set up
            with contextlib.suppress(*OUTAGES):
                _end(active.info.run_id, "FAILED")
        raise _explain_outage(error) from None


def _start(name: str | None, run_id: str | None, parent_run_id: str | None) -> str:
    """Start a run in MLflow and return its id."""
    client = mlflow.MlflowClient()
    experiment_id = None
    if run_id:
        _prepare_resume(client, run_id)
    elif not is_project_run():
        parent = client.get_run(parent_run_id).info if parent_run_id else find_experiment()
        experiment_id = parent.experiment_id if parent else None
    run = mlflow.start_run(
        run_id, run_name=name, experiment_id=experiment_id, nested=True,
        # On a CPU they are of little use, and MLflow would open its comparison of runs with them.
        log_system_metrics=torch.cuda.is_available() and parent_run_id is None,
    )  # fmt: skip
    if parent_run_id:
        client.set_tag(run.info.run_id, "mlflow.parentRunId", parent_run_id)
    return str(run.info.run_id)


def _end(run_id: str, status: str) -> None:
    active = mlflow.active_run()
    if active and active.info.run_id == run_id:
        mlflow.end_run(status)
    else:  # in an outage MLflow forgets its active run, and would end the parent in its place
        mlflow.MlflowClient().set_terminated(run_id, status)


def _prepare_resume(client: mlflow.MlflowClient, run_id: str) -> None:
    """Clear how a run ended; the run that `mlflow run` has created then only points to the resumed one."""
    created = os.environ.get("MLFLOW_RUN_ID")
    if created and created != run_id:
        del os.environ["MLFLOW_RUN_ID"]
        client.set_tag(created, "resumes", run_id)
        client.set_tag(created, "mlflow.note.content", f"Resumes run {run_id}, which holds all results.")
    run = client.get_run(run_id)
    if "failure" in run.data.tags:
        client.delete_tag(run_id, "failure")
    for model in client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'"):
        if model.status != LoggedModelStatus.READY:  # its logging was interrupted
            client.delete_logged_model(model.model_id)


def _explain_outage(error: BaseException, consequence: str = "") -> UserError:
    reason = hide_password(" ".join(str(error).split()))[:240]
    where = f"MLflow unreachable at {describe_uri()} ({reason})"
    return UserError(f"{where}; check MLFLOW_TRACKING_URI{consequence}")


@interrupts.deferred()
def _end_early(run: "TrackedRun", status: str, error: BaseException) -> None:
    """End a run that did not finish, as far as the tracking store can be reached."""
    reason = type(error).__name__
    with contextlib.suppress(*OUTAGES):
        run.describe(f"failed: {error}" if status == "FAILED" else f"interrupted ({reason})")
        if status == "FAILED":
            run.set_tags({"failure": f"{reason}: {error}"[:5000]})
    with contextlib.suppress(*OUTAGES):
        _end(run.run_id, status)
    run.remove_checkpoints(keep_state=True)


class TrackedRun:
    """An open MLflow run, and the tracker of the training in it."""

    val_assessment: Assessment  # when the training has ended

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._client = mlflow.MlflowClient()
        self._training: TrainStart | None = None
        self._epochs = records.EpochLog(run_id)

    def log_params(self, config: FrozenConfig) -> None:
        """Log every option as a param, and all of them as `config.yaml`, from which they are read back.

        `mlflow run` has already logged those that were typed, quoted as for a shell.
        """
        known = self._client.get_run(self.run_id).data.params
        new = [Param(name, text) for name, text in config.to_params().items() if name not in known]
        self._client.log_batch(self.run_id, params=new)
        self.log_artifacts({"config.yaml": config.model_dump(mode="json")})

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log finite metrics, unless the run shows all of them already: it may have been resumed."""
        finite = {name: float(value) for name, value in metrics.items() if np.isfinite(value)}
        if not finite.items() <= self._client.get_run(self.run_id).data.metrics.items():
            now = int(1000 * time.time())
            logged = [Metric(name, value, now, step) for name, value in finite.items()]
            self._client.log_batch(self.run_id, metrics=logged)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, their values as text."""
        self._client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def rename(self, name: str) -> None:
        """Name the run, unless the user has: only names that MLflow or we made up are replaced."""
        if _MADE_UP_NAME.fullmatch(self._client.get_run(self.run_id).info.run_name or ""):
            self.set_tags({"mlflow.runName": name})

    def describe(self, markdown: str) -> None:
        """Set the description, which the run's page shows first; a long one ends after a paragraph."""
        self.set_tags({"mlflow.note.content": cut(markdown, _LONGEST)})

    def log_artifacts(self, files: Mapping[str, Any]) -> None:
        """Log artifacts by path: a file, a frame as CSV, a dict or list as JSON or YAML, a figure, or a text.

        Raises:
            UserError: They cannot be written.
        """
        with _explain_full_folder():
            for path, content in files.items():
                content = content.to_csv(index=False) if isinstance(content, pd.DataFrame) else content
                if isinstance(content, Path):
                    self._client.log_artifact(self.run_id, content, os.path.dirname(path) or None)
                elif isinstance(content, str):
                    self._client.log_text(self.run_id, content, path)
                elif isinstance(content, dict | list):
                    self._client.log_dict(self.run_id, _to_plain(content), path)
                else:
                    self._client.log_figure(self.run_id, content, path)

    def log_model(self, checkpoint: Path) -> str:
        """Log the model that serves a checkpoint, which travels in it, and return the model's URI."""
        with _explain_full_folder():
            return serving.log_model(checkpoint)

    def on_start(self, start: TrainStart) -> None:
        """Log options, hardware, data and split of a training that begins or is resumed."""
        self._training = start
        self._epochs = records.EpochLog(self.run_id, start.point.history)
        self.log_params(start.point.config)
        self.rename(records.name_training(start))
        self.set_tags(records.describe_start(start))
        self.log_artifacts(records.list_data_files(start.data))
        save_view(self.run_id)
        for split, dataset in records.build_datasets(start.data, start.point.config.data):
            mlflow.log_input(dataset, context=split)

    def on_epoch(self, result: EpochResult) -> None:
        """Log an epoch's metrics, or buffer them while the tracking store is away."""
        self._epochs.write(result)

    def on_end(self, result: TrainResult) -> None:
        """Log the best epoch, the curves and the evaluation on val."""
        self._epochs.finish()
        records.log_best(self.run_id, result.best, result.final_gap)
        self.set_tags({"best.sha256": result.weights_sha256})
        best, data = result.best.epoch, result.data
        val, majority = data.select(data.split.val), data.baseline_class
        assessment = assess(result.val_predictions, val, data.classes, majority, result.calibration)
        notes = [LEAK_BANNER] if data.leakage.leaks else []
        files = list_artifacts(assessment, "val", f"Val, {result.config.arch} epoch {best}", notes)
        if len(result.history) > 1:
            baseline = {name: assessment.get(f"baseline_{name}").value for name in HEADLINES}
            files["figures/curves.png"] = plot_curves(to_frame(result.history), best, baseline, majority)
        self.log_artifacts(files)
        self.val_assessment = assessment

    def remove_checkpoints(self, *, keep_state: bool = False) -> None:
        """Remove a training's checkpoints; with `keep_state` only if it cannot be resumed from them."""
        if self._training and not (keep_state and self._training.point.folder.last.exists()):
            self._training.point.folder.remove()


@contextmanager
def _explain_full_folder() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, OUTAGES):
            raise
        raise UserError(
            f"cannot write the run's artifacts ({error.strerror or error}: {error.filename}); what was "
            "trained is kept, so make room and resume the run"
        ) from None


def _to_plain(value: Any) -> Any:
    """Return plain values; NaN becomes None, for JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _to_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(each) for each in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def is_project_run() -> bool:
    """Return whether `mlflow run` started this process and created a run for it."""
    return "MLFLOW_RUN_ID" in os.environ


def open_project_run(name: str) -> AbstractContextManager["TrackedRun | None"]:
    """Open the run that `mlflow run` has created, as `open_run` does; without it, open none."""
    return open_run(name) if is_project_run() else nullcontext()
