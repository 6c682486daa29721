"""Runs that are killed, at any moment, resume to the very weights and metrics of one that never was."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.entities import Run

from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import close_abandoned
from skin_resnet.training import interrupts
from skin_resnet.training import run as run_module
from skin_resnet.training.checkpoint import (
    RunFolder,
    clean_up_killed,
    hash_network,
    list_interrupted,
    read_checkpoint,
    save_checkpoint,
)
from skin_resnet.training.engine import NonFiniteLossError
from skin_resnet.training.resume import ResumePoint, find_resume_point
from skin_resnet.training.state import TrainingState

ROOT = Path(__file__).parent.parent
EPOCHS = 6


class Training:
    """A training in a process of its own, with a store and folders of its own."""

    def __init__(self, folder: Path, data: Path, **options: object) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.options = {
            "data": data, "weights": "none", "image_size": 32, "epochs": EPOCHS, "batch_size": 8,
            "ema_decay": 0.9, "dropout": 0.2, "device": "cpu", "checkpoint_minutes": 0.01,
            "cache_dir": folder / "cache", "checkpoint_dir": folder / "checkpoints", **options,
        }  # fmt: skip
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.log = folder / "log.txt"

    def start(self, **more: object) -> subprocess.Popen[bytes]:
        options = [f"--{name}={value}" for name, value in {**self.options, **more}.items()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": self.uri}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-u", "-m", "skin_resnet", "train", *options],
                cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def wait_for(self, process: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while process.poll() is None and not condition():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)

    def read_runs(self) -> list[Run]:
        client = mlflow.MlflowClient(self.uri)
        return client.search_runs([each.experiment_id for each in client.search_experiments()])

    def read_history(self, run: Run) -> dict[str, list[tuple[int, float]]]:
        """Every value of every metric but those that a clock gives."""
        client = mlflow.MlflowClient(self.uri)
        return {
            name: sorted(
                (point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
            if not name.startswith(("epoch_s", "images_per_s", "system/"))
        }


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, class_folders: Path) -> Training:
    training = Training(tmp_path_factory.mktemp("unbroken"), class_folders)
    assert training.start().wait(300) == 0, training.log.read_text()
    return training


@pytest.fixture
def training(tmp_path: Path, class_folders: Path) -> Iterator[Training]:
    started: list[subprocess.Popen[bytes]] = []
    training = Training(tmp_path / "broken", class_folders)
    start = training.start

    def start_and_remember(**more: object) -> subprocess.Popen[bytes]:
        started.append(start(**more))
        return started[-1]

    training.start = start_and_remember  # type: ignore[method-assign]
    yield training
    for process in started:
        if process.poll() is None:
            process.kill()


def kill_at(training: Training, moment: str, rng: random.Random) -> None:
    """Start or resume, and kill the process at a kind of moment."""
    process = training.start(resume="auto")
    begun = training.log.stat().st_size

    def has_begun() -> bool:
        return (
            b"\nepoch " in training.log.read_bytes()[begun:]
            or b"resumed" in training.log.read_bytes()[begun:]
        )

    training.wait_for(process, has_begun)
    if moment == "writing a checkpoint":
        training.wait_for(process, lambda: any(training.folder.glob("checkpoints/*/.*.tmp")))
    elif moment == "writing to MLflow":
        training.wait_for(process, lambda: (training.folder / "mlflow.db-journal").exists())
    else:
        time.sleep(rng.uniform(0, 2))
    process.kill()
    assert process.wait(30) == -signal.SIGKILL, "it got to its end before: more epochs are needed"


def check_kills(training: Training, unbroken: Training, moments: list[str]) -> None:
    rng = random.Random(0)
    for moment in moments:
        kill_at(training, moment, rng)
        assert len(training.read_runs()) == 1, "all are resumed in one run"
    last = training.start(resume="auto")
    assert last.wait(300) == 0, training.log.read_text()
    first_run, run = unbroken.read_runs()[0], training.read_runs()[0]
    assert run.info.status == "FINISHED"
    assert run.data.tags["best.sha256"] == first_run.data.tags["best.sha256"]
    assert training.read_history(run) == unbroken.read_history(first_run)
    assert "Traceback" not in training.log.read_text()


def test_a_run_killed_while_it_saves_is_the_unbroken_one_to_the_bit(
    training: Training, unbroken: Training
) -> None:
    check_kills(training, unbroken, ["writing a checkpoint"])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_killed_twenty_one_times_is_the_unbroken_one_to_the_bit(
    training: Training, class_folders: Path, tmp_path: Path
) -> None:
    training.options["epochs"] = 40
    unbroken = Training(tmp_path / "unbroken", class_folders, epochs=40)
    assert unbroken.start().wait(300) == 0
    check_kills(training, unbroken, 7 * ["any", "writing a checkpoint", "writing to MLflow"])


def test_a_finished_run_leaves_no_checkpoints(unbroken: Training) -> None:
    assert not (unbroken.folder / "checkpoints").exists()


def test_a_signal_saves_at_the_next_batch_and_names_the_command_to_resume(
    training: Training, unbroken: Training
) -> None:
    process = training.start(checkpoint_minutes=1000)
    training.wait_for(process, lambda: "epoch 1/" in training.log.read_text())
    time.sleep(0.3)  # into the next epoch
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    (run,) = training.read_runs()
    assert run.info.status == "KILLED"
    log = training.log.read_text()
    told = f"resume   skin-resnet train --resume {run.info.run_id} --checkpoint_dir "
    assert told in log
    assert log.splitlines()[-1] == "interrupted by SIGTERM"
    assert "Traceback" not in log
    # What is not given is the run's own.
    assert training.start(resume=run.info.run_id, checkpoint_minutes=1000).wait(300) == 0
    (run,) = training.read_runs()
    assert run.data.tags["best.sha256"] == unbroken.read_runs()[0].data.tags["best.sha256"]


def test_the_next_start_closes_a_run_whose_process_was_killed(training: Training) -> None:
    process = training.start(epochs=1000)
    training.wait_for(process, lambda: "epoch 1/" in training.log.read_text())
    process.kill()
    process.wait(30)
    assert training.read_runs()[0].info.status == "RUNNING"
    mlflow.set_tracking_uri(training.uri)
    try:
        clean_up_killed(training.folder / "checkpoints", close_abandoned)  # as each training does first
    finally:
        mlflow.set_tracking_uri(None)
    assert training.read_runs()[0].info.status == "KILLED"


@pytest.fixture
def config(tmp_path: Path, class_folders: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrainConfig]:
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield TrainConfig(
        data=str(class_folders), weights="none", image_size=32, epochs=2, batch_size=32, device="cpu",
        test="never", cache_dir=tmp_path / "cache", checkpoint_dir=tmp_path / "checkpoints",
    )  # fmt: skip
    mlflow.set_tracking_uri(None)


@pytest.fixture
def stopped(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    """A run that was interrupted after its first epoch."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("skin_resnet.tracking.records.EpochLog.write", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    return str(mlflow.search_runs(output_format="list")[0].info.run_id)


