"""Exported files: the scores of the network, whole or not at all, with what a classifier needs to know."""

import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from skin_resnet.commands.config import ExportConfig
from skin_resnet.commands.export import export
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.model import export as exporting
from skin_resnet.model.classifier import Scorer, describe
from skin_resnet.model.export import read_exported, write_exported
from skin_resnet.model.resnet import STAGE_DEPTHS, build_resnet
from skin_resnet.tracking.models import load_model
from skin_resnet.training.checkpoint import save_checkpoint

PAGE = Path(__file__).parents[1] / "docs/export.md"
SUFFIXES = (".onnx", ".pt2")
SIZE = 32
RUN = "0123456789abcdef"


def make_checkpoint(seed: int) -> dict[str, Any]:
    """A checkpoint with all weights and statistics random, so that each of them matters."""
    torch.manual_seed(seed)
    network = build_resnet("resnet50", 3)
    for name, each in network.state_dict().items():
        if ".bn" in name or name.startswith("bn"):
            each.copy_(torch.rand(each.shape) + 0.2)
    return {
        "arch": "resnet50",
        "config": TrainConfig().model_dump(mode="json"),
        "classes": ["blue", "green", "red"],
        "image_size": SIZE,
        "network": network.state_dict(),
        "calibration": {
            "temperature": 1.7,
            "tau": 0.5,
            "decision_weights": [0.2, 0.3, 0.5],
            "coverage": 0.9,
            "least_probability": 0.3,
            "thresholds": {},
        },
        "familiarity": {"center": torch.rand(256), "whitening": torch.randn(256, 256) / 20},
        "split": {"train": ["a"], "val": ["b"], "test": ["c"]},
        "license": "none",
        "run_id": f"{seed}{RUN[1:]}",
        "epoch": 3,
    }


def make_noise(images: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (images, size, size, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def shallow() -> Iterator[None]:
    """ResNets of one block per stage: an export takes a second for each block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGE_DEPTHS, "resnet50", (1, 1, 1, 1))
        yield


@pytest.fixture(scope="module")
def checkpoint(shallow: None) -> dict[str, Any]:
    """A mean of two networks."""
    members = [make_checkpoint(seed) for seed in (0, 1)]
    return {**members[0], "members": members}


@pytest.fixture(scope="module")
def folder(checkpoint: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two files."""
    folder = tmp_path_factory.mktemp("exported")
    for suffix in SUFFIXES:
        write_exported(checkpoint, folder / f"model{suffix}")
    return folder


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_scores_batches_of_any_size_as_the_networks_do(folder, checkpoint, suffix) -> None:
    classifier = load_model(str(folder / f"model{suffix}"))
    assert classifier.networks == ()
    assert {**describe(checkpoint)}.items() <= classifier.facts.items()
    for images in (1, 5):
        pixels = make_noise(images)
        with torch.inference_mode():
            expected = Scorer(checkpoint)(torch.from_numpy(pixels))
        probabilities, unfamiliarity = classifier.score(pixels)
        np.testing.assert_allclose(probabilities, expected[0], atol=1e-5)
        np.testing.assert_allclose(unfamiliarity, expected[1], rtol=1e-5)


def test_pixels_of_another_size_or_type_are_refused(folder) -> None:
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    module = torch.export.load(folder / "model.pt2").module()
    for pixels in (
        make_noise(2, 64),
        make_noise(2)[..., :1],
        make_noise(1)[0],
        make_noise(2).astype("float32"),
    ):
        with pytest.raises(Exception, match="INVALID_ARGUMENT"):
            session.run(None, {"pixels": pixels})
        with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed|mismatch"):
            module(torch.from_numpy(pixels))


def test_the_metadata_are_found_without_this_package(folder, checkpoint) -> None:
    (found,) = (each.value for each in onnx.load(folder / "model.onnx").metadata_props)
    with zipfile.ZipFile(folder / "model.pt2") as archive:
        assert archive.read("archive/extra/skin_resnet.json").decode() == found
    facts = json.loads(found)
    assert facts["version"] == "01234567-epoch3+11234567-epoch3"
    assert facts["calibration"] == checkpoint["calibration"]
    onnx.checker.check_model(folder / "model.onnx")


def flip(content: bytes) -> bytes:
    """Invert a hundred bytes of the weights."""
    changed = bytearray(content)
    for at in range(len(content) // 4, len(content) // 2, len(content) // 400 | 1):
        changed[at] ^= 255
    return bytes(changed)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], flip, lambda _: b"hello"])
