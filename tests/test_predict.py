"""The command predict: images in, a table out: on the terminal, in a file, or on the run of `mlflow run`."""

import csv
import dataclasses
import json
import os
import threading
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import skin_resnet.model.classifier
from skin_resnet.cli import parse_options
from skin_resnet.commands.config import PredictConfig
from skin_resnet.commands.predict import find_images, predict
from skin_resnet.data.decode import decode_image
from skin_resnet.data.tables import replace_nan
from skin_resnet.errors import UserError
from skin_resnet.evaluation.artifacts import compute_gradcam
from skin_resnet.labels import DIAGNOSES, HAM10000_CLASSES
from skin_resnet.model.classifier import measure_unfamiliarity
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.models import load_model
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.checkpoint import save_checkpoint


def write_model(file: Path, image_size: int = 64) -> str:
    """Write the checkpoint of a network with random weights, as of a finished training."""
    torch.manual_seed(0)
    network = build_resnet("resnet50", 7)
    torch.nn.init.normal_(network.fc.weight, std=1.0)  # or all images would be of one class
    calibration = {"temperature": 1.0, "decision_weights": [0.6, *[1.0] * 6], "least_probability": 0.15}
    checkpoint = {
        "arch": "resnet50", "classes": list(HAM10000_CLASSES), "image_size": image_size, "epoch": 3,
        "network": network.state_dict(), "calibration": calibration, "license": "none", "config": {},
        "familiarity": {"center": torch.zeros(256), "whitening": 0.4 * torch.eye(256)},
        "split": {"train": ["a"], "val": ["b"], "test": ["c"]}, "run_id": "0123456789abcdef",
    }  # fmt: skip
    save_checkpoint(file, checkpoint)
    return str(file)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model") / "best.pt")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `images` in it: five images, an unreadable one, and what is no image."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for number, name in enumerate(
        ("b.jpg", "a.PNG", "sub/c.jpg", "sub/my lesion, left.jpg", "sub/deep/d.jpg")
    ):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(50 * number, 55 + 50 * number, (8, 8, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 70)).save(tmp_path / "images" / name)
    (tmp_path / "images/sub/broken.jpg").write_bytes(b"no image")
    (tmp_path / "images/notes.txt").write_text("not an image")
    return tmp_path / "images"


def name_all(text: str) -> list[str]:
    return [os.path.relpath(path) for path in find_images(text)]


def test_a_folder_gives_its_images_and_those_below_it_sorted(images: Path) -> None:
    expected = sorted(
        str(path) for path in Path("images").rglob("*") if path.suffix.lower() in {".jpg", ".png"}
    )
    assert len(expected) == 6
    assert sorted(name_all("images")) == expected
    assert name_all("images") == [str(path) for path in sorted(map(Path, expected))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("images/b.jpg", ["images/b.jpg"]),
        ("images/b.jpg, images/a.PNG", ["images/b.jpg", "images/a.PNG"]),
        ("images/*.jpg", ["images/b.jpg"]),
        ("images/**/d.jpg,images/b.jpg", ["images/sub/deep/d.jpg", "images/b.jpg"]),
        ("images/sub/my lesion, left.jpg", ["images/sub/my lesion, left.jpg"]),
        ("list.csv", ["images/b.jpg", "images/gone.jpg"]),
    ],
)
def test_files_patterns_and_tables_give_images_in_their_order(
    images: Path, text: str, expected: list[str]
) -> None:
    Path("list.csv").write_text("path,note\nimages/b.jpg,x\nimages/gone.jpg,y\n")
    assert name_all(text) == expected


def test_words_on_the_command_line_are_paths_whatever_is_in_them(images: Path) -> None:
    words = ["images/b.jpg", "images/sub/my lesion, left.jpg"]
    for typed in (["MODEL", *words, "--batch_size", "2"], ["--batch_size", "2", "MODEL", *words]):
        config = parse_options("predict", typed)
        assert (config.model, config.batch_size) == ("MODEL", 2)
        assert name_all(config.images) == words