def test_what_a_run_cannot_be_resumed_with_is_refused(stopped: str, config: TrainConfig) -> None:
    folder = config.checkpoint_dir / stopped
    for changes, rule in (
        ({"resume": "0" * 32}, "has no last.pt"),
        ({"lr": 0.1}, "lr=0.0005 .* lr=0.1"),
        ({"split_seed": 1}, "split_seed=0 .* split_seed=1"),
    ):
        with pytest.raises(UserError, match=rule):
            train(config.with_changes(**{"resume": stopped, **changes}))
    state = read_checkpoint(folder / "last.pt")
    del state["format"]
    save_checkpoint(folder / "last.pt", {**state, "data_fingerprint": "other"})
    with pytest.raises(UserError, match="cannot resume: the split or the pixels"):
        train(config.with_changes(resume=stopped))
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        train(config.with_changes(resume=stopped))


def test_auto_begins_anew_where_no_run_was_given_these_options(stopped: str, config: TrainConfig) -> None:
    train(config.with_changes(resume="auto", epochs=1))
    train(config.with_changes(resume="auto"))
    runs = {run.info.run_id: run for run in mlflow.search_runs(output_format="list")}
    assert len(runs) == 2, "the second one went on with the run that was stopped"
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert runs[stopped].data.metrics["best_epoch"] in {1, 2}
    with pytest.raises(UserError, match="has finished"):
        train(config.with_changes(resume=stopped))


def test_a_run_whose_artifact_folder_is_full_at_its_end_is_kept_and_shows_nothing_twice(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(**options: object) -> None:
        mlflow.initialize_logged_model("model")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "mlruns")

    with monkeypatch.context() as patch:
        patch.setattr("mlflow.pyfunc.log_model", stop)
        with pytest.raises(UserError, match=r"No space left .* resume the run"):
            train(config.with_changes(test="at_end"))
    client = mlflow.MlflowClient()
    (failed,) = mlflow.search_runs(output_format="list")
    assert "No space left" in failed.data.tags["failure"]
    train(config.with_changes(test="at_end", resume=failed.info.run_id))
    (run,) = mlflow.search_runs(output_format="list")
    assert (run.info.status, run.data.tags.get("failure")) == ("FINISHED", None)
    models = client.search_logged_models([run.info.experiment_id])
    assert [model.status for model in models] == [mlflow.entities.LoggedModelStatus.READY]


