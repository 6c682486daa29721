"""Workers end when they are told to, whatever Python was doing at that moment, and progress is told."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import optuna
import pytest

from search import workers
from search.config import SearchConfig


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
        workers._work(config, "study", "run", mlflow.get_tracking_uri(), os.getppid())
    assert ended.value.code == 128 + signal.SIGTERM


def test_a_worker_ends_when_its_search_is_gone(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "work", lambda config, objective, check_alive: check_alive())
    workers._work(config, "study", "run", mlflow.get_tracking_uri(), os.getppid())
    with pytest.raises(SystemExit):
        workers._work(config, "study", "run", mlflow.get_tracking_uri(), os.getppid() + 1)


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
    def start(config: object, study: object, run_id: str, processes: list[StubProcess]) -> None:
        if started:
            raise KeyboardInterrupt
        started.append(StubProcess(None))
        processes.append(started[0])

    monkeypatch.setattr(workers, "_start", start)
    with pytest.raises(KeyboardInterrupt):
        workers.run_workers(SearchConfig(workers=2), optuna.create_study(), "run")
    assert started[0].ended


def test_workers_that_are_killed_again_and_again_are_replaced_only_so_often(
    started: list[StubProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(config: object, study: object, run_id: str, processes: list[StubProcess]) -> None:
        started.append(StubProcess(-signal.SIGKILL))
        processes.append(started[-1])

    told: list[dict[str, float]] = []
    monkeypatch.setattr(workers, "_start", start)
    monkeypatch.setattr(
        workers.search_runs, "log_progress", lambda run_id, figures, step: told.append(figures)
    )
    with pytest.raises(RuntimeError, match="30 trials left"):
        workers.run_workers(SearchConfig(), optuna.create_study(), "run")
    assert len(started) == 1 + workers.MAX_RETRIES + 1
    assert "search/eta_s" not in told[0], "nothing is known yet"
