"""The winner: retrained beside the baseline recipe, tested once, registered where better on val."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import optuna
import pytest
from mlflow.entities import Run
from PIL import Image
from test_search_study import make_epoch, run

from search.config import SearchConfig
from search.run import _retrain, search
from search.space import BASELINE_RECIPE
from search.study import open_study
from search.workers import work
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.tracking.history import read_card
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.training.engine import EpochResult

pytestmark = pytest.mark.slow


def let_the_defaults_win(config: TrainConfig) -> list[EpochResult]:
    return [make_epoch(1, 0.4 if config.grad_clip == 0 else 0.8 if config.augment == "light" else 0.6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder, before = tmp_path_factory.mktemp("winner"), Path.cwd()
    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield folder
    mlflow.set_tracking_uri(None)
    os.chdir(before)


@pytest.fixture(scope="module")
def config(folder: Path, class_folders: Path) -> SearchConfig:
    """A study that is over, and whose trial 1 won."""
    config = SearchConfig(
        data=str(class_folders), weights="none", image_size=32, epochs=2, batch_size=8, device="cpu",
        augment="light", ema_decay=0, objectives="val_balanced_accuracy", n_trials=3, seeds=2,
        cache_dir=folder / "cache", checkpoint_dir=folder / "checkpoints", fix="augment=none|standard",
        retrain="epochs=2,coverage=0.8", register_as="skin-resnet",
    )  # fmt: skip
    with mlflow.start_run() as parent:
        run(config, parent.info.run_id, let_the_defaults_win)
    return config


@pytest.fixture(scope="module")
def parent(config: SearchConfig) -> Run:
    search(config)
    return find_searches()[0]


def find_searches() -> list[Run]:
    """Return the searches' runs, the latest first."""
    runs: list[Run] = mlflow.search_runs(
        filter_string="params.n_trials = '3'", order_by=["attributes.start_time DESC"], output_format="list"
    )
    return runs


def find_children(parent: Run) -> list[Run]:
    runs: list[Run] = mlflow.search_runs(
        filter_string=f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", output_format="list"
    )
    return runs


def test_winner_and_baseline_recipe_are_retrained_with_every_seed_and_tested(
    parent: Run, config: SearchConfig
) -> None:
    children = {(r.data.tags["search.recipe"], int(r.data.params["seed"])): r for r in find_children(parent)}
    assert set(children) == {(recipe, seed) for recipe in ("baseline recipe", "winner") for seed in (1, 2)}
    for (recipe, seed), child in children.items():
        wanted = config.training.with_changes(
            **(BASELINE_RECIPE if recipe == "baseline recipe" else {}), seed=seed, epochs=2, coverage=0.8
        )
        assert child.data.params == wanted.to_params()
        assert child.info.status == "FINISHED"
        assert 0 <= child.data.metrics["test_balanced_accuracy"] <= 1


