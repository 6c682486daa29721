"""Many machines: two workers on a study that a real PostgreSQL server keeps."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from search.study import count_done, lock

ROOT = Path(__file__).parent.parent
pytest.importorskip("psycopg")
# Debian puts what a server needs beside PATH, in a folder a version.
FOLDERS = [os.environ["PATH"], *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
PROGRAMS = {name: shutil.which(name, path=os.pathsep.join(FOLDERS)) for name in ("initdb", "pg_ctl")}
needs_server = pytest.mark.skipif(not all(PROGRAMS.values()), reason="PostgreSQL is not installed")


def as_server_user(program: str, *options: str, cwd: Path) -> None:
    # PostgreSQL refuses to run as root.
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    command = [PROGRAMS[program], *options]
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, timeout=120, **user)


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    folder = Path(subprocess.check_output(["mktemp", "-d", "/tmp/pg.XXXXXX"], text=True).strip())
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_server_user("initdb", "-D", f"{folder}/data", "-U", "search", "--auth=trust", cwd=folder)
    options = f"-p {port} -k {folder} -h 127.0.0.1"
    as_server_user("pg_ctl", "-D", f"{folder}/data", "-w", "-l", "log", "-o", options, "start", cwd=folder)
    yield f"postgresql+psycopg://search@127.0.0.1:{port}/postgres"
    as_server_user("pg_ctl", "-D", f"{folder}/data", "-m", "immediate", "stop", cwd=folder)
    shutil.rmtree(folder)


@needs_server
def test_a_lock_is_held_by_one_and_free_afterwards(storage: str) -> None:
    with lock(storage, "a"):
        with lock(storage, "a", wait=False) as got, lock(storage, "b", wait=False) as got_other:
            assert (got, got_other) == (False, True)
    with lock(storage, "a", wait=False) as got:
        assert got


@needs_server
@pytest.mark.slow
def test_two_searches_at_once_share_a_study_and_count_its_trials_once(
    storage: str, tmp_path: Path, class_folders: Path
) -> None:
    options = {
        "data": class_folders, "image_size": 32, "epochs": 1, "batch_size": 8, "device": "cpu",
        "heartbeat_s": 2, "n_trials": 5, "seeds": 0, "storage": storage, "cache_dir": tmp_path / "cache",
        "checkpoint_dir": tmp_path / "checkpoints",
    }  # fmt: skip
    command = [sys.executable, "-m", "search"] + [f"--{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True, capture_output=True)
    environment["MLFLOW_TRACKING_URI"] = uri
    machines = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        for machine in machines:
            _, error = machine.communicate(timeout=600)
            assert machine.returncode == 0, error.decode()
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.pid, signal.SIGKILL)
    database = optuna.storages.RDBStorage(storage)
    trials = optuna.load_study(study_name="search", storage=database).get_trials()
    database.remove_session()
    database.engine.dispose()
    assert len(trials) == count_done(trials) == 5
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert [trial.user_attrs.get("baseline") for trial in trials[:3]] == ["baseline recipe", "defaults", None]
