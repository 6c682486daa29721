"""The doctor: one screen, whatever is broken, and nothing is made by looking."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pynvml
import pytest
import torch
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from skin_resnet import doctor as module
from skin_resnet.commands.doctor import doctor
from skin_resnet.commands.environment import Finding, check_packages
from skin_resnet.config import DoctorConfig
from skin_resnet.data.folders import name_aside, write_aside
from skin_resnet.mlproject import ENTRY_POINTS
from tests.test_faults import disk, grow_old, mount  # noqa: F401

ROOT = Path(__file__).parent.parent
Examine = Callable[..., tuple[int, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to start in, by a user whose home is empty too."""
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def examine(folder: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    """Run the doctor; give its exit code, and its screen with the wrapped lines joined."""

    def run(**options: object) -> tuple[int, str]:
        code = doctor(DoctorConfig(**options))
        captured = capsys.readouterr()
        lines = captured.out.splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 100
        assert captured.err == ""
        return code, re.sub(r"\n +", " ", captured.out)

    return run


def list_all(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def run_alone(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a process of its own, without what tests set: MLflow is as users have it."""
    kept = {
        name: value for name, value in os.environ.items() if name in {"PATH", "LD_LIBRARY_PATH", "TMPDIR"}
    }
    environment = kept | {"HOME": str(folder.parent / "home"), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    command = (sys.executable, *command, "-m", "skin_resnet", "doctor")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_where_nothing_is_wrong_the_exit_code_is_0_and_nothing_is_made(folder: Path) -> None:
    before = list_all(folder.parent)
    done = run_alone(folder=folder, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n\nnothing is wrong\n")
    topics = ["code", "python", "packages", "memory", "store", "device", "tracking", "disk", "commands"]
    assert [line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()][:9] == topics
    assert f"torch {importlib.metadata.version('torch')}, " in done.stdout
    # A long path is broken anywhere.
    assert "mlflow.db:madebythefirstrun" in re.sub(r"\s", "", done.stdout)
    assert "free for cache_dir, checkpoint_dir, artifacts" in done.stdout
    assert list_all(folder.parent) == before


def test_no_run_of_mlflow_begins_to_ask_the_doctor() -> None:
    assert "doctor" not in ENTRY_POINTS
    assert "audit" in ENTRY_POINTS


@pytest.mark.parametrize("problem", ["a file above", "a link to nowhere", "a read-only disk"])
@pytest.mark.parametrize("option", ["cache_dir", "checkpoint_dir"])
def test_a_folder_that_cannot_be_written_is_told(
    option: str, problem: str, examine: Examine, folder: Path, request: pytest.FixtureRequest
) -> None:
    place = folder / "file" / "below"
    if problem == "a file above":
        (folder / "file").touch()
    elif problem == "a link to nowhere":
        place = folder / "link"
        place.symlink_to(folder / "nowhere")
    else:
        place = request.getfixturevalue("disk")
        mount(place, "remount,ro")
    before = list_all(folder)
    code, screen = examine(**{option: place})
    assert code == 1
    assert re.search(rf"{option} must be a folder that can be written, but .* (is no|cannot be)", screen)
    assert "choose another" in screen
    assert list_all(folder) == before


def test_a_home_that_does_not_exist_is_no_traceback(examine: Examine) -> None:
    _, screen = examine(cache_dir=Path("~nobody-of-this-name/cache"))
    assert "~nobody-of-this-name/cache: 0 decoded stores" in screen


def test_a_disk_that_is_almost_full_is_told(examine: Examine, disk: Path) -> None:  # noqa: F811
    code, screen = examine(cache_dir=disk / "cache")
    assert code == 1
    assert (
        "\n1 thing is wrong:\n1. 2 GB at least must be free for cache_dir, but 0.0 MB is; make room" in screen
    )


def test_stores_and_what_killed_builds_left_are_counted(examine: Examine, folder: Path) -> None:
    stores = folder / "stores"
    for store in (stores / "a", name_aside(stores / "b"), name_aside(folder / "demo-1")):
        store.mkdir(parents=True)
        (store / "pixels.npy").write_bytes(bytes(500_000))
        if store.suffix:
            grow_old(store)
    with write_aside(stores / "c"):
        code, screen = examine(cache_dir=Path())
    assert (
        "1 decoded store (0.5 MB); 1 being built, or killed within the hour; 2 leftovers (1.0 MB)" in screen
    )
    assert code == 0


def find_closed_port() -> int:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        return int(closed.getsockname()[1])


def test_a_server_that_is_not_there_is_told(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{find_closed_port()}")
    code, screen = examine()
    assert code == 1
    assert re.search(r"http://127.0.0.1:\d+ cannot be reached \(connection refused\); start it", screen)


def test_a_server_that_never_answers_is_not_waited_for(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        code, screen = examine()
    assert code == 1
    assert "does not within 3 s; see whether it runs" in screen or "cannot be reached" in screen


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Start an HTTP server that answers as told, and track on it."""
    servers = []

    def start(version: str, status: int, body: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                is_version = self.path == "/version"
                self.send_response(200 if is_version else status)
                self.end_headers()
                self.wfile.write((version if is_version else body).encode())

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *arguments: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("version", "status", "told"),
    [
        ("3.17.2", 401, "refuses us (401: no); set MLFLOW_TRACKING_USERNAME"),
        ("3.17.2", 403, "start it with --allowed-hosts"),
        ("3.17.2", 500, "does not answer as MLflow does (status 500); correct MLFLOW_TRACKING_URI"),
        ("<html>", 200, "does not answer as MLflow does"),
        ("2.9.1", 200, "is MLflow 2.9.1; update it to 3."),
    ],
)
def test_a_server_that_cannot_be_used_is_told(
    version: str, status: int, told: str, examine: Examine, serve: Callable[..., None]
) -> None:
    serve(version, status, "no" if status != 200 else "{}")
    code, screen = examine()
    assert code == 1
    assert told in screen


@pytest.mark.parametrize(("location", "code"), [("mlflow-artifacts:/0", 0), ("/dev/null/mlruns/0", 1)])
def test_a_server_that_answers_is_told_with_its_version_and_where_its_artifacts_go(
    location: str, code: int, examine: Examine, serve: Callable[..., None]
) -> None:
    serve("3.17.2", 200, json.dumps({"experiments": [{"artifact_location": location}]}))
    found, screen = examine()
    assert found == code
    assert "MLflow 3.17.2 answers" in screen
    assert ("artifacts must be a folder that can be written, but /dev/null is no folder" in screen) == code


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("database") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SqlAlchemyStore(f"sqlite:///{file}", "/dev/null/mlruns").engine.dispose()
    return file


def set_schema(revision: str) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        connection.close()

    return change


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda file: None, "artifacts must be a folder that can be written, but /dev/null is no folder"),
        (set_schema("451aebb31d03"), "has the old schema 451aebb31d03; back it up, then `mlflow db upgrade"),
        (set_schema("0123456789ab"), "has schema 0123456789ab, which MLflow 3"),
        (lambda file: file.write_bytes(b"no database" * 1000), "does not answer (file is not a database)"),
        (lambda file: os.truncate(file, 5000), "does not answer (database disk image is malformed)"),
    ],
)
def test_what_is_wrong_with_an_sqlite_database_is_told_and_it_stays_as_it_is(
    change: Callable[[Path], None], told: str, examine: Examine, database: Path, folder: Path
) -> None:
    file = shutil.copy(database, folder / "mlflow.db")
    change(Path(file))
    content, before = Path(file).read_bytes(), list_all(folder)
    code, screen = examine()
    assert told in screen
    assert code == 1
    assert Path(file).read_bytes() == content
    assert list_all(folder) == before


