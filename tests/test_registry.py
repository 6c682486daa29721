"""The registry: what is registered, as which alias, and what its pages say."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from PIL import Image

from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError
from skin_resnet.tracking.history import read_card
from skin_resnet.tracking.registry import make_champion, register_run
from skin_resnet.tracking.store import prepare_store
from tests.conftest import write_class_folders


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tracking store, where the process is for this module's tests."""
    folder, before = tmp_path_factory.mktemp("store"), Path.cwd()
    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    prepare_store()
    yield folder
    mlflow.set_tracking_uri(None)
    os.chdir(before)


@pytest.fixture
def name(store: Path, request: pytest.FixtureRequest) -> str:
    """A registered model of the test's own."""
    return re.sub(r"\W+", "-", request.node.name)


def record(
    val: float, test: float | None = 0.5, *, low: float = 0.4, leaks: bool = False, more: str = "Limits."
) -> str:
    """Record a finished training as `train` does, as far as the registry reads it; return its id."""
    client = MlflowClient()
    with mlflow.start_run(tags={"split.hash": "abc", "split.leaks": str(leaks).lower()}) as run:
        for split, value in (("val", val), ("test", test)):
            if value is None:
                continue
            rows = {key: (value, low, value + 0.1) for key in ("balanced_accuracy", "accuracy", "macro_auc")}
            rows["baseline_balanced_accuracy"] = (0.143, float("nan"), float("nan"))
            table = pd.DataFrame.from_dict(rows, orient="index", columns=["value", "low", "high"])
            client.log_text(run.info.run_id, table.rename_axis("name").to_csv(), f"{split}/metrics.csv")
            client.log_metric(run.info.run_id, f"{split}_balanced_accuracy", value)
        card = f"# Card of {val}\n\nLoad runs:/{run.info.run_id}/model.\n\n{more}\n\n## Data\n\nA table."
        client.log_text(run.info.run_id, card, "model_card.md")
    model = client.create_logged_model(run.info.experiment_id, "model", source_run_id=run.info.run_id)
    client.finalize_logged_model(model.model_id, "READY")
    return str(run.info.run_id)


def get_aliases(name: str) -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(name).aliases.items()}


def test_the_first_is_the_champion_and_each_later_one_the_challenger(name: str) -> None:
    said = [register_run(record(val), name) for val in (0.5, 0.4, 0.9)]
    assert get_aliases(name) == {"champion": "1", "challenger": "3"}
    for number, alias, text in ((1, "champion", said[0]), (2, "challenger", said[1])):
        assert f"version {number}, models:/{name}@{alias}" in text
    assert f"promote {name}" in said[2]


def test_a_version_has_its_runs_card_its_scores_and_a_link_to_it(name: str) -> None:
    run_id = record(0.45, 0.5)
    register_run(run_id, name)
    register_run(record(0.6), name)
    client = MlflowClient()
    version, page = client.get_model_version(name, "1"), client.get_registered_model(name).description
    assert version.run_id == run_id
    assert {version.tags["val/balanced_accuracy"], version.tags["test/balanced_accuracy"]} == {"0.45", "0.5"}
    assert version.tags["split.hash"] == "abc"
    for text, uri in ((version.description, f"models:/{name}/1"), (page, f"models:/{name}@champion")):
        assert "# Card of 0.45" in text
        assert f"Load {uri}." in text
        assert f"runs/{run_id}?workflowType" in text
        assert text.rstrip().endswith("Limits."), "MLflow shows the list of versions below it"
    assert "# Card of 0.6" in client.get_model_version(name, "2").description


def test_a_description_is_no_longer_than_a_database_keeps(name: str) -> None:
    register_run(record(0.5, more="A class.\n\n" * 1000), name)
    for each in (MlflowClient().get_model_version(name, "1"), MlflowClient().get_registered_model(name)):
        assert 4000 < len(each.description) <= 5000
        assert each.description.endswith("The rest is in the run's artifacts.")


def test_who_becomes_champion_has_the_models_page_and_one_alias(name: str) -> None:
    register_run(record(0.5), name)
    run_id = record(0.6)
    register_run(run_id, name)
    make_champion(name, "2", run_id)
    assert get_aliases(name) == {"champion": "2"}
    assert "# Card of 0.6" in MlflowClient().get_registered_model(name).description