def test_an_interrupted_retraining_is_resumed_in_its_run(
    config: SearchConfig, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = optuna.create_study(storage=f"sqlite:///{folder}/resumed.db", study_name="resumed")
    study.set_user_attr("skin-resnet search", {"id": "resumed"})
    recipe = config.training.with_changes(epochs=3, test="never")
    with mlflow.start_run() as parent:
        pass
    with monkeypatch.context() as patch:

        def stop_after_two(run: object, result: EpochResult) -> None:
            if result.epoch == 2:
                raise KeyboardInterrupt

        patch.setattr(TrackedRun, "on_epoch", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            _retrain(study, "winner", recipe, parent.info.run_id)
    (child,) = find_children(parent)
    assert child.info.status == "KILLED"
    again = _retrain(study, "winner", recipe, parent.info.run_id)
    assert again["run_id"] == child.info.run_id
    assert mlflow.get_run(child.info.run_id).info.status == "FINISHED"
    epochs = mlflow.MlflowClient().get_metric_history(child.info.run_id, "val/loss")
    assert [each.step for each in epochs] == [1, 2, 3]
    assert _retrain(study, "winner", recipe, parent.info.run_id) == again
    assert not list(Path(config.checkpoint_dir).rglob("*.pt"))


def test_test_is_evaluated_once_by_the_search(parent: Run, config: SearchConfig) -> None:
    assert parent.data.tags["test.access_count"] == "1"
    assert parent.data.tags["test.accessed"] == prepare_data(config.training).split.hash
    assert "test.accessed_before" not in parent.data.tags
    assert not [run for run in find_children(parent) if "test.accessed" in run.data.tags]


def test_page_figures_and_command_are_on_the_run(parent: Run) -> None:
    note = parent.data.tags["mlflow.note.content"]
    for part in ("difference", "majority class", "3 trials", "--augment=light", "Registered"):
        assert part in note
    client = mlflow.MlflowClient()
    names = {item.path for item in client.list_artifacts(parent.info.run_id, "figures")}
    assert names == {"figures/trials.png"}  # two epochs are no curve
    assert "retrain.sh" in {item.path for item in client.list_artifacts(parent.info.run_id)}


def test_weights_are_kept_once_with_the_logged_model(parent: Run, config: SearchConfig) -> None:
    assert not [path for path in Path(config.checkpoint_dir).rglob("*") if path.is_file()]


def test_pruned_and_losing_trials_leave_no_weights(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config.with_changes(study_name="real", epochs=2)
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    with mlflow.start_run() as parent:
        work(config, parent.info.run_id)
    assert [trial.state.name for trial in open_study(config).trials] == ["COMPLETE", "COMPLETE", "PRUNED"]
    assert not [path for path in Path(config.checkpoint_dir).rglob("*") if path.is_file()]


def test_the_winners_best_model_on_val_is_the_champion(parent: Run) -> None:
    champion = mlflow.MlflowClient().get_model_version_by_alias("skin-resnet", "champion")
    winners = [r for r in find_children(parent) if r.data.tags["search.recipe"] == "winner"]
    scores = {run.info.run_id: run.data.metrics["best_val_balanced_accuracy"] for run in winners}
    assert scores[champion.run_id] == max(scores.values())
    tested = mlflow.get_run(champion.run_id).data.metrics["test_balanced_accuracy"]
    assert float(champion.tags["test/balanced_accuracy"]) == tested
    assert f"models:/skin-resnet/{champion.version}" in champion.description


def test_the_registrys_page_is_a_card_with_a_snippet_that_works(parent: Run, folder: Path) -> None:
    page = mlflow.MlflowClient().get_registered_model("skin-resnet").description
    assert re.search(r"Test balanced accuracy [\d.]+.*always blue: [\d.]+", page), page
    assert "not a medical device" in page
    (snippet,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert "models:/skin-resnet@champion" in snippet
    Image.new("RGB", (40, 40), (60, 80, 200)).save(folder / "lesion.jpg")
    done = subprocess.run([sys.executable, "-c", snippet], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names[:5] == ["prediction", "name", "blue", "green", "red"]


def test_every_retrained_model_has_a_card_of_its_test(parent: Run) -> None:
    for child in find_children(parent):
        card = read_card(child.info.run_id)
        assert f"{child.data.metrics['test_balanced_accuracy']:.3f}" in card.split("\n\n")[1]
        assert "was not evaluated" not in card


def test_a_finished_search_registers_its_winner_under_another_name_once(
    parent: Run, config: SearchConfig
) -> None:
    client, winner = mlflow.MlflowClient(), "skin-resnet"
    for _ in range(2):
        search(config.with_changes(register_as="other"))
        assert find_children(find_searches()[0]) == []
        assert "test.accessed" not in find_searches()[0].data.tags
    (version,) = client.search_model_versions("name = 'other'")
    assert version.run_id == client.get_model_version_by_alias(winner, "champion").run_id
    search(config.with_changes(register_as="none"))
    assert "Registered" not in find_searches()[0].data.tags["mlflow.note.content"]


def test_the_searchs_run_shows_its_progress_its_winner_and_its_children(parent: Run) -> None:
    client = mlflow.MlflowClient()
    note = parent.data.tags["mlflow.note.content"]
    verdict, winner, *_ = note.split("\n\n")
    assert re.search(r"on test, balanced accuracy \d\.\d{3} against \d\.\d{3}", verdict)
    assert winner.startswith("**Winner: [trial 1](#/experiments/")
    view = re.search(r"viewStateShareKey=(search-[\w-]+)", winner)
    assert view
    assert f"mlflow.sharedViewState.{view[1]}" in mlflow.get_experiment(parent.info.experiment_id).tags
    best = client.get_metric_history(parent.info.run_id, "search_best_val_balanced_accuracy")
    assert [(point.step, point.value) for point in best] == [(3, pytest.approx(0.8))]
    assert parent.data.metrics["search_eta_s"] == 0


def test_the_same_command_again_tests_and_trains_nothing(parent: Run, config: SearchConfig) -> None:
    search(config)
    again = find_searches()[0]
    assert again.info.run_id != parent.info.run_id
    assert "test was not evaluated again" in again.data.tags["mlflow.note.content"]
    assert "test.accessed" not in again.data.tags
    assert find_children(again) == []
