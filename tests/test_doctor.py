"""The doctor: a line for each check, whatever is broken, and nothing is created by checking."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import mlflow
import pynvml
import pytest
import torch

from skin_resnet.commands import doctor as module
from skin_resnet.commands.config import DoctorConfig
from skin_resnet.commands.doctor import check_device, check_disk, check_packages, doctor
from skin_resnet.errors import UserError

ROOT = Path(__file__).parent.parent
TOPICS = ["python", "packages", "device", "disk", "tracking"]


def run_doctor(*command: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the doctor in a process of its own, with an empty home."""
    kept = {
        name: value for name, value in os.environ.items() if name in {"PATH", "LD_LIBRARY_PATH", "TMPDIR"}
    }
    environment = kept | {"HOME": str(folder), "PYTHONDONTWRITEBYTECODE": "1"} | variables
    command = (sys.executable, *command, "-m", "skin_resnet", "doctor")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_problems_the_exit_code_is_0_and_nothing_is_created(tmp_path: Path) -> None:
    done = run_doctor(folder=tmp_path, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == TOPICS
    assert "PROBLEM" not in done.stdout
    assert f"{tmp_path}/mlflow.db" in lines[-2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("problem", ["a file above", "a link to nowhere", "no permission"])
def test_a_folder_that_is_not_writable_is_a_problem(
    problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "file" / "below"
    if problem == "a file above":
        (tmp_path / "file").touch()
    elif problem == "a link to nowhere":
        place = tmp_path / "link"
        place.symlink_to(tmp_path / "nowhere")
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: "file" not in str(path) and path != tmp_path)
    with pytest.raises(UserError, match=f"cache_dir={place}"):
        check_disk("cache_dir", place)


def test_an_almost_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "for cache_dir" in check_disk("cache_dir", tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1_900_000_000))
    with pytest.raises(UserError, match=r"1\.9 GB free for cache_dir; 2\.0 GB"):
        check_disk("cache_dir", tmp_path / "cache")


def test_a_store_that_cannot_work_is_a_problem_and_its_password_is_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    assert doctor(DoctorConfig()) == 1
    captured = capsys.readouterr()
    assert re.search(
        r"^tracking +PROBLEM: .*http://\*\*\*@127.0.0.1:1.*\nproblems found: 1$", captured.out, re.M
    )
    assert "secret" not in captured.out + captured.err


def test_packages_are_compared_with_what_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "read_requirements", lambda: ["numpy>=99", "absent>=1", "scipy", "x ; extra == 'dev'"]
    )
    with pytest.raises(
        UserError, match=r"^numpy>=99 \(2[\d.]+\), absent>=1 \(not installed\); run `make setup`"
    ):
        check_packages()


def test_without_a_checkout_the_installed_metadata_says_what_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "skin_resnet-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: skin-resnet\nVersion: 1\nRequires-Dist: torch>=99\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module.skin_resnet, "__file__", str(tmp_path / "skin_resnet" / "__init__.py"))
    with pytest.raises(UserError, match="torch>=99"):
        check_packages()


@pytest.mark.parametrize(("cuda", "fix"), [("13.0", "driver"), (None, "with CUDA")])
def test_a_gpu_that_torch_cannot_use_is_a_problem(cuda: str | None, fix: str, monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    with pytest.raises(UserError, match=fix):
        check_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CPU" in check_device()


def test_missing_packages_are_problems_and_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match("mlflow|torch", entry.name):
            (tmp_path / "site" / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "skin_resnet", tmp_path / "skin_resnet", ignore=shutil.ignore_patterns("*.pyc"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = run_doctor("-S", folder=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert (done.returncode, done.stderr) == (1, "")
    problems = {line.split()[0]: line for line in done.stdout.splitlines() if "PROBLEM" in line}
    assert re.search(r"mlflow.*\(not installed\), torch.*\(not installed\)", problems["packages"])
    assert "'torch'" in problems["device"]
    assert "'mlflow'" in problems["tracking"]


def test_without_any_package_one_line_says_what_to_do() -> None:
    done = run_doctor("-S", folder=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "make setup" in done.stderr
