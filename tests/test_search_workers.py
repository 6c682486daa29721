"""Workers end when they are told to, whatever Python was doing, and each has its GPU.

That they end with their search, and by Ctrl-C, is in test_search_end_to_end.py.
"""

import os
import signal
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
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
    def work(config: SearchConfig, parent_run_id: str) -> None:
        interrupts.check()
        Dying()
        interrupts.check()
        pytest.fail("the worker went on")

    monkeypatch.setattr(workers, "work", work)
    with pytest.raises(SystemExit) as ended:
        workers._work(config, "run", {})
    assert ended.value.code == 128 + signal.SIGTERM


class StubProcess:
    """A worker that is killed after a moment."""

    exitcode: int | None = None

    def is_alive(self) -> bool:
        was_alive, self.exitcode = self.exitcode is None, -signal.SIGKILL
        return was_alive

    terminate = kill = join = lambda self, timeout=None: None


def test_workers_that_are_killed_again_and_again_are_replaced_only_so_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[StubProcess] = []
    monkeypatch.setattr(workers, "_start", lambda *arguments: started.append(StubProcess()) or started[-1])
    monkeypatch.setattr(workers, "_POLL_S", 0)
    monkeypatch.setattr(workers, "log_progress", lambda *arguments: None)
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


@pytest.mark.parametrize(("device", "wanted"), [("auto", ["3", "5", "3"]), ("cpu", ["3,5"] * 3)])
def test_a_worker_is_started_with_its_gpu(
    monkeypatch: pytest.MonkeyPatch, config: SearchConfig, device: str, wanted: list[str]
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(workers, "work", lambda *arguments: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(SpawnProcess, "start", lambda process: process._target(*process._args))
    for number in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        workers._start(config.with_changes(device=device), "run", number)
    assert seen == wanted
