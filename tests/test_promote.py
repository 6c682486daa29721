"""Promoting a challenger: only what is better than the champion on val, and than the majority class."""

import re
from collections.abc import Iterator
from dataclasses import replace

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from sklearn.metrics import balanced_accuracy_score

from skin_resnet.cli import main
from skin_resnet.commands.config import PromoteConfig
from skin_resnet.commands.promote import promote
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.tracking.store import prepare_store
from tests.test_compare import LESIONS, predict

NAME = "lesions"


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An experiment of a new store, which all tests of this module share: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("store")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    prepare_store()
    yield mlflow.create_experiment("promoted", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def model(experiment: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registered model without versions."""
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    MlflowClient().create_registered_model(NAME)
    yield
    MlflowClient().delete_registered_model(NAME)


def add(predictions: Predictions, alias: str | None, *, leaks: str = "false", text: str = "A card.") -> str:
    """Add a version with these predictions on val, under an alias; return its run's id."""
    client = MlflowClient()
    with mlflow.start_run(tags={"split.leaks": leaks, "split.hash": "abc"}) as run:
        mlflow.log_param("arch", "resnet50")
        mlflow.log_metrics({"best_epoch": 2, "final_gap": 0.1})
    classes = np.array(HAM10000_CLASSES)
    table = pd.DataFrame(
        {
            "image_id": predictions.image_ids,
            "lesion_id": LESIONS,
            "dx": classes[predictions.targets],
            "prediction": classes[predictions.predicted],
            **dict(zip(HAM10000_CLASSES, predictions.probabilities.T, strict=True)),
        }
    )
    client.log_text(run.info.run_id, table.to_csv(index=False), "val/predictions.csv")
    client.log_text(run.info.run_id, text, "model_card.md")
    version = client.create_model_version(NAME, f"{run.info.artifact_uri}/model", run.info.run_id)
    if alias:
        client.set_registered_model_alias(NAME, alias, version.version)
    return str(run.info.run_id)


def get_aliases() -> dict[str, str]:
    return {alias: str(number) for alias, number in MlflowClient().get_registered_model(NAME).aliases.items()}


def read_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was printed, in one line."""
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    return " ".join(printed.split())


def count_runs() -> int:
    return len(mlflow.search_runs(output_format="list", search_all_experiments=True))


def test_a_better_challenger_becomes_the_champion_with_numbers_and_its_card(capsys) -> None:
    old, new = predict(0.1), predict(0.9, 1)
    add(old, "champion")
    add(new, "challenger", text="The card of the new one.")
    runs = count_runs()
    assert promote(PromoteConfig(name=NAME)) == 0
    line = read_line(capsys)
    scores = [balanced_accuracy_score(each.targets, each.predicted) for each in (new, old)]
    shown = re.search(r"version 2 minus version 1: \+([\d.]+) points \[\+([\d.]+), \+([\d.]+)\]", line)
    assert shown, line
    assert float(shown[1]) == pytest.approx(100 * (scores[0] - scores[1]), abs=0.051)
    assert 0 < float(shown[2]) < float(shown[1]) < float(shown[3])
    assert line.startswith("Promoted")
    assert "300 val images of 150 lesions" in line
    assert get_aliases() == {"champion": "2"}
    assert "The card of the new one." in MlflowClient().get_registered_model(NAME).description
    assert count_runs() == runs, "what was typed leaves no run"


@pytest.mark.parametrize(("skill", "sign"), [(0.34, "+"), (0.3, "-"), (0.1, "-")])
def test_one_that_is_not_clearly_better_does_not(skill: float, sign: str, capsys) -> None:
    add(predict(0.3), "champion")
    add(predict(skill, 7), "challenger")
    with pytest.raises(SystemExit) as exit_:
        main(["promote", NAME])
    assert exit_.value.code == 1
    line = read_line(capsys)
    assert line.startswith("Not promoted: ")
    assert f"version 2 minus version 1: {sign}" in line
    assert line.endswith("Champion version of lesions: 1.")
    assert get_aliases() == {"champion": "1", "challenger": "2"}
    assert not MlflowClient().get_registered_model(NAME).description


def test_one_that_does_not_beat_the_majority_class_does_not_even_without_a_champion(capsys) -> None:
    guessing = replace(predict(0.3), decisions=np.random.default_rng(0).integers(0, 7, 300))
    add(guessing, "challenger")
    assert promote(PromoteConfig(name=NAME)) == 1
    assert "version 1 minus always nv" in (line := read_line(capsys))
    assert "Champion version of lesions: none." in line
    assert get_aliases() == {"challenger": "1"}


def test_the_majority_class_comes_before_a_champion_that_is_worse_than_it(capsys) -> None:
    wrong = predict(0.3)
    add(replace(wrong, decisions=(wrong.targets + 1) % 7), "champion")
    hardly_better = np.where(np.arange(300) == wrong.targets.argmin(), 0, 5)  # always nv, but for one image
    add(replace(wrong, decisions=hardly_better), "challenger")
    assert promote(PromoteConfig(name=NAME)) == 1
    assert "version 2 minus always nv: +" in read_line(capsys)


def test_the_first_that_beats_the_majority_class_becomes_the_champion(capsys) -> None:
    add(predict(0.5), None)
    assert promote(PromoteConfig(name=NAME, challenger="1")) == 0
    assert "version 1 minus always nv: +" in read_line(capsys)
    assert get_aliases() == {"champion": "1"}


def test_images_in_another_order_are_the_same_images(capsys) -> None:
    add(predict(0.1), "champion")
    turned = predict(0.9, 1).select(np.arange(300)[::-1])
    add(turned, "challenger")
    lesions = dict(zip(turned.image_ids, LESIONS, strict=True))
    assert lesions["I299"] == "L000"  # `add` gives lesions by row
    assert promote(PromoteConfig(name=NAME)) == 0


@pytest.mark.parametrize("reason", ["leaks", "images", "diagnoses"])
def test_what_cannot_be_compared_is_not_promoted_and_the_reason_said(reason: str, capsys) -> None:
    add(predict(0.1), "champion")
    new = predict(0.9, 1)
    other = {
        "leaks": new,
        "images": replace(new, image_ids=tuple(f"J{number:03}" for number in range(300))),
        "diagnoses": replace(new, targets=(new.targets + 1) % 7),
    }[reason]
    add(other, "challenger", leaks="true" if reason == "leaks" else "false")
    assert promote(PromoteConfig(name=NAME)) == 1
    assert ("leaks" if reason == "leaks" else "different val images") in read_line(capsys)
    assert get_aliases() == {"champion": "1", "challenger": "2"}


@pytest.mark.parametrize("wrong", ["model", "alias", "version", "champion", "run"])
def test_what_is_not_there_is_one_line_and_exit_code_2(wrong: str, capsys) -> None:
    add(predict(0.1), "champion")
    add(predict(0.9, 1), "challenger")
    MlflowClient().create_model_version(NAME, "/nowhere", "0" * 32)
    runs = count_runs()
    arguments = {
        "model": ["nosuch"],
        "alias": [NAME, "--challenger", "best"],
        "version": [NAME, "--challenger", "7"],
        "champion": [NAME, "--challenger", "1"],
        "run": [NAME, "--challenger", "3"],
    }[wrong]
    with pytest.raises(SystemExit) as exit_:
        main(["promote", *arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert {"model": "'nosuch'", "run": "0" * 32}.get(wrong, f"'{NAME}'") in captured.err
    assert get_aliases() == {"champion": "1", "challenger": "2"}
    assert count_runs() == runs


@pytest.mark.parametrize("skill", [0.9, 0.1])
def test_in_mlflow_run_the_run_tells_the_outcome(
    skill: float, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(predict(0.2), "champion")
    add(predict(skill, 1), "challenger")
    opened = MlflowClient().create_run(experiment, run_name="gentle-cow-12").info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    assert promote(PromoteConfig(name=NAME)) == (skill < 0.5)
    run = mlflow.get_run(opened)
    assert run.info.run_name == "promote · lesions"
    assert run.data.params == {"name": NAME, "challenger": "challenger"}
    assert ("failure" in run.data.tags) == (skill < 0.5)
    assert "version 2 minus version 1" in run.data.tags["mlflow.note.content"]


def test_where_there_is_no_tracking_store_none_is_created(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path}/mlflow.db")
    with pytest.raises(UserError, match="no such store"):
        promote(PromoteConfig(name=NAME))
    assert not list(tmp_path.iterdir())
