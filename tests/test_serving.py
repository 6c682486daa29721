"""The logged model: image bytes in, probabilities out, with no package installed."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from skin_resnet.data.decode import decode_image
from skin_resnet.model.preprocess import normalize
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.training.checkpoint import save_checkpoint

CLASSES = ("blue", "green", "red")
TEMPERATURE = 1.7
WEIGHTS = [0.05, 0.15, 0.8]  # of a decision rule that often overrules the most probable class


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_resnet("resnet50", 3).eval()


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory: pytest.TempPathFactory, network: torch.nn.Module) -> str:
    folder = tmp_path_factory.mktemp("model")
    checkpoint = {
        "arch": "resnet50",
        "classes": list(CLASSES),
        "image_size": 48,
        "network": network.state_dict(),
        "calibration": {
            "temperature": TEMPERATURE,
            "decision_weights": WEIGHTS,
            "least_probability": 0.3,
        },
        "familiarity": {"center": torch.zeros(256), "whitening": torch.eye(256)},
        "license": "none",
        "run_id": "0123456789abcdef",
        "epoch": 3,
    }
    save_checkpoint(folder / "best.pt", checkpoint)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    experiment = mlflow.create_experiment("packaged", artifact_location=(folder / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        uri = TrackedRun(run.info.run_id).log_model(folder / "best.pt")
    path = mlflow.artifacts.download_artifacts(uri)
    mlflow.set_tracking_uri(None)
    return path


def encode(width: int = 64, height: int = 48, kind: str = "JPEG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(buffer, kind)
    return buffer.getvalue()


def test_probabilities_are_those_of_the_network_on_the_decoded_image(model_uri, network) -> None:
    images = [encode(), encode(200, 150, "PNG", 1), encode(60, 90, "JPEG", 2)]
    answer = mlflow.pyfunc.load_model(model_uri).predict(pd.DataFrame({"image": images}))
    pixels = torch.stack([torch.from_numpy(decode_image(io.BytesIO(image), 48)) for image in images])
    with torch.no_grad():
        logits = network(normalize(pixels.permute(0, 3, 1, 2).float() / 255))
        expected = (logits / TEMPERATURE).softmax(dim=1)
    assert answer[list(CLASSES)].to_numpy() == pytest.approx(expected.numpy(), abs=1e-6)
    decided = (expected * torch.tensor(WEIGHTS)).argmax(dim=1)
    assert answer.prediction.tolist() == [CLASSES[k] for k in decided]
    assert (decided != expected.argmax(dim=1)).any()


def test_a_broken_image_is_a_row_with_its_reason(model_uri) -> None:
    table = mlflow.pyfunc.load_model(model_uri).predict(pd.DataFrame({"image": [encode(), b"no picture"]}))
    assert table.error[0] == ""
    assert "not an image" in table.error[1]
    assert table.loc[1].drop(["error"]).isna().all()


@pytest.fixture
def server(model_uri: str, tmp_path: Path) -> Iterator[str]:
    """`mlflow models serve`, from a folder where the package cannot be imported."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["mlflow", "models", "serve", "-m", model_uri, "-p", str(port), "--env-manager", "local"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=tmp_path,
            env={**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ping"):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_answers_base64_where_the_package_is_not_installed(model_uri: str, server: str) -> None:
    images = [encode(), encode(200, 150, "PNG", 1)]
    rows = [[base64.b64encode(image).decode()] for image in images]
    body = json.dumps({"dataframe_split": {"columns": ["image"], "data": rows}}).encode()
    request = urllib.request.Request(f"{server}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        answer = pd.DataFrame(json.load(response)["predictions"])
    expected = mlflow.pyfunc.load_model(model_uri).predict(pd.DataFrame({"image": images}))
    assert answer.prediction.tolist() == expected.prediction.tolist()
    assert answer[list(CLASSES)].to_numpy() == pytest.approx(expected[list(CLASSES)].to_numpy(), abs=1e-5)


def test_nothing_is_pickled_and_requirements_are_pinned(model_uri) -> None:
    files = {file.name for file in Path(model_uri).rglob("*") if file.is_file()}
    assert "python_model.pkl" not in files
    assert not any(name.endswith((".pkl", ".pyc")) for name in files)
    requirements = (Path(model_uri) / "requirements.txt").read_text().split()
    assert all("==" in requirement for requirement in requirements)
    assert {requirement.split("==")[0] for requirement in requirements} >= {"torch", "torchvision", "pillow"}
