"""A tracking server that is not there, goes away or comes back: no epoch is lost, and none is there twice."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import mlflow
import pytest

from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Metrics
from skin_resnet.tracking import records
from skin_resnet.tracking.records import EpochLog
from skin_resnet.tracking.run import TrackedRun, open_run
from skin_resnet.training.engine import EpochResult

ROOT = Path(__file__).parent.parent


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def build_epoch(number: int) -> EpochResult:
    metrics = Metrics(loss=1 / number, accuracy=0.1 * number, balanced_accuracy=0.5, macro_auc=0.5)
    return EpochResult(
        epoch=number, lr=0.1, seconds=1, images_per_s=1, train=metrics, val=metrics,
        timestamp_ms=1_700_000_000_000 - number,  # a clock may be set back
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(None)


def read_values(uri: str, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = mlflow.MlflowClient(uri)
    names = build_epoch(1).to_metrics().keys() - {"train/macro_auc"}  # which is not logged
    points = {name: client.get_metric_history(run_id, name) for name in names}
    return {name: sorted((point.step, point.value) for point in points[name]) for name in names}


def test_what_a_store_does_not_take_is_written_once_it_is_back(store: str, capsys) -> None:
    run_id = mlflow.MlflowClient(store).create_run("0").info.run_id
    log = EpochLog(run_id)
    log.write(build_epoch(1))
    mlflow.set_tracking_uri(f"http://127.0.0.1:{find_free_port()}")
    log.write(build_epoch(2))
    log.write(build_epoch(3))
    mlflow.set_tracking_uri(store)
    log.write(build_epoch(4))
    # The next process has the history of the checkpoint, and does not know what was written.
    EpochLog(run_id, map(build_epoch, (1, 2, 3, 4))).finish()
    values = read_values(store, run_id)
    for name in values:
        assert values[name] == [
            (number, build_epoch(number).to_metrics()[name]) for number in (1, 2, 3, 4)
        ], name
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2, "one line when it goes, one when it is back"
    assert "MLflow unreachable" in told[0]
    assert "MLflow reachable again" in told[1]


def test_a_store_that_stays_away_ends_the_run_in_one_line(store: str, monkeypatch) -> None:
    monkeypatch.setattr(records, "_WAIT_S", 0)
    monkeypatch.setattr(records, "_RETRY_S", 0)
    away = f"http://127.0.0.1:{find_free_port()}"

    def go_on_while_it_goes_away() -> None:
        with open_run("a run") as run:
            mlflow.set_tracking_uri(away)
            EpochLog(run.run_id, [build_epoch(1)]).finish()

    with pytest.raises(UserError, match=f"MLflow unreachable at {away} .*resume the run") as told:
        go_on_while_it_goes_away()
    assert "\n" not in str(told.value)


def test_a_run_whose_store_goes_away_while_it_is_opened_does_not_stay_active(store: str, monkeypatch) -> None:
    def go_away(*arguments: object) -> None:
        raise mlflow.MlflowException("away")

    monkeypatch.setattr(TrackedRun, "set_tags", go_away)
    with pytest.raises(UserError, match="MLflow unreachable"), open_run("a run"):
        pass
    assert mlflow.active_run() is None
    assert [run.info.status for run in mlflow.search_runs(output_format="list")] == ["FAILED"]


def fail_once_to_end_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    original, failures = mlflow.MlflowClient.set_terminated, iter([mlflow.MlflowException("away")])

    def set_terminated(client: mlflow.MlflowClient, *arguments: object, **more: object) -> None:
        for failure in failures:
            raise failure
        original(client, *arguments, **more)

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", set_terminated)


def test_an_outage_at_the_end_of_a_child_run_does_not_end_its_parent(store: str, monkeypatch) -> None:
    with open_run("parent") as parent:
        with pytest.raises(UserError), open_run("child", parent_run_id=parent.run_id) as child:
            fail_once_to_end_runs(monkeypatch)
        assert mlflow.get_run(parent.run_id).info.status == "RUNNING"
    statuses = [mlflow.get_run(run.run_id).info.status for run in (parent, child)]
    assert statuses == ["FINISHED", "FAILED"]


@pytest.mark.parametrize("command", [["train", "--epochs=1"], ["reproduce", "0" * 32]])
def test_a_server_that_is_down_at_the_start_is_one_line_and_exit_code_2(
    command: list[str], tmp_path: Path
) -> None:
    killed = tmp_path / "checkpoints" / ("0" * 32)
    killed.mkdir(parents=True)
    (killed / "running.lock").touch()
    done = subprocess.run(
        [sys.executable, "-m", "skin_resnet", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{find_free_port()}"},
        capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()  # and not one for each time it was asked
    assert "http://127.0.0.1:" in line


class Server:
    """A real `mlflow server` that can be stopped and started again."""

    def __init__(self, folder: Path, database: str = "") -> None:
        self._port = find_free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._folder = folder
        self._database = database or f"sqlite:///{folder}/mlflow.db"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1",
                 "--backend-store-uri", self._database,
                 "--artifacts-destination", str(self._folder / "artifacts")],
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                cwd=self._folder, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            with suppress(OSError), urllib.request.urlopen(f"{self.uri}/health"):
                return
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            time.sleep(0.3)
        raise AssertionError((self._folder / "server.log").read_text())

    def stop(self) -> None:
        if self._process:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


@pytest.mark.slow
def test_a_training_continues_while_its_server_is_away(server: Server, class_folders: Path, tmp_path) -> None:
    options = {
        "data": class_folders, "weights": "none", "image_size": 32, "epochs": 60, "batch_size": 8,
        "device": "cpu", "test": "never", "checkpoint_dir": tmp_path / "checkpoints",
        "cache_dir": tmp_path / "cache",
    }  # fmt: skip
    log = tmp_path / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "skin_resnet", "train", *(f"--{k}={v}" for k, v in options.items())],
            env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.uri},
            stdout=file, stderr=subprocess.STDOUT, cwd=tmp_path,
        )  # fmt: skip

    def wait_for(text: str) -> None:
        deadline = time.monotonic() + 180
        while text not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)

    try:
        wait_for("epoch 2/60")
        server.stop()
        wait_for("MLflow unreachable")
        epochs = log.read_text().count("\nepoch ")
        wait_for(f"epoch {epochs + 1}/60")
        server.start()
        wait_for("MLflow reachable again")
        assert process.wait(300) == 0, log.read_text()
    finally:
        process.kill()
    client = mlflow.MlflowClient(server.uri)
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    for name in ("train/loss", "val/balanced_accuracy", "lr"):
        points = client.get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in points) == list(range(1, 61)), name
