"""`mlflow run .` as a user types it, in processes of its own, with a real store."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent.parent
Start = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def client(tmp_path: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def environment(tmp_path: Path, client: MlflowClient) -> dict[str, str]:
    client.create_experiment("trial", artifact_location=(tmp_path / "artifacts").as_uri())
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "PYTHONUNBUFFERED": "1",
    }


@pytest.fixture
def start(tmp_path: Path, environment: dict[str, str]) -> Start:
    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "mlflow", "run", str(ROOT), "--experiment-name", "trial", *arguments],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=850,
            check=False,
        )

    return run


def quick(class_folders: Path, tmp_path: Path, **more: object) -> list[str]:
    """Options of a training of seconds."""
    options = {
        "data": class_folders,
        "weights": "none",
        "image_size": 32,
        "epochs": 1,
        "batch_size": 8,
        "cache_dir": tmp_path / "cache",
        "checkpoint_dir": tmp_path / "checkpoints",
        **more,
    }
    return [part for name, value in options.items() for part in ("-P", f"{name}={value}")]


def get_runs(client: MlflowClient) -> list[mlflow.entities.Run]:
    return client.search_runs([client.get_experiment_by_name("trial").experiment_id])


def test_a_training_and_its_evaluation(start: Start, client: MlflowClient, class_folders, tmp_path) -> None:
    done = start("--env-manager=local", *quick(class_folders, tmp_path, lr="1e-3"))
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("epoch 1/1 ") for line in done.stdout.splitlines())
    (run,) = get_runs(client)
    assert run.info.status == "FINISHED"
    # MLflow logged what was typed before our code began; another spelling of it would have been refused.
    assert run.data.params["lr"] == "1e-3"
    assert run.data.metrics["test_plain_accuracy"] > 0
    assert run.info.run_id in done.stdout

    done = start("--env-manager=local", "-e", "evaluate", "-P", f"model={run.info.run_id}", "-P",
                 f"cache_dir={tmp_path / 'cache'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    evaluation = get_runs(client)[0]
    for name in ("test_balanced_accuracy", "test_accuracy"):
        assert evaluation.data.metrics[name] == pytest.approx(run.data.metrics[name])


def test_a_misspelled_option_is_refused_with_the_near_name(start: Start, client: MlflowClient) -> None:
    done = start("--env-manager=local", "-P", "lrr=0.1")
    assert done.returncode != 0
    assert "did you mean --lr?" in done.stderr
    assert [run.info.status for run in get_runs(client)] == ["FAILED"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
@pytest.mark.slow
def test_sigterm_to_mlflow_run_alone_ends_the_training_too(
    environment: dict[str, str], client: MlflowClient, class_folders, tmp_path
) -> None:
    options = ["--env-manager=local", *quick(class_folders, tmp_path, epochs=300)]
    command = [sys.executable, "-m", "mlflow", "run", str(ROOT), "--experiment-name", "trial", *options]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    with process:
        next(line for line in process.stdout if line.startswith("epoch 2/"))
        process.terminate()
        rest, _ = process.communicate(timeout=120)  # returns when the training has ended, too
    assert "resume" in rest
    (run,) = get_runs(client)
    assert run.info.status == "KILLED"


CONDA = """#!/bin/sh
echo "$@" >> "$STUB_LOG"
case "$1 $2" in "env list") echo '{"envs": []}' ;; esac
"""


@pytest.mark.slow
def test_the_default_environment_is_made_by_conda(
    start: Start, client: MlflowClient, class_folders, tmp_path
) -> None:
    home, log = tmp_path / "conda", tmp_path / "conda.log"
    for name in ("bin/conda", "bin/activate", "etc/profile.d/conda.sh"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
    (home / "bin/conda").write_text(CONDA)
    (home / "bin/conda").chmod(0o755)
    (home / "etc/profile.d/conda.sh").write_text(f'conda() {{ "{home}/bin/conda" "$@"; }}\n')
    done = start(
        *quick(class_folders, tmp_path, arch="resnet152"), MLFLOW_CONDA_HOME=str(home), STUB_LOG=str(log)
    )
    assert done.returncode == 0, done.stderr
    (run,) = get_runs(client)
    assert run.info.status == "FINISHED"
    assert run.data.params["arch"] == "resnet152"
    asked = log.read_text()
    assert f"--file {ROOT}/conda.yaml" in asked
    assert "activate mlflow-" in asked


@pytest.mark.slow
def test_the_demo_learns_clearly_more_than_always_nv(start: Start, client: MlflowClient, tmp_path) -> None:
    # As `make demo` does.
    given = {"epochs": 16, "batch_size": 32, "checkpoint_dir": tmp_path}
    options = [part for name, value in given.items() for part in ("-P", f"{name}={value}")]
    done = start("--env-manager=local", *options)
    assert done.returncode == 0, done.stderr
    metrics = get_runs(client)[0].data.metrics
    assert metrics["test_baseline_accuracy"] > 1 / 7
    assert metrics["test_balanced_accuracy_low"] > 1 / 7 + 0.05
    assert metrics["test_balanced_accuracy"] < 0.98  # and the task is not trivial
