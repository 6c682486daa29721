"""Reading earlier runs, and choosing the best of them."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest

from skin_resnet.errors import UserError
from skin_resnet.tracking.history import (
    close_killed,
    download_checkpoint,
    find_best_runs,
    read_history,
    read_run,
    read_training,
)
from skin_resnet.tracking.store import prepare_store
from skin_resnet.training.engine import EpochResult, to_frame
from tests.test_outage import build_epoch

UNKNOWN = "0" * 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    prepare_store()
    yield uri
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def client(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
    """A store with a new experiment, in which runs are started."""
    client = mlflow.MlflowClient(store)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment(tmp_path.name, tmp_path.as_uri()))
    return client


def create_run(**tags: str) -> str:
    with mlflow.start_run(tags=tags) as run:
        return str(run.info.run_id)


def record(
    val: float = 0.5, arch: str = "resnet50", *, split: str = "a", is_tested: bool = True,
    status: str = "FINISHED", **tags: str,
) -> str:  # fmt: skip
    """Record a training as `train` does, as far as it matters here; return its id."""
    metrics = {"best_epoch": 1.0, "best_val_balanced_accuracy": val, "val/balanced_accuracy": val}
    run_id = create_run(**{"split.hash": split, "split.leaks": "false", **tags})
    client = mlflow.MlflowClient()
    client.log_param(run_id, "arch", arch)
    for name, value in (metrics | ({"test_balanced_accuracy": val} if is_tested else {})).items():
        client.log_metric(run_id, name, value, step=1)
    client.set_terminated(run_id, status)
    return run_id


def find_best(split: str = "test") -> tuple[list[str], str]:
    with mlflow.start_run():
        return find_best_runs(split)


def test_the_best_run_of_each_arch_is_found() -> None:
    record(0.5)
    expected = [record(0.6), record(0.4, "resnet101"), record(0.3, "resnet152")]
    assert find_best()[0] == expected


@pytest.mark.parametrize(
    "unfit",
    [
        {"search.trial": "3"},
        {"reproduces": UNKNOWN},
        {"split.leaks": "true"},
        {"is_tested": False},
        {"status": "FAILED"},
        {"split": "other data"},
    ],
)
def test_only_finished_tested_trainings_of_one_split_are_compared(unfit: dict) -> None:
    record(0.99, "resnet101", **unfit)
    expected = [record(0.5), record(0.6, "resnet152")]
    ids, note = find_best()
    assert ids == expected
    assert ("Left out" in note) == ("split" in unfit)


def test_of_splits_with_as_many_runs_the_latest_is_taken() -> None:
    record(0.9, split="old")
    latest = record(0.5, split="new")
    assert find_best()[0] == [latest]


def test_runs_that_were_not_tested_are_compared_on_val_and_none_is_an_error() -> None:
    run_id = record(is_tested=False)
    assert find_best("val")[0] == [run_id]
    with pytest.raises(UserError, match="test"):
        find_best("test")


def log_epochs(client: mlflow.MlflowClient, run_id: str, epochs: list[EpochResult]) -> None:
    for epoch in epochs:
        for name, value in epoch.to_metrics().items():
            client.log_metric(run_id, name, value, epoch.timestamp_ms, epoch.epoch)


def test_the_history_is_read_back_as_it_was_logged(client: mlflow.MlflowClient) -> None:
    run_id = create_run()
    epochs = [build_epoch(number) for number in (1, 2, 3)]
    log_epochs(client, run_id, epochs[::-1])
    log_epochs(client, run_id, epochs[:2])  # a resumed run logs what it knows again
    client.log_metric(run_id, "val/ece", 0.1, step=2)  # of the evaluation, not of an epoch
    pd.testing.assert_frame_equal(read_history(run_id), to_frame(epochs), check_dtype=False)


def test_a_run_is_read_with_its_predictions_and_one_to_repeat_with_its_options(
    client: mlflow.MlflowClient, tmp_path: Path
) -> None:
    run_id = record(0.5, split="a")
    client.log_text(
        run_id, "image_id,lesion_id,dx,prediction,NA,nv\n001,NA,NA,nv,0.25,0.75\n", "test/predictions.csv"
    )
    client.log_text(run_id, "image_id,split\n001,test\n", "data/split.csv")
    client.log_dict(run_id, {"data": "it's  a \\ folder", "epochs": 2}, "config.yaml")
    run = read_run(run_id, "test")
    assert (run.arch, run.split_hash, run.leaks) == ("resnet50", "a", False)
    assert run.predictions.iloc[0].tolist() == ["001", "NA", "NA", "nv", 0.25, 0.75]
    options, split = read_training(run_id, tmp_path)
    assert options == {"data": "it's  a \\ folder", "epochs": 2}
    assert split.read_text().endswith("001,test\n")


@pytest.mark.parametrize("case", ["unknown", "no training", "no predictions"])
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    no_training = create_run()
    run_id = {"unknown": UNKNOWN, "no training": no_training, "no predictions": record()}[case]
    for read in (lambda: read_run(run_id, "test"), lambda: read_training(run_id, tmp_path)):
        with pytest.raises(UserError, match=run_id):
            read()
    for model in (run_id, f"runs:/{run_id}", "models:/nosuch@champion"):
        with pytest.raises(UserError, match=model):
            download_checkpoint(model)


def test_runs_of_a_study_that_nobody_works_on_are_closed(client: mlflow.MlflowClient) -> None:
    alive, dead, other = (
        client.create_run("0", tags={"search.study_id": name}).info.run_id for name in "aab"
    )
    assert close_killed("a", lambda run_id, tags: run_id == alive) == [dead]
    statuses = [client.get_run(run_id).info.status for run_id in (alive, dead, other)]
    assert statuses == ["RUNNING", "KILLED", "RUNNING"]
