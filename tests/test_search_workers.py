"""Workers end when they are told to, whatever Python was doing at that moment, and progress is told."""

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import mlflow
import optuna
import pytest

from search import workers
from search.config import SearchConfig
from search.study import open_study
from skin_resnet.errors import UserError


class Dying:
    """Gets SIGTERM in the middle of its `__del__`, where Python drops what a handler raises."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def config(tmp_path: Path) -> Iterator[SearchConfig]:
    """For a worker in this very process."""
    uri = mlflow.get_tracking_uri()
    yield SearchConfig(storage=f"sqlite:///{tmp_path}/study.db")
    mlflow.set_tracking_uri(uri)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_python_dropped_ends_a_worker_at_its_next_trial(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(config: SearchConfig, objective: object, check_alive: Callable[[], None]) -> None:
        check_alive()
        Dying()
        check_alive()
        pytest.fail("the worker went on")

    monkeypatch.setattr(workers, "work", work)
    with pytest.raises(SystemExit) as ended:
        workers._work(config, "study", "run", os.getppid())
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_worker_ends_when_its_search_is_gone(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "work", lambda config, objective, check_alive: check_alive())
    workers._work(config, "study", "run", os.getppid())
    with pytest.raises(SystemExit):
        workers._work(config, "study", "run", os.getppid() + 1)


class StubProcess:
    """A worker that was killed, or that is at work until the study is over."""

    def __init__(self, exitcode: int | None) -> None:
        self.exitcode = exitcode
        self.ended = False

    def is_alive(self) -> bool:
        return self.exitcode is None

    def terminate(self) -> None:
        self.exitcode = self.exitcode or -signal.SIGTERM

    def kill(self) -> None:
        self.ended = True

    def join(self, timeout: float | None = None) -> None:
        pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[StubProcess]:
    started: list[StubProcess] = []
    monkeypatch.setattr(workers, "_POLL_S", 0)
    return started


def test_an_interrupt_while_workers_are_started_leaves_none_behind(
    started: list[StubProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(
        config: object, study: object, run: str, processes: dict[int, StubProcess], number: int
    ) -> None:
        if started:
            raise KeyboardInterrupt
        started.append(StubProcess(None))
        processes[number] = started[0]

    monkeypatch.setattr(workers, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        workers.run_workers(SearchConfig(workers=2), optuna.create_study(), SimpleNamespace(run_id="run"))
    assert started[0].ended


def test_workers_that_are_killed_again_and_again_are_replaced_only_so_often(
    started: list[StubProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(
        config: object, study: object, run: str, processes: dict[int, StubProcess], number: int
    ) -> None:
        started.append(StubProcess(-signal.SIGKILL))
        processes[number] = started[-1]

    monkeypatch.setattr(workers, "_start", start)
    paces: list[float | None] = []
    monkeypatch.setattr(workers, "log_progress", lambda *arguments: paces.append(arguments[-1]) or True)
    with pytest.raises(UserError, match="30 trials left"):
        workers.run_workers(SearchConfig(), optuna.create_study(), SimpleNamespace(run_id="run"))
    assert len(started) == 1 + workers.MAX_RETRIES + 1
    assert paces == [None], "nothing is known yet"


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
def test_a_worker_is_started_with_its_gpu_and_the_search_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, config: SearchConfig, device: str, wanted: list[str | None]
) -> None:
    seen: list[str | None] = []
    if device == "auto":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    else:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = dict(os.environ)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        SpawnProcess, "start", lambda process: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    )
    processes: dict[int, BaseProcess] = {}
    study = open_study(config.with_changes(device=device))
    for number in range(3):
        workers._start(config.with_changes(device=device), study, "run", processes, number)
    assert seen == wanted
    assert dict(os.environ) == before
