"""A training that is run again is the same to the last bit, and where it is not, the report says where."""

import os
import random
import shlex
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from PIL import Image

from skin_resnet.commands.config import ReproduceConfig
from skin_resnet.commands.reproduce import compare_histories, describe, reproduce
from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from tests.conftest import write_class_folders


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_class_folders(tmp_path_factory.mktemp("reproduce") / 'it\'s  "the" \\ data')


@pytest.fixture(scope="module")
def config(data: Path) -> Iterator[TrainConfig]:
    folder = data.parent
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    # Not set_experiment, which would hold for the tests of other modules too.
    experiment_id = mlflow.create_experiment("first", (folder / "artifacts").as_uri())
    config = TrainConfig(
        data=str(data), weights="none", image_size=32, epochs=2, batch_size=8, augment="strong", mixup=0.2,
        dropout=0.2, ema_decay=0.9, train_fraction=0.8, seed=3, device="cpu", test="never",
        cache_dir=folder / "cache", checkpoint_dir=folder / "checkpoints",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_EXPERIMENT_NAME")
        environment.setenv("MLFLOW_EXPERIMENT_ID", experiment_id)
        yield config
    mlflow.set_tracking_uri(None)


@pytest.fixture(scope="module")
def run_id(config: TrainConfig) -> str:
    """A training as `mlflow run` starts it: its params are there already, quoted as for a shell."""
    client = mlflow.MlflowClient()
    run_id = str(client.create_run(os.environ["MLFLOW_EXPERIMENT_ID"]).info.run_id)
    client.log_param(run_id, "data", shlex.quote(config.data))
    os.environ["MLFLOW_RUN_ID"] = run_id
    train(config)
    return run_id


def build_config(run_id: str, config: TrainConfig) -> ReproduceConfig:
    return ReproduceConfig(run=run_id, cache_dir=config.cache_dir, checkpoint_dir=config.checkpoint_dir)


def test_a_run_is_reproduced_to_the_bit_in_a_child_run(run_id: str, config: TrainConfig, capsys) -> None:
    random.seed()  # whatever else has drawn numbers
    assert reproduce(build_config(run_id, config)) == 0
    assert "Bit-identical" in capsys.readouterr().out
    child = mlflow.search_runs(output_format="list", filter_string=f"tags.reproduces = '{run_id}'")[0]
    assert child.data.tags["mlflow.parentRunId"] == run_id
    assert child.info.status == "FINISHED"
    first = mlflow.get_run(run_id)
    assert child.info.experiment_id == first.info.experiment_id
    assert child.data.tags["best.sha256"] == first.data.tags["best.sha256"]
    assert child.data.metrics["reproduce/values"] == 2 * 9  # epochs, metrics
    assert child.data.metrics["reproduce/deviations"] == 0
    assert not config.checkpoint_dir.exists()


def test_one_pixel_that_changed_is_found(run_id: str, config: TrainConfig, data: Path, capsys) -> None:
    split = Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="data/split.csv"))
    image_id = next(line for line in split.read_text().splitlines() if line.endswith(",train")).split(",")[0]
    (path,) = data.rglob(f"{Path(image_id).name}*")
    with Image.open(path) as image:
        image.load()
    whole = path.read_bytes()
    image.putpixel((16, 16), (255, 255, 255))
    image.save(path)
    try:
        assert reproduce(build_config(run_id, config)) == 1
    finally:
        path.write_bytes(whole)
    page = capsys.readouterr().out
    assert "Not identical" in page
    assert "of epoch 1: " in page
    assert "data.fingerprint" in page


def test_only_a_finished_training_is_reproduced(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="finished training"):
        reproduce(build_config("0" * 32, config))


def test_the_first_epoch_and_metric_that_differ_are_named_and_by_how_much() -> None:
    first = {"val/loss": {1: 0.5, 2: 0.25, 3: 0.125}, "lr": {1: 0.1, 2: 0.1, 3: 0.1}}
    again = {"val/loss": {1: 0.5, 2: 0.375, 3: 0.125}, "lr": {1: 0.1, 2: 0.1}}
    differences, compared = compare_histories(pd.DataFrame(first), pd.DataFrame(again))
    assert compared == 6
    assert differences.to_numpy().tolist()[0] == [2, "val/loss", 0.25, 0.375]
    assert differences[["epoch", "metric"]].to_numpy().tolist() == [[2, "val/loss"], [3, "lr"]]
    page = describe("ID", differences, compared, {"version.torch": ("2.14.0", "2.14.1")})
    assert "2 of 6 values differ. The first is val/loss of epoch 2: 0.25, now 0.375 (+0.125)." in page
    assert "| version.torch | 2.14.0 | 2.14.1 |" in page