@pytest.mark.parametrize("text", ["images/none.jpg", "images/*.gif", "images/b.jpg,elsewhere", "empty"])
def test_where_there_is_no_image_nothing_is_predicted(images: Path, text: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(UserError, match=text.rpartition(",")[2].replace("*", r"\*")):
        predict(PredictConfig(model="nosuch", images=text))


def test_a_file_has_what_the_classifier_says_of_each_image(model: str, images: Path, capsys) -> None:
    paths = find_images("images")
    expected = load_model(model, "cpu", "fp32").predict(paths)
    assert expected.prediction.nunique() > 1
    assert expected.set.str.len().max() > 1
    assert set(expected.refer.dropna()) == {"uncertain", "unfamiliar"}
    for file in ("out.csv", "out.jsonl"):
        config = PredictConfig(
            model=model, images="images", output=file, device="cpu", precision="fp32", batch_size=2
        )
        assert predict(config) == 0
    assert "images: 6, unreadable: 1, to refer: 5;" in capsys.readouterr().out
    table = pd.read_csv("out.csv", keep_default_na=False, na_values={"p_malignant": ""})
    records = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert list(table.columns) == list(records[0]) == ["path", *expected.columns]
    assert list(table.path) == [record["path"] for record in records] == list(map(str, paths))
    for row, record, truth in zip(table.itertuples(), records, expected.itertuples(), strict=True):
        assert row.error == record["error"] == truth.error
        if truth.error:
            assert record["set"] is None
            assert record["nv"] is None
            continue
        assert (row.prediction, row.name, row.refer) == (truth.prediction, truth.name, truth.refer)
        assert row.set.split("|") == record["set"] == truth.set
        # In other batches, sums are rounded otherwise.
        assert float(row.p_malignant) == pytest.approx(record["p_malignant"], abs=1e-12)
        malignant = sum(getattr(truth, each.code) for each in DIAGNOSES if each.malignant)
        assert record["p_malignant"] == pytest.approx(malignant, abs=1e-5)
        small = min(record[name] for name in HAM10000_CLASSES)
        assert small == pytest.approx(min(float(getattr(row, name)) for name in HAM10000_CLASSES), rel=1e-6)
    assert sorted(os.listdir()) == ["images", "out.csv", "out.jsonl"], (
        "no tracking store, nothing half-written"
    )


def test_the_next_images_are_decoded_while_a_batch_is_predicted(
    model: str, images: Path, monkeypatch
) -> None:
    paths = find_images("images")
    begun = [threading.Event() for _ in paths]

    def decode(file: Path, image_size: int) -> NDArray[np.uint8]:
        begun[paths.index(file)].set()
        return decode_image(file, image_size)

    def score(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        waited.append(begun[min(2 * len(waited) + 2, len(paths) - 1)].wait(60))
        return np.full((len(pixels), 7), 1 / 7), np.zeros(len(pixels))

    monkeypatch.setattr(skin_resnet.model.classifier, "decode_image", decode)
    waited: list[bool] = []
    dataclasses.replace(load_model(model, "cpu"), score=score).predict(paths, batch_size=2)
    assert waited == [True, True, True]


def test_the_terminal_shows_each_image_whole_in_80_columns(
    model: str, images: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert predict(PredictConfig(model=model, images="images", device="cpu", precision="fp32")) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1].endswith("research software, not a medical device")
    table = load_model(model, "cpu", "fp32").predict(find_images("images"))
    for name, row in zip(("a.PNG", "b.jpg"), table.itertuples(), strict=False):
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert f"{row.p_malignant:.2f}" in line
        assert row.prediction in line
    assert sum(line.rstrip().endswith(" unreadable") for line in lines) == 1


def test_the_exit_code_is_1_only_if_no_image_can_be_read(model: str, images: Path) -> None:
    config = PredictConfig(
        model=model, images="images/sub/broken.jpg", output="out.csv", device="cpu", precision="fp32"
    )
    assert predict(config) == 1
    (row,) = csv.DictReader(Path("out.csv").read_text().splitlines())
    assert "not an image" in row["error"]
    assert row["prediction"] == ""
    assert predict(config.with_changes(images="images/sub/broken.jpg,images/b.jpg", batch_size=1)) == 0


@pytest.mark.parametrize("output", ["out.txt", "nosuch/out.csv", "images"])
def test_a_wrong_output_is_refused_before_the_model_is_read(images: Path, output: str) -> None:
    with pytest.raises(UserError, match=f"output={output}"):
        predict(PredictConfig(model="nosuch", images="images", output=output))


def test_what_fails_while_it_writes_leaves_the_file_that_was_there(
    model: str, images: Path, monkeypatch
) -> None:
    def fail(table: pd.DataFrame, file: Path, **_: object) -> None:
        file.write_text("half")
        raise OSError(28, "No space left on device", str(file))

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    Path("out.csv").write_text("before")
    with pytest.raises(UserError, match="No space left"):
        predict(
            PredictConfig(
                model=model, images="images/b.jpg", output="out.csv", device="cpu", precision="fp32"
            )
        )
    assert Path("out.csv").read_text() == "before"
    assert sorted(os.listdir()) == ["images", "out.csv"]


def test_gradcam_images_are_the_image_beside_what_supports_its_prediction(model: str, images: Path) -> None:
    config = PredictConfig(model=model, images="images", explain="made/cam", device="cpu", precision="fp32")
    predict(config.with_changes(output="out.csv", batch_size=4))
    assert sorted(os.listdir("made/cam")) == [
        "1_a.png", "2_b.png", "4_c.png", "5_d.png", "6_my lesion, left.png",
    ]  # fmt: skip
    classifier = load_model(model, "cpu", "fp32")
    pixels = decode_image(Path("images/sub/c.jpg"), 64)
    shown = np.asarray(Image.open("made/cam/4_c.png"))
    np.testing.assert_array_equal(shown[:, :64], pixels)
    code = pd.read_csv("out.csv").prediction[3]
    heat = compute_gradcam(
        classifier.networks[0],
        normalize(to_float(torch.from_numpy(pixels[None]))),
        torch.tensor([HAM10000_CLASSES.index(code)]),
        stage=3,
    )[0]
    change = np.abs(shown[:, -64:].astype(float) - pixels).sum(axis=2)
    assert change[heat == 0].max(initial=0) <= 1.5, "where nothing supports it, the image shows through"
    assert change[heat > 0.8].mean() > 20


def test_gradcam_is_refused_where_it_shows_nothing(images: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small.pt", image_size=32)
    with pytest.raises(UserError, match="Grad-CAM"):
        predict(PredictConfig(model=small, images="images", explain="cam", device="cpu", precision="fp32"))
    assert not Path("cam").exists()


@pytest.mark.parametrize("images_read", ["images", "images/sub/broken.jpg"])
def test_in_the_run_of_mlflow_run_the_predictions_are_an_artifact(
    model: str, images: Path, images_read: str, monkeypatch
) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{images.parent}/mlflow.db")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    client = mlflow.MlflowClient()
    run_id = client.create_run(
        client.create_experiment("e", (images.parent / "artifacts").as_uri())
    ).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    try:
        predict(PredictConfig(model=model, images=images_read, device="cpu", precision="fp32"))
        run = client.get_run(run_id)
        table = pd.read_csv(client.download_artifacts(run_id, "predictions.csv"))
        assert list(table.path) == [str(path) for path in find_images(images_read)]
        assert run.info.status == "FINISHED"
        assert run.data.params["images"] == images_read
        assert ("failure" in run.data.tags) == (table.prediction.isna().all())
    finally:
        mlflow.set_tracking_uri(None)


def test_a_run_id_where_there_is_no_tracking_store_creates_none(images: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{images.parent}/mlflow.db")
    try:
        with pytest.raises(UserError, match="0123456789abcdef"):
            predict(PredictConfig(model="0123456789abcdef", images="images"))
    finally:
        mlflow.set_tracking_uri(None)
    assert os.listdir() == ["images"]


def test_a_small_probability_is_no_zero_in_json() -> None:
    table = pd.DataFrame({"mel": [8e-14, np.nan], "error": ["", "no image"]})
    assert json.loads(json.dumps(replace_nan(table).to_dict("records"), allow_nan=False)) == [
        {"mel": 8e-14, "error": ""},
        {"mel": None, "error": "no image"},
    ]


def test_bf16_does_not_round_how_unfamiliar_an_image_is() -> None:
    features, whitening = torch.rand(9, 256), torch.randn(256, 256)
    expected = measure_unfamiliarity(features, torch.zeros(256), whitening)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure_unfamiliarity(features, torch.zeros(256), whitening)
    torch.testing.assert_close(found, expected)


def test_a_model_may_be_named_as_mlflow_names_that_of_a_run(images: Path) -> None:
    mlflow.set_tracking_uri(f"sqlite:///{images.parent}/mlflow.db")
    prepare_store()
    try:
        with pytest.raises(UserError, match="0123456789abcdef not found"):
            predict(PredictConfig(model="runs:/0123456789abcdef/model", images="images"))
    finally:
        mlflow.set_tracking_uri(None)
