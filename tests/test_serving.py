"""The logged model: image bytes in, probabilities out, with no package installed."""

import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image

from benchmarks.serving import (
    MOST,
    Request,
    make_requests,
    measure_memory,
    send,
    serve,
    split,
    to_text,
)
from skin_resnet.data.decode import decode_image
from skin_resnet.model.preprocess import normalize
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.tracking.serving import MOST_SERVED
from skin_resnet.training.checkpoint import save_checkpoint

CLASSES = ("blue", "green", "red")
TEMPERATURE = 1.7
REASON = {  # kinds of requests whose last row has a reason
    "truncated image", "noise", "text", "bomb", "data URL", "unicode", "empty", "NUL", "mixed", "most rows",
    "huge body", "CSV path",
}  # fmt: skip
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


@pytest.fixture(scope="module")
def server(model_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """URL and process of `mlflow models serve`, in a folder where the package cannot be imported."""
    with serve(model_uri, tmp_path_factory.mktemp("server")) as served:
        yield served


def test_a_server_answers_base64_where_the_package_is_not_installed(model_uri: str, server) -> None:
    images = [encode(), encode(200, 150, "PNG", 1)]
    request = Request(kind="good", body=split([to_text(image) for image in images]))
    answer = pd.DataFrame(send(server[0], request).read_rows())
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


@pytest.mark.slow
def test_a_server_survives_hostile_requests(server) -> None:
    assert MOST == MOST_SERVED
    kinds, used = Counter[str](), []
    url, process = server
    for request in make_requests(seed=0, count=400):
        answer = send(url, request)
        assert answer.status == request.status, (request.kind, answer.body[:500])
        kinds[request.kind] += 1
        if answer.status == 200 and request.kind != "no rows":
            *_, row = answer.read_rows()
            assert row["error"] or request.kind not in REASON, request.kind
            assert (row["prediction"] is None) == bool(row["error"])
            assert all((row[name] is None) == bool(row["error"]) for name in CLASSES)
        if request.kind in {"too many", "10,000 rows"}:
            assert f"at most {MOST} images" in json.loads(answer.body)["message"]
        used.append(measure_memory(process))
    assert REASON < set(kinds)
    # The first requests start threads and compile kernels.
    assert max(used[300:]) < max(used[:200]) + 100


def test_text_is_not_taken_for_a_file_on_the_server(server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encode())
    csv = Request(kind="path", body=f"image\n{secret}\n".encode(), content_type="text/csv")
    for request in (csv, Request(kind="path", body=split([str(secret)]))):
        answer = send(server[0], request)
        assert answer.status == 400 or "not an image" in str(answer.read_rows()[0]["error"])
