"""The tracking store: created whole by whichever process is first, and refused in one line within seconds."""

import contextlib
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest

from skin_resnet.errors import UserError, hide_password
from skin_resnet.tracking.links import describe_experiments, save_view
from skin_resnet.tracking.run import open_run
from skin_resnet.tracking.store import check_store, prepare_store

ROOT = Path(__file__).parent.parent
PREPARE = "from skin_resnet.tracking.store import prepare_store; prepare_store()"
PREPARE_AND_RUN = f"{PREPARE}; import mlflow; mlflow.start_run(); mlflow.log_metric('x', 1); mlflow.end_run()"
CREATE_AS_MLFLOW_DOES = "import mlflow; mlflow.search_experiments()"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start in, without a tracking URI."""
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_processes_that_start_together_all_find_a_whole_store(folder: Path) -> None:
    processes = [start(PREPARE_AND_RUN, MLFLOW_EXPERIMENT_NAME="new") for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (experiment,) = mlflow.search_experiments(filter_string="name = 'new'")
    assert len(mlflow.search_runs([experiment.experiment_id])) == 4
    assert [path.name for path in folder.iterdir()] == ["mlflow.db"]


@pytest.mark.parametrize(
    "delay_s", [0, 0.15, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.05, 0.3))]
)
@pytest.mark.parametrize("code", [PREPARE, CREATE_AS_MLFLOW_DOES])
def test_a_kill_during_the_creation_does_not_break_the_next_start(
    code: str, delay_s: float, folder: Path
) -> None:
    process = start(code)
    while not any(folder.iterdir()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    time.sleep(delay_s)
    process.kill()
    process.communicate()
    prepare_store()
    mlflow.MlflowClient().create_run("0")


def test_a_new_store_has_the_artifact_folders_that_mlflow_gives_it(folder: Path) -> None:
    prepare_store()
    client = mlflow.MlflowClient()
    created = client.get_experiment(client.create_experiment("another"))
    assert client.get_experiment("0").artifact_location == str(folder / "mlruns" / "0")
    assert created.artifact_location == str(folder / "mlruns" / created.experiment_id)
    prepare_store()


def find_closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


@pytest.fixture(scope="module")
def whole_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        prepare_store()
    return folder / "mlflow.db"


def execute(*statements: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with contextlib.closing(sqlite3.connect(file)) as database:
            for statement in statements:
                database.execute(statement)
            database.commit()

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda file: file.write_text("no database"), "not a database"),
        (lambda file: os.truncate(file, 5000), "malformed"),
        (execute("DROP TABLE experiments"), "not a complete"),
        (execute("DELETE FROM alembic_version"), "not a complete"),
        (execute("UPDATE alembic_version SET version_num = '451aebb31d03'"), "mlflow db upgrade"),
        (execute("DELETE FROM experiments", "CREATE TABLE mine (x)", "DROP TABLE runs"), "not a complete"),
    ],
)
def test_a_damaged_or_foreign_database_is_refused_in_one_line_and_kept(
    change: Callable[[Path], None], reason: str, whole_database: Path, folder: Path
) -> None:
    change(Path(shutil.copy(whole_database, folder)))
    content = (folder / "mlflow.db").read_bytes()
    for check in (prepare_store, check_store):
        with pytest.raises(UserError, match=reason):
            check()
    assert (folder / "mlflow.db").read_bytes() == content


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite:////tmp",
        "sqlite:////dev/null/mlflow.db",
        "postgresql://me:secret@127.0.0.1:{closed}/x",
        "postgresql://me:secret@127.0.0.1:{silent}/x",
        "mysql://127.0.0.1/x",
        "http://[::1",
        "http://me:secret@127.0.0.1:{closed}",
        "http://127.0.0.1:{silent}",
        "nosuch://x",
        "sqlite+nosuch:///x",
        "./mlruns",
    ],
)
def test_a_uri_that_cannot_work_is_refused_in_one_line_within_seconds(
    uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = uri.format(closed=find_closed_port(), silent=silent.getsockname()[1])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        started = time.monotonic()
        with pytest.raises(UserError, match="MLFLOW_TRACKING_URI") as caught:
            prepare_store()
    assert time.monotonic() - started < 8, "4 s are allowed to connect"
    assert hide_password(uri) in str(caught.value) or uri.startswith("sqlite:////")
    assert "secret" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert list(folder.iterdir()) == []


def test_checking_creates_nothing(folder: Path) -> None:
    assert str(folder / "mlflow.db") in check_store()
    assert list(folder.iterdir()) == []
    logging.getLogger("mlflow").setLevel(logging.NOTSET)


def test_runs_go_to_an_experiment_of_their_own_and_keep_a_name_that_was_given(monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    with open_run("evaluate · a model") as run:
        run.rename("another name")
        found = mlflow.get_run(run.run_id)
        assert mlflow.get_experiment(found.info.experiment_id).name == "skin-resnet"
        assert found.info.run_name == "evaluate · a model"


def test_the_links_of_make_ui_lead_to_the_experiments_with_runs_and_create_no_store(folder: Path) -> None:
    assert "#/experiments?workflowType=machine_learning" in describe_experiments()
    assert not (folder / "mlflow.db").exists()
    with open_run("run") as run:
        experiment_id = mlflow.get_run(run.run_id).info.experiment_id
    mlflow.create_experiment("empty")
    (line,) = describe_experiments().splitlines()
    assert line.endswith(f"/#/experiments/{experiment_id}/runs?workflowType=machine_learning")
    save_view(run.run_id)
    save_view(run.run_id)
    tags = mlflow.get_experiment(experiment_id).tags
    (key,) = [name for name in tags if name.startswith("mlflow.sharedViewState.")]
    assert describe_experiments() == f"{line}&viewStateShareKey={key.rpartition('.')[2]}"


def test_a_description_that_mlflow_would_cut_ends_after_a_paragraph() -> None:
    with open_run("long") as run:
        run.describe("\n\n".join(f"Paragraph {number} ends." for number in range(600)))
    note = mlflow.get_run(run.run_id).data.tags["mlflow.note.content"]
    *paragraphs, last = note.split("\n\n")
    assert len(note) <= 8_000
    assert paragraphs == [f"Paragraph {number} ends." for number in range(len(paragraphs))]
    assert "artifacts" in last
