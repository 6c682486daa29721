"""One image, one answer: evaluate, checkpoint, ONNX, pt2, the logged model and its server agree to 1e-5."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from benchmarks.serving import Request, send, serve, split, to_text
from skin_resnet.commands.config import EvaluateConfig
from skin_resnet.commands.evaluate import evaluate
from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.model.export import write_exported
from skin_resnet.tracking.models import load_model, read_finished
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.training.checkpoint import save_checkpoint
from tests.conftest import write_class_folders

pytestmark = pytest.mark.slow
CLASSES = ["blue", "green", "red"]
NUMBERS = [*CLASSES, "unfamiliarity"]
WORDS = ["prediction", "set", "refer", "model_version", "error"]


def draw(width: int, height: int, seed: int) -> Image.Image:
    """Smooth blobs, as photos have them: noise alone would be resized to gray."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def write_images(folder: Path) -> list[Path]:
    """Every kind of file that is decoded in its own way."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a right angle
    gray16 = np.array(draw(70, 50, 9).convert("L")).astype(np.uint16) * 257
    kinds: dict[str, Callable[[Path], Any]] = {
        "plain.jpg": draw(120, 90, 1).save,
        "portrait.png": draw(45, 77, 2).save,
        "web.webp": draw(64, 64, 3).save,
        "gray.jpg": draw(51, 33, 4).convert("L").save,
        "cmyk.jpg": draw(66, 48, 5).convert("CMYK").save,
        "turned.jpg": lambda path: draw(80, 50, 6).save(path, exif=exif),
        "palette.png": draw(53, 91, 7).quantize(16).save,
        "clear.png": draw(60, 60, 8).convert("RGBA").rotate(30).save,  # its corners are transparent
        "deep.png": Image.fromarray(gray16).save,
        "tiny.png": draw(17, 19, 10).save,
        "wide.bmp": draw(333, 61, 11).save,
        "same.tiff": draw(32, 32, 12).save,
    }
    for number, (name, save) in enumerate(kinds.items()):
        place = folder / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        save(place / name)
    return sorted(file for file in folder.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store, and `model.pt` of a training, whose later stages are made to matter."""
    folder = tmp_path_factory.mktemp("parity")
    data = write_class_folders(folder / "data", images_per_class=8)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    environment = pytest.MonkeyPatch()
    environment.delenv("MLFLOW_EXPERIMENT_NAME")
    experiment = mlflow.create_experiment("parity", (folder / "artifacts").as_uri())
    environment.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    train(
        TrainConfig(
            data=str(data),
            weights="none",
            image_size=32,
            epochs=1,
            batch_size=8,
            test="never",
            device="cpu",
            precision="fp32",
            cache_dir=folder / "cache",
            checkpoint_dir=folder / "checkpoints",
        )
    )
    (run,) = mlflow.search_runs(output_format="list")
    checkpoint = read_finished(run.info.run_id)
    random = torch.Generator().manual_seed(0)
    for name, each in checkpoint["network"].items():
        if name.endswith("bn3.weight"):  # blocks begin as the identity, and one epoch does not change that
            each.copy_(torch.rand(each.shape, generator=random))
        if name == "fc.weight":
            each.mul_(20)
    checkpoint["calibration"] |= {
        "temperature": 1.7, "tau": 0.8, "decision_weights": [0.1, 0.3, 0.6], "least_probability": 0.25,
    }  # fmt: skip
    checkpoint["familiarity"]["whitening"] *= 0.05
    save_checkpoint(folder / "model.pt", checkpoint)
    yield folder
    environment.undo()
    mlflow.set_tracking_uri(None)


def test_all_ways_to_classify_an_image_agree(folder: Path) -> None:
    files = write_images(folder / "images")
    checkpoint = read_finished(str(folder / "model.pt"))
    for suffix in (".onnx", ".pt2"):
        write_exported(checkpoint, folder / f"model{suffix}")
    expected = load_model(str(folder / "model.pt"), "cpu", "fp32").predict(files)
    assert expected.error.eq("").all()
    # The files try all that can differ.
    assert expected[CLASSES].std().min() > 0.01
    assert (expected.prediction != expected[CLASSES].idxmax(axis=1)).any()
    assert expected.prediction.nunique() > 1
    assert set(expected.refer) > {"unfamiliar"}
    assert expected.set.map(len).nunique() > 1

    tables = {
        suffix: load_model(str(folder / f"model{suffix}")).predict(files) for suffix in (".onnx", ".pt2")
    }
    with mlflow.start_run():
        model = TrackedRun(mlflow.active_run().info.run_id).log_model(folder / "model.pt")
    rows = pd.DataFrame({"image": [file.read_bytes() for file in files]})
    tables["logged model"] = mlflow.pyfunc.load_model(model).predict(rows)
    (folder / "server").mkdir()
    with serve(mlflow.artifacts.download_artifacts(model), folder / "server") as (url, _):
        answer = send(url, Request(kind="good", body=split([to_text(each) for each in rows.image])))
    assert answer.status == 200
    tables["server"] = pd.DataFrame(answer.read_rows())
    for name, table in tables.items():
        np.testing.assert_allclose(table[CLASSES], expected[CLASSES], atol=1e-5, err_msg=name)
        np.testing.assert_allclose(table.unfamiliarity, expected.unfamiliarity, rtol=1e-5, err_msg=name)
        assert json.loads(table[WORDS].to_json()) == json.loads(expected[WORDS].to_json()), name

    evaluate(
        EvaluateConfig(
            model=str(folder / "model.pt"),
            data=str(folder / "images"),
            precision="fp32",
            device="cpu",
            cache_dir=folder / "cache",
            batch_size=5,
        )
    )
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="test/predictions.csv")
    evaluated = pd.read_csv(path).set_index("image_id")
    assert len(evaluated) == len(files)
    evaluated = evaluated.loc[[file.stem for file in files]]
    np.testing.assert_allclose(evaluated[CLASSES], expected[CLASSES], atol=1e-5)
    assert evaluated.prediction.tolist() == expected.prediction.tolist()
