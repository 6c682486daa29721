"""Whole searches by the command line: two workers, kills, Ctrl-C, and the same command again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import optuna
import psutil
import pytest
from mlflow.entities import Run
from optuna.trial import FrozenTrial, TrialState
from test_outage import Server, server  # noqa: F401 (a fixture)

from search.study import drop_retried, list_ended, lock

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow
N_TRIALS = 5


class Search:
    """A search in a folder of its own, whose command can be given again and again."""

    def __init__(self, folder: Path, data: Path, **options: object) -> None:
        self.storage = options.setdefault("storage", f"sqlite:///{folder}/optuna.db")
        self.tracking_uri = f"sqlite:///{folder}/mlflow.db"
        options = {
            "data": data, "weights": "none", "image_size": 32, "epochs": 3, "batch_size": 8, "device": "cpu",
            "heartbeat_s": 1, "n_trials": N_TRIALS, "seeds": 0, "cache_dir": folder / "cache",
            "checkpoint_dir": folder / "cp", **options,
        }  # fmt: skip
        self.command = [sys.executable, "-m", "skin_resnet", "search"] + [
            f"--{k}={v}" for k, v in options.items()
        ]
        self.folder = folder
        self.log = folder / "log.txt"
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "MLFLOW_TRACKING_URI": self.tracking_uri, "PYTHONPATH": str(ROOT)}
        with self.log.open("ab") as log:
            # A group of its own, as a terminal's command is: Ctrl-C goes to all of it.
            process = subprocess.Popen(
                self.command, cwd=self.folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def finish(self) -> None:
        assert self.start().wait(300) == 0, self.log.read_text()

    def kill(self) -> None:
        """Let no process outlive a test, however it failed."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)

    def read_trials(self) -> list[FrozenTrial]:
        if self.storage.startswith("sqlite") and not (self.folder / "optuna.db").exists():
            return []
        with lock(self.storage, "schema"):  # or this would create tables, too
            storage = optuna.storages.RDBStorage(self.storage)
        try:
            return optuna.load_study(study_name="folders", storage=storage).get_trials()
        except (KeyError, optuna.exceptions.StorageInternalError):
            return []  # not begun yet
        finally:
            storage.remove_session()
            storage.engine.dispose()

    def wait_for(self, condition: Callable[[list[FrozenTrial]], bool]) -> list[FrozenTrial]:
        deadline = time.monotonic() + 300  # a busy machine
        while not condition(trials := self.read_trials()):
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.3)
        return trials

    def check_books(self, n_trials: int = N_TRIALS) -> None:
        """All is over in both systems, nothing is lost, nothing is counted twice."""
        trials = self.read_trials()
        assert all(trial.state.is_finished() for trial in trials)
        kept = drop_retried(trials)
        assert len(kept) == len(list_ended(trials)) == n_trials
        failed = [trial for trial in kept if trial.state == TrialState.FAIL]
        assert not failed, [trial.user_attrs for trial in failed]
        assert Counter(t.user_attrs.get("baseline") for t in kept) >= Counter(["baseline recipe", "defaults"])
        assert not [path for path in (self.folder / "cp").rglob("*") if path.is_file()]
        runs = {run.info.run_id: run for run in self.read_runs()}
        assert not [run for run in runs.values() if run.info.status == "RUNNING"]
        for trial in kept:
            expected = "FINISHED" if trial.state == TrialState.COMPLETE else "KILLED"
            run = runs[trial.user_attrs["run_id"]]
            assert (run.info.status, run.data.tags["search.trial"]) == (expected, str(trial.number))
        replaced = {trial.number for trial in trials} - {trial.number for trial in kept}
        for run in runs.values():
            if int(run.data.tags.get("search.trial", -1)) in replaced:
                assert run.info.status == "KILLED"

    def read_runs(self) -> list[Run]:
        mlflow.set_tracking_uri(self.tracking_uri)
        try:
            runs: list[Run] = mlflow.search_runs(search_all_experiments=True, output_format="list")
        finally:
            mlflow.set_tracking_uri(None)
        return runs


def find_workers(search: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(search.pid).children()
        if any("spawn_main" in part for part in child.cmdline())
    ]


def is_training(trials: list[FrozenTrial]) -> bool:
    return any(t.state == TrialState.RUNNING and t.user_attrs.get("epochs") for t in trials)


@pytest.fixture
def make_search(tmp_path: Path, class_folders: Path) -> Iterator[Callable[..., Search]]:
    made: list[Search] = []

    def make(**options: object) -> Search:
        made.append(Search(tmp_path, class_folders, **options))
        return made[-1]

    yield make
    for search in made:
        search.kill()


def test_kill_a_worker_then_everything_then_the_same_command(make_search: Callable[..., Search]) -> None:
    search = make_search(workers=2)
    first = search.start()
    search.wait_for(is_training)
    find_workers(first)[0].kill()
    over = len(list_ended(search.read_trials()))
    search.wait_for(lambda trials: len(list_ended(trials)) > over and is_training(trials))
    everything = [*find_workers(first), psutil.Process(first.pid)]
    for process in everything:
        process.kill()
    first.wait(30)
    assert any(trial.state == TrialState.RUNNING for trial in search.read_trials())
    assert any(run.info.status == "RUNNING" for run in search.read_runs())
    search.finish()
    search.check_books()
    parents = Counter(run.info.status for run in search.read_runs() if "search.trial" not in run.data.tags)
    assert parents == {"KILLED": 1, "FINISHED": 1}
    assert len(drop_retried(search.read_trials())) < len(search.read_trials()), "something was run again"


def test_workers_end_with_their_search_and_ctrl_c_ends_all_cleanly(
    make_search: Callable[..., Search],
) -> None:
    search = make_search(n_trials=3)
    first = search.start()
    search.wait_for(is_training)
    workers = find_workers(first)
    first.kill()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    second = search.start()
    trials = search.read_trials()
    search.wait_for(lambda now: len(now) > len(trials) and is_training(now))
    workers = find_workers(second)
    os.killpg(second.pid, signal.SIGINT)
    assert second.wait(60) == 128 + signal.SIGINT
    _, alive = psutil.wait_procs(workers, timeout=1)
    assert not alive
    assert not [run for run in search.read_runs() if run.info.status == "RUNNING"]
    assert "Traceback" not in search.log.read_text()
    search.finish()
    search.check_books(3)


def test_a_search_waits_for_a_tracking_server_that_restarts(
    make_search: Callable[..., Search],
    server: Server,  # noqa: F811
) -> None:
    search = make_search(n_trials=3)
    search.tracking_uri = server.uri
    process = search.start()
    search.wait_for(is_training)
    server.stop()
    search.wait_for(lambda trials: "MLflow unreachable" in search.log.read_text())
    done = len(list_ended(search.read_trials()))
    time.sleep(5)
    assert len(list_ended(search.read_trials())) == done < 3, "what has no run does not count"
    server.start()
    assert process.wait(300) == 0, search.log.read_text()
    search.check_books(3)
    assert len(search.read_trials()) == 3, "nothing was run again"
    assert "Traceback" not in search.log.read_text()