def test_a_folder_of_runs_that_mlflow_no_longer_writes_to_is_told(examine: Examine, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    code, screen = examine()
    assert code == 1
    assert "runs must be tracked in a database or on a server, but got the folder" in screen


@pytest.mark.parametrize("uri", ["postgresql://me:secret@127.0.0.1:{}/db", "http://me:secret@127.0.0.1:{}"])
def test_no_password_is_shown(uri: str, examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(find_closed_port()))
    code, screen = examine()
    assert code == 1
    assert "://***@127.0.0.1" in screen
    assert "secret" not in screen


def test_packages_out_of_their_range_are_problems_and_other_pins_are_only_told(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["numpy>=99", "absent>=1", "scipy"]')
    (tmp_path / "requirements.lock").write_text(
        "scipy==0.1\nabsent==1.0\nnumpy==1 ; sys_platform == 'none'\n"
    )
    finding = check_packages(tmp_path)
    numpy = importlib.metadata.version("numpy")
    (problem,) = finding.problems
    assert f"are not: numpy>=99 ({numpy}), absent>=1 (not installed); run `make setup`" in problem
    assert re.search(r"not as in requirements.lock: scipy [\d.]+ \(there 0.1\)$", finding.text)


def test_a_gpu_that_torch_cannot_use_is_told_with_the_drivers_complaint(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    def warn() -> bool:
        warnings.warn("CUDA initialization: the driver is too old (found version 1). Update.", stacklevel=1)
        return False

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", warn)
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    code, screen = examine()
    assert code == 1
    assert "torch must be able to use the NVIDIA GPU, but trains on the CPU: the driver says" in screen
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda number: number)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "H100")
    _, screen = examine()
    assert (
        "use the driver's H100, but trains on the CPU: CUDA initialization: the driver is too old" in screen
    )


def test_missing_packages_and_a_broken_module_are_told_and_not_traced(folder: Path) -> None:
    site = Path(sysconfig.get_path("purelib"))
    (folder / "site").mkdir()
    for entry in site.iterdir():
        if not re.match("mlflow|torch", entry.name):
            (folder / "site" / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "skin_resnet", folder / "skin_resnet", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "skin_resnet" / "audit.py").write_text("from pathlib import Pfad\n")
    before = list_all(folder)
    done = run_alone("-S", folder=folder, PYTHONPATH=str(folder / "site"), HOME="/dev/null")
    screen = re.sub(r"\n +", " ", done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(done.stdout.splitlines()) <= 24
    assert "but are not: mlflow>=3.17,<4 (not installed), torch>=" in screen
    assert "every module must import, but got ModuleNotFoundError: No module named 'torch'" in screen
    assert "No module named 'mlflow'" in screen
    assert "cannot import name 'Pfad' from 'pathlib'" in screen
    assert "cache_dir must be a folder" in screen
    assert "none can start; train, evaluate, compare, audit, reproduce cannot" in screen
    assert list_all(folder) == before


def test_without_any_package_one_line_says_what_to_do(folder: Path) -> None:
    done = run_alone("-S", folder=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert re.match(r"error: .*python.* must have the packages .* run `make setup`", done.stderr)


def test_a_check_that_breaks_is_told_and_the_others_go_on(
    examine: Examine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Finding:
        raise OSError("the disk is gone\nand so on")

    monkeypatch.setattr(module, "check_memory", fail)
    code, screen = examine()
    assert code == 1
    assert "memory    cannot be told (OSError: the disk is gone)" in screen
    assert "commands  train, evaluate, compare, audit, reproduce can start" in screen


def test_many_long_problems_stay_on_one_screen(examine: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    long = Finding(topic="memory", text="long/" * 90, problems=tuple(f"{n} {'rule ' * 90}" for n in range(9)))
    monkeypatch.setattr(module, "check_memory", lambda: long)
    code, screen = examine(cache_dir=Path("/dev/null", "x" * 200, "y" * 200))
    assert code == 1
    assert re.search(
        r"10 things are wrong:\n1\. .*\nand [5-9] more; mend these and look again\n$", screen, re.S
    )


def test_a_path_that_the_terminal_has_no_letters_for_is_shown_all_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding="ascii"))
    doctor(DoctorConfig(cache_dir=Path("läsionen")))
    assert rb"l\xe4sionen" in terminal.getvalue()