def test_a_damaged_file_is_a_users_mistake(folder, tmp_path, capfd, suffix, damage) -> None:
    file = tmp_path / f"damaged{suffix}"
    file.write_bytes(damage((folder / f"model{suffix}").read_bytes()))
    with pytest.raises(UserError, match="damaged"):
        load_model(str(file))
    assert capfd.readouterr() == ("", "")


def test_files_of_others_and_missing_ones_are_a_users_mistake(folder, tmp_path) -> None:
    torch.save({"a": 1}, tmp_path / "checkpoint.pt2")
    identity = torch.export.export(torch.nn.Identity(), (torch.zeros(1),))
    torch.export.save(identity, tmp_path / "other.pt2")
    other = onnx.load(folder / "model.onnx")
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    for name in ("checkpoint.pt2", "other.pt2", "other.onnx", "missing.onnx", "missing.pt2"):
        with pytest.raises(UserError, match=name):
            read_exported(tmp_path / name)


def test_a_file_runs_on_the_cpu_in_fp32_only(folder) -> None:
    for options in ({"device": "cuda"}, {"precision": "bf16"}):
        with pytest.raises(UserError, match="fp32"):
            load_model(str(folder / "model.onnx"), **options)


def test_missing_packages_are_named(folder, checkpoint, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxruntime onnxscript"):
        write_exported(checkpoint, tmp_path / "model.onnx")

    def fail(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(UserError, match="pip install onnxruntime"):
        read_exported(folder / "model.onnx")


def test_more_networks_than_an_onnx_file_holds_are_refused_at_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(exporting, "_MOST_ONNX", 1_000_000)
    with pytest.raises(UserError, match=r"2 GB.*format=pt2"):
        write_exported(make_checkpoint(0), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_or_scores_otherwise_leaves_nothing(tmp_path, monkeypatch) -> None:
    with pytest.raises(UserError, match="cannot write"):
        write_exported(make_checkpoint(0), tmp_path / "no_folder" / "model.pt2")

    class Otherwise(Scorer):
        def __init__(self, checkpoint: dict[str, Any]) -> None:
            super().__init__(checkpoint)
            self.temperature *= 1.001

    monkeypatch.setattr(exporting, "Scorer", Otherwise)
    (tmp_path / "model.pt2").write_text("earlier")
    with pytest.raises(UserError, match="export it again"):
        write_exported(make_checkpoint(0), tmp_path / "model.pt2")
    assert [each.read_text() for each in tmp_path.iterdir()] == ["earlier"]


def test_the_command_logs_the_file_only_where_mlflow_run_has_opened_a_run(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    save_checkpoint(tmp_path / "best.pt", make_checkpoint(0))
    config = ExportConfig(model="best.pt", format="pt2")
    export(config)
    assert "01234567-epoch3.pt2" in capsys.readouterr().out
    assert load_model("01234567-epoch3.pt2").facts["version"] == "01234567-epoch3"
    assert not Path("mlflow.db").exists()
    for wrong in ("other.onnx", "other"):
        with pytest.raises(UserError, match=wrong):
            export(config.with_changes(output=wrong, model="nosuch"))
    monkeypatch.setattr("skin_resnet.commands.export.read_card", lambda run_id: f"# Card of {run_id}")
    experiment = mlflow.create_experiment("exports", artifact_location=(tmp_path / "artifacts").as_uri())
    opened = mlflow.MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    export(config.with_changes(output="mine.pt2", format="auto"))
    assert mlflow.get_run(opened).info.status == "FINISHED"
    (logged,) = tmp_path.glob("artifacts/*/artifacts/mine.pt2")
    assert logged.read_bytes() == Path("mine.pt2").read_bytes()
    assert logged.with_name("model_card.md").read_text() == Path("mine.md").read_text() == f"# Card of {RUN}"


def test_the_pages_program_prints_what_the_classifier_says(folder, tmp_path, monkeypatch, capsys) -> None:
    image = Image.fromarray(make_noise(1, 90)[0]).resize((90, 61))
    image.save(tmp_path / "lesion.jpg")
    for suffix in SUFFIXES:
        (tmp_path / f"model{suffix}").symlink_to(folder / f"model{suffix}")
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    first, second = program.split("\nimport torch")
    (row,) = load_model("model.onnx").predict([tmp_path / "lesion.jpg"]).to_dict("records")
    names: dict[str, Any] = {}
    for part in (first, f"import torch{second}"):
        exec(part, names)
        found = [*names["probabilities"][0], names["unfamiliarity"][0]]
        expected = [row[each] for each in ("blue", "green", "red", "unfamiliarity")]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        assert row["prediction"] in capsys.readouterr().out