def test_a_run_that_another_process_is_at_is_left_alone(stopped: str, config: TrainConfig) -> None:
    script = (
        "import sys, pathlib, time; from skin_resnet.training.checkpoint import RunFolder\n"
        "folder = RunFolder(pathlib.Path(sys.argv[1])); folder.acquire(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(config.checkpoint_dir / stopped)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(UserError, match="already being trained by another process"):
                train(config.with_changes(resume=stopped))
        finally:
            other.kill()
    assert mlflow.get_run(stopped).info.status == "KILLED"


def test_the_next_start_closes_a_run_whose_end_the_store_did_not_accept(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise mlflow.MlflowException("away")

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "set_terminated", fail)
        with pytest.raises(UserError):
            train(config)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "RUNNING"
    clean_up_killed(config.checkpoint_dir, close_abandoned)
    assert mlflow.get_run(run.info.run_id).info.status == "KILLED"


def test_a_run_is_held_until_it_has_ended(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original, resumable = mlflow.end_run, []

    def end_run(*arguments: str) -> None:
        resumable.append(find_resume_point(config.with_changes(resume="auto")))
        original(*arguments)

    monkeypatch.setattr(mlflow, "end_run", end_run)
    train(config)
    assert resumable == [None]


@pytest.mark.parametrize("resume", ["../elsewhere", "a/b"])
def test_resume_stays_in_the_checkpoint_folder(resume: str, config: TrainConfig) -> None:
    with pytest.raises(UserError, match="not a run id"):
        find_resume_point(config.with_changes(resume=resume))


def test_auto_takes_the_latest_interrupted_run_that_no_process_is_training(
    stopped: str, config: TrainConfig
) -> None:
    latest = RunFolder(config.checkpoint_dir / ("f" * 32))
    shutil.copytree(config.checkpoint_dir / stopped, latest.path)
    latest.last.touch()
    found = [find_resume_point(config.with_changes(resume="auto")) for _ in range(3)]
    assert [point and point.folder.path.name for point in found] == [latest.path.name, stopped, None]


def test_a_run_that_finishes_while_folders_are_listed_is_skipped(
    stopped: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = [config.checkpoint_dir / name / "last.pt" for name in (stopped, "finished")]
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: states)
    assert [folder.path.name for folder in list_interrupted(config.checkpoint_dir)] == [stopped]


def test_a_broken_network_is_not_saved_over_a_whole_state(config: TrainConfig, monkeypatch) -> None:
    def break_network(state: TrainingState, *arguments: Any) -> None:
        if state.step == 2:
            assert state.seen is not None
            state.seen[5] = torch.nan
        return describe(state, *arguments)

    describe = run_module.describe_state
    monkeypatch.setattr(run_module, "describe_state", break_network)
    config = config.with_changes(batch_size=8, checkpoint_minutes=1e-9)
    with pytest.raises(NonFiniteLossError, match="became nan in epoch 1") as told:
        train(config)
    assert told.value.positions == [5]
    (state,) = config.checkpoint_dir.glob("*/last.pt")
    assert read_checkpoint(state)["state"]["step"] == 1


def test_an_epoch_is_saved_as_it_was_while_the_next_one_trains_and_is_tracked_when_saved(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on = threading.Event(), threading.Event()
    order: list[str] = []

    def step(state: TrainingState, number: int) -> None:
        update(state, number)
        if began.is_set() and state.epoch == 1:
            goes_on.set()

    def save(contents: dict[Path, dict[str, Any]]) -> None:
        (content,) = [content for path, content in contents.items() if path.name == "last.pt"]
        if content["state"]["epoch"] == 1:
            before = hash_network(content["state"]["network"])
            began.set()
            assert goes_on.wait(60), "the next epoch waits for the save"
            assert hash_network(content["state"]["network"]) == before
            order.append("saved")
        save_all(contents)

    update, save_all = TrainingState.update_ema, run_module.save_checkpoints
    monkeypatch.setattr(TrainingState, "update_ema", step)
    monkeypatch.setattr(run_module, "save_checkpoints", save)
    config = config.with_changes(batch_size=8)
    folder = RunFolder(config.checkpoint_dir / "own")
    folder.acquire()
    run_module.run_training(
        config,
        on_epoch=lambda result: order.append(f"tracked {result.epoch}"),
        resume=ResumePoint(folder=folder, config=config),
    )
    assert order == ["saved", "tracked 1", "tracked 2"]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_state_that_cannot_be_written_ends_the_run_with_the_reason_and_keeps_the_one_before(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, is_interrupted: bool
) -> None:
    def save(contents: dict[Path, dict[str, Any]]) -> None:
        if any(content.get("history") for content in contents.values()):
            if is_interrupted:
                os.kill(os.getpid(), signal.SIGUSR1)
            raise UserError("No space left on device")
        save_all(contents)

    save_all = run_module.save_checkpoints
    monkeypatch.setattr(run_module, "save_checkpoints", save)
    with interrupts.handled(), pytest.raises(UserError, match="No space left"):
        train(config)
    (run,) = mlflow.search_runs(output_format="list")
    assert (run.info.status, "val/loss" in run.data.metrics) == ("FAILED", False)
    (state,) = config.checkpoint_dir.glob("*/last.pt")
    assert read_checkpoint(state)["history"] == []
