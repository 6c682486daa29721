"""Evaluating a finished training again: its own options hold, and its test images are still the same."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from skin_resnet.commands.config import EvaluateConfig
from skin_resnet.commands.evaluate import evaluate
from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.errors import UserError
from skin_resnet.evaluation.calibration import fit_temperature, get_val_predictions
from skin_resnet.model.classifier import build_network
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.tracking.models import combine, load_model, read_finished, read_models
from tests.conftest import write_class_folders


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EvaluateConfig]:
    """A training that skipped an unreadable image, as one evaluates it."""
    folder = tmp_path_factory.mktemp("evaluate")
    data = write_class_folders(folder / "data", images_per_class=8)
    (data / "red" / "broken.png").write_bytes(b"no image")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    environment = pytest.MonkeyPatch()
    experiment = mlflow.create_experiment("evaluated", (folder / "artifacts").as_uri())
    environment.delenv("MLFLOW_EXPERIMENT_NAME")
    environment.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    config = TrainConfig(
        data=str(data), weights="none", image_size=32, epochs=1, batch_size=8, on_bad_image="skip",
        test="never", device="cpu", cache_dir=folder / "cache", checkpoint_dir=folder / "checkpoints",
    )  # fmt: skip
    train(config)
    (run,) = mlflow.search_runs([experiment], output_format="list")
    yield EvaluateConfig(model=run.info.run_id, device="cpu", cache_dir=folder / "cache")
    environment.undo()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def test_images(training: EvaluateConfig) -> Iterator[list[Path]]:
    """The files of the training's test images; what a test does to the data is undone."""
    checkpoint = read_finished(training.model)
    data = Path(checkpoint["config"]["data"])
    shutil.copytree(data, data.with_name("copy"))
    yield [next(data.rglob(f"{Path(each).name}*")) for each in checkpoint["split"]["test"]]
    shutil.rmtree(data)
    data.with_name("copy").rename(data)


def test_on_bad_image_is_that_of_the_training_unless_it_is_given(training: EvaluateConfig) -> None:
    evaluate(training)
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    assert run.data.tags["skipped_images"] == "1"
    assert run.data.metrics["test_accuracy"] > 0
    assert run.info.run_name == "evaluate · resnet50 · data · test"
    with pytest.raises(UserError, match=r"broken\.png"):
        evaluate(training.with_changes(on_bad_image="stop"))


@pytest.mark.parametrize("change", ["pixels", "diagnosis", "removed"])
def test_test_images_that_have_changed_since_the_training_are_refused(
    training: EvaluateConfig, test_images: list[Path], change: str
) -> None:
    file = test_images[0]
    if change == "pixels":
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(file)
    elif change == "diagnosis":
        other = next(folder for folder in file.parent.parent.iterdir() if folder != file.parent)
        file.rename(other / file.name)
    else:
        file.unlink()
    with pytest.raises(UserError, match="have changed since the training") as error:
        evaluate(training)
    assert "\n" not in str(error.value)
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    assert run.info.status == "FAILED"
    assert "test_accuracy" not in run.data.metrics


def test_several_models_are_averaged_and_calibrated_for_their_mean(training: EvaluateConfig) -> None:
    first = read_finished(training.model)
    config = TrainConfig.model_validate(first["config"]).with_changes(seed=1)
    train(config)
    (second,) = mlflow.search_runs(output_format="list", max_results=1)
    both = f"{training.model},{second.info.run_id}"

    def predict(model: str) -> tuple[pd.DataFrame, dict[str, str]]:
        evaluate(training.with_changes(model=model))
        (run,) = mlflow.search_runs(output_format="list", max_results=1)
        table = read_run_predictions(run.info.run_id)
        return table[["blue", "green", "red"]], run.data.tags

    def undo_temperature(model: str) -> pd.DataFrame:
        raw = predict(model)[0] ** read_finished(model)["calibration"]["temperature"]
        return raw.div(raw.sum(axis=1), axis=0)

    mean = (undo_temperature(training.model) + undo_temperature(second.info.run_id)) / 2
    found, tags = predict(both)
    assert mlflow.search_runs(output_format="list", max_results=1)[0].info.run_name.startswith(
        "evaluate · 2 runs · data"
    )
    calibrated = mean ** (1 / combine(read_models(both))["calibration"]["temperature"])
    np.testing.assert_allclose(found, calibrated.div(calibrated.sum(axis=1), axis=0), atol=1e-6)
    assert tags["model.run_id"] == both.replace(",", ", ")
    train(config.with_changes(split_seed=1))
    (other,) = mlflow.search_runs(output_format="list", max_results=1)
    before = len(mlflow.search_runs(output_format="list"))
    with pytest.raises(UserError, match="split"):
        evaluate(training.with_changes(model=f"{training.model},{other.info.run_id}"))
    assert len(mlflow.search_runs(output_format="list")) == before


def test_of_several_views_the_calibration_is_fitted_on_views_of_val(training: EvaluateConfig) -> None:
    evaluate(training.with_changes(tta=8, precision="fp32"))
    (run,) = mlflow.search_runs(output_format="list", max_results=1)
    found = read_run_predictions(run.info.run_id)[["blue", "green", "red"]].to_numpy()
    checkpoint = read_finished(training.model)
    data = prepare_data(TrainConfig.model_validate(checkpoint["config"]))
    network = build_network(checkpoint)
    raw = {}
    val = get_val_predictions(checkpoint)
    test_ids = tuple(read_run_predictions(run.info.run_id).image_id)
    for split, image_ids in (("val", val.image_ids), ("test", test_ids)):
        pixels = torch.from_numpy(data.store.pixels[data.store.find_rows(image_ids)])
        images = normalize(to_float(pixels))
        turned = [images.rot90(k, (2, 3)) for k in range(4)]
        with torch.inference_mode():
            views = [network(view).softmax(1) for each in turned for view in (each, each.flip(3))]
        raw[split] = torch.stack(views).mean(0).double().numpy()
    temperature = fit_temperature(replace(val, probabilities=raw["val"]))
    expected = raw["test"] ** (1 / temperature)
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=1e-4)


def read_run_predictions(run_id: str) -> pd.DataFrame:
    return pd.read_csv(
        mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="test/predictions.csv")
    )


def test_images_unlike_the_training_images_are_counted(training: EvaluateConfig, tmp_path: Path) -> None:
    for dx in ("blue", "red"):
        (tmp_path / "stripes" / dx).mkdir(parents=True)
        for number in range(4):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[:: number + 2] = 255
            Image.fromarray(pixels).save(tmp_path / "stripes" / dx / f"{dx}{number}.png")
    shares = {}
    for data in ("same", str(tmp_path / "stripes")):
        evaluate(training.with_changes(data=data))
        (run,) = mlflow.search_runs(output_format="list", max_results=1)
        path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="test/metrics.csv")
        shares[data] = pd.read_csv(path).set_index("name").value["unfamiliar"]
    assert shares["same"] < 0.5
    assert shares[str(tmp_path / "stripes")] == 1
    files = sorted((tmp_path / "stripes").rglob("*.png"))
    assert set(load_model(training.model, device="cpu").predict(files).refer) == {"unfamiliar"}