@pytest.mark.parametrize(
    ("val", "test", "low"),
    [(0.9, 0.2, 0.137), (0.9, 0.143, 0.143), (0.16, None, 0.143), (0.9, 0.2, float("nan"))],
)
def test_a_model_that_does_not_beat_the_majority_class_is_not_registered(
    name: str, val: float, test: float | None, low: float
) -> None:
    said = register_run(record(val, test, low=low), name)
    assert "Not registered" in said
    assert f"{val if test is None else test:.3f}" in said
    assert "0.143" in said
    assert not MlflowClient().search_registered_models(f"name = '{name}'")


def test_without_a_test_val_decides(name: str) -> None:
    register_run(record(0.5, None), name)
    version = MlflowClient().get_model_version_by_alias(name, "champion")
    assert not [tag for tag in version.tags if tag.startswith("test/")]


def test_a_model_whose_split_leaks_is_never_the_champion(name: str) -> None:
    said = register_run(record(0.9, leaks=True), name)
    assert get_aliases(name) == {"challenger": "1"}
    assert "@challenger" in said


def test_registering_prints_nothing_and_what_goes_wrong_is_one_line(name: str, capfd) -> None:
    register_run(record(0.5), name)
    assert capfd.readouterr() == ("", "")
    with mlflow.start_run() as run:
        pass
    for run_id in (run.info.run_id, "0" * 32):
        with pytest.raises(UserError, match=f"{run_id} cannot be registered as '{name}'"):
            register_run(run_id, name)


def test_a_card_that_is_not_there_is_empty(store: Path) -> None:
    with mlflow.start_run() as run:
        pass
    assert [read_card(run.info.run_id), read_card("0" * 32)] == ["", ""]


@pytest.fixture(scope="module")
def trained(store: Path) -> tuple[Run, str]:
    """A real training that was registered, and what it printed."""
    config = TrainConfig(
        data=str(write_class_folders(store / "folders", images_per_class=24)), weights="none", image_size=32,
        epochs=3, batch_size=8, ema_decay=0, lr=1e-3, device="cpu", cache_dir=store / "cache",
        checkpoint_dir=store / "checkpoints", register_as="lesions",
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(config)
    (run,) = mlflow.search_runs(filter_string="params.register_as = 'lesions'", output_format="list")
    return run, printed.getvalue()


def test_a_training_registers_its_model_which_loads_by_its_alias(trained: tuple[Run, str]) -> None:
    run, printed = trained
    assert run.info.status == "FINISHED"
    assert "models:/lesions@champion" in printed.splitlines()[-1]
    champion = MlflowClient().get_model_version_by_alias("lesions", "champion")
    assert champion.run_id == run.info.run_id
    assert float(champion.tags["test/balanced_accuracy"]) == run.data.metrics["test_balanced_accuracy"]
    image = io.BytesIO()
    Image.new("RGB", (40, 40), (60, 80, 200)).save(image, "PNG")
    model = mlflow.pyfunc.load_model("models:/lesions@champion")
    assert len(model.predict(pd.DataFrame({"image": [image.getvalue()]}))) == 1


def test_a_training_logs_a_card_with_the_metrics_of_its_run(trained: tuple[Run, str]) -> None:
    run, _ = trained
    card, metrics = read_card(run.info.run_id), run.data.metrics
    for metric in (
        "test_balanced_accuracy",
        "test_macro_auc",
        "test_plain_accuracy",
        "test_ece",
        "test_loss",
    ):
        assert f"{metrics[metric]:.3f}" in card.partition("## Results on test")[2]
    assert f"of epoch {metrics['best_epoch']:.0f} of run `{run.info.run_id}`" in card
    assert f'load_model("runs:/{run.info.run_id}/model")' in card
    assert "register_as" not in card


def test_a_name_that_cannot_be_registered_is_refused_before_anything_is_trained() -> None:
    for wrong in ("a/b", "a:b"):
        with pytest.raises(UserError, match=f"register_as: '{wrong}'"):
            TrainConfig(register_as=wrong)
