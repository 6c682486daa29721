"""Workers end when they are told to, whatever Python was doing at that moment, and each has its GPU."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest

from search import workers
from search.config import SearchConfig
from skin_resnet.errors import UserError
from skin_resnet.training import interrupts


class Dying:
    """Gets SIGTERM in the middle of its `__del__`, where Python drops what a handler raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SearchConfig]:
    """For a worker in this very process, whose search is gone."""
    uri = mlflow.get_tracking_uri()
    monkeypatch.setattr(workers, "_end_with_search", lambda: None)
    yield SearchConfig(storage=f"sqlite:///{tmp_path}/study.db")
    mlflow.set_tracking_uri(uri)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_dropped_ends_a_worker_at_its_next_check(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: SearchConfig, objective: object) -> None:
        interrupts.check()
        Dying()
        interrupts.check()
        pytest.fail("the worker went on")

    monkeypatch.setattr(workers, "work", work)
    with pytest.raises(SystemExit) as ended:
        workers._work(config, "study", "run", {})
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_worker_ends_when_its_search_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: SimpleNamespace(join=lambda: None))
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    workers._end_with_search()
    assert killed == [(os.getpid(), signal.SIGTERM)]


class StubProcess:
    """A worker that is killed after a moment, or is at work until it is ended."""

    def __init__(self, *, is_killed: bool) -> None:
        self.exitcode: int | None = None
        self.is_killed = is_killed
        self.ended = False

    def is_alive(self) -> bool:
        was_alive = self.exitcode is None
        if self.is_killed:
            self.exitcode = -signal.SIGKILL
        return was_alive

    def terminate(self) -> None:
        self.ended = True

    kill = join = lambda self, timeout=None: None


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[StubProcess]:
    monkeypatch.setattr(workers, "_POLL_S", 0)
    monkeypatch.setattr(workers, "log_progress", lambda *arguments: None)
    return []


def test_an_interrupt_leaves_no_worker_behind(
    started: list[StubProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> StubProcess:
        started.append(StubProcess(is_killed=False))
        if len(started) == 2:
            signal.raise_signal(signal.SIGTERM)
        return started[-1]

    monkeypatch.setattr(workers, "_start", start)
    with interrupts.handled(), pytest.raises(KeyboardInterrupt):
        workers.run_workers(SearchConfig(workers=2), optuna.create_study(), SimpleNamespace(run_id="run"))
    assert [each.ended for each in started] == [True, True]


def test_workers_that_are_killed_again_and_again_are_replaced_only_so_often(
    started: list[StubProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object) -> StubProcess:
        started.append(StubProcess(is_killed=True))
        return started[-1]

    monkeypatch.setattr(workers, "_start", start)
    with pytest.raises(UserError, match="30 trials left"):
        workers.run_workers(SearchConfig(), optuna.create_study(), SimpleNamespace(run_id="run"))
    assert len(started) == 1 + workers.MAX_RETRIES + 1


@pytest.mark.parametrize(
    ("visible", "count", "wanted"),
    [
        (None, 0, [None, None]),
        (None, 1, ["0", "0"]),
        (None, 2, ["0", "1", "0"]),
        ("4, 2,7", 3, ["4", "2", "7", "4"]),
        ("GPU-a,MIG-b", 2, ["GPU-a", "MIG-b"]),
        ("1,-1,0", 1, ["1", "1"]),
    ],
)
def test_each_worker_sees_a_gpu_of_its_own(visible: str | None, count: int, wanted: list[str | None]) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    found = [workers.assign_device(number, environment, count) for number in range(len(wanted))]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in found] == wanted


@pytest.mark.parametrize(("device", "wanted"), [("auto", ["3", "5", "3"]), ("cpu", [None] * 3)])
def test_a_worker_is_started_with_its_gpu(
    monkeypatch: pytest.MonkeyPatch, config: SearchConfig, device: str, wanted: list[str | None]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(workers, "get_study_id", lambda study: "study")
    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", lambda process: None)
    for number, expected in enumerate(wanted):
        process = workers._start(config.with_changes(device=device), None, "run", number)
        assert process._args[-1].get("CUDA_VISIBLE_DEVICES") == expected


def test_a_workers_gpu_is_in_its_environment(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(workers, "work", lambda *arguments: None)
    workers._work(config, "study", "run", {"CUDA_VISIBLE_DEVICES": "1"})
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
