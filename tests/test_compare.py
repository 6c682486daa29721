"""Comparing finished trainings: paired differences, one table, a run with links to its sources."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from skin_resnet.commands.compare import compare, format_difference
from skin_resnet.commands.config import CompareConfig
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import HEADLINES, PLAIN, Predictions, compare_models, compute_metrics
from skin_resnet.labels import HAM10000_CLASSES

LESIONS = np.array([f"L{i // 2:03}" for i in range(300)])


def predict(skill: float, seed: int = 0) -> Predictions:
    targets = np.random.default_rng(0).choice(7, 300, p=[0.1, 0.1, 0.15, 0.05, 0.15, 0.4, 0.05])
    probabilities = np.random.default_rng(seed).dirichlet(np.ones(7), 300) + skill * np.eye(7)[targets]
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(
        probabilities=probabilities, targets=targets, image_ids=tuple(f"I{i:03}" for i in range(300))
    )


def test_a_model_minus_itself_is_exactly_nothing() -> None:
    differences = compare_models({"a": [predict(0.3)], "b": [predict(0.3)]}, LESIONS)[1]
    assert (differences[["value", "low", "high"]] == 0).all(axis=None)


def test_differences_are_the_later_minus_the_earlier_for_every_pair() -> None:
    models = {"a": predict(0.1), "b": predict(0.3, 1), "c": predict(0.9, 2)}
    _, differences = compare_models({name: [each] for name, each in models.items()}, LESIONS)
    assert len(differences) == 9
    for each in differences.itertuples():
        expected = [getattr(compute_metrics(models[name]), each.metric) for name in (each.first, each.second)]
        assert each.value == pytest.approx(expected[0] - expected[1])
        assert each.low <= each.value <= each.high
    clear = differences[(differences["first"] == "c") & (differences.second == "a")]
    assert (clear.low > 0).all()


def test_pairing_makes_intervals_of_alike_models_narrow() -> None:
    one = predict(0.3)
    mixed = one.probabilities * 0.99 + 0.01 * predict(0.3, 5).probabilities
    nudged = replace(one, probabilities=mixed)
    alike = compare_models({"a": [one], "b": [nudged]}, LESIONS)[1].iloc[0]
    unlike = compare_models({"a": [one], "b": [predict(0.3, 7)]}, LESIONS)[1].iloc[0]
    assert alike.high - alike.low < 0.5 * (unlike.high - unlike.low)


def test_other_images_are_refused() -> None:
    other = predict(0.3)
    other = replace(other, image_ids=other.image_ids[::-1])
    with pytest.raises(UserError, match="b and a were evaluated on different images"):
        compare_models({"a": [predict(0.3)], "b": [other]}, LESIONS)


@pytest.mark.parametrize(("low", "verdict"), [(-0.009, ", not significant"), (0.002, "")])
def test_a_difference_is_written_in_points(low: float, verdict: str) -> None:
    row = SimpleNamespace(metric="macro_auc", first="new", second="old", value=0.008, low=low, high=0.024)
    assert format_difference(row) == f"new minus old: +0.8 points [{100 * low:+.1f}, +2.4] macro AUC{verdict}"


def start_other_run() -> str:
    with mlflow.start_run() as run:
        return run.info.run_id


def log_predictions(run_id: str, predictions: Predictions) -> None:
    table = pd.DataFrame(
        {
            "image_id": predictions.image_ids,
            "lesion_id": LESIONS,
            "dx": np.array(HAM10000_CLASSES)[predictions.targets],
            "prediction": np.array(HAM10000_CLASSES)[predictions.predicted],
            **dict(zip(HAM10000_CLASSES, predictions.probabilities.T, strict=True)),
        }
    )
    MlflowClient().log_text(run_id, table.to_csv(index=False), "test/predictions.csv")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Three finished trainings in a real store, as `train` leaves them."""
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = mlflow.create_experiment("compared", artifact_location=(tmp_path / "artifacts").as_uri())
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    ids = {}
    for number, (name, arch, skill) in enumerate(
        (("first", "resnet50", 0.2), ("second", "resnet50", 0.3), ("deep", "resnet152", 0.8))
    ):
        with mlflow.start_run(run_name=name) as run:
            mlflow.log_param("arch", arch)
            mlflow.set_tags({"split.leaks": "false", "split.hash": "abc"})
            mlflow.log_metrics(
                {
                    "best_val_balanced_accuracy": skill,
                    "test_balanced_accuracy": skill,
                    "final_gap": 0.1,
                    "best_epoch": 2,
                }
            )
            for epoch in (1, 2):
                values = {"train/loss": 1, "val/loss": 2, "train/balanced_accuracy": 0.4}
                speed = {"epoch_s": 30, "images_per_s": 60}
                mlflow.log_metrics({**values, "val/balanced_accuracy": 0.3, **speed}, step=epoch)
        log_predictions(run.info.run_id, predict(skill, number))
        ids[name] = run.info.run_id
    yield ids
    mlflow.set_tracking_uri(None)


def test_the_best_run_of_each_arch_is_compared_in_a_run_with_links(runs, capsys) -> None:
    compare(CompareConfig(runs="best"))
    page = capsys.readouterr().out
    assert "resnet152 minus resnet50: +" in page
    (run,) = mlflow.search_runs(filter_string="params.runs = 'best'", output_format="list")
    assert run.data.tags["compares"] == f"{runs['second']} {runs['deep']}"
    assert runs["deep"] in run.data.tags["mlflow.note.content"]
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="differences.csv")
    assert len(pd.read_csv(path)) == 9
    # MLflow shows a section for what precedes the slash: the models side by side.
    models = ("always nv", "resnet50", "resnet152")
    assert set(run.data.metrics) == {
        *(f"{name}/{model}" for name in (*HEADLINES, *PLAIN) for model in models),
        "balanced_accuracy_difference/resnet152 minus resnet50",
    }
    assert run.data.metrics["balanced_accuracy/always nv"] == pytest.approx(1 / 7)
    rows = [line.split()[:2] for line in page.splitlines()]
    assert ["always", "nv"] in rows
    for name, label in (("second", "resnet50"), ("deep", "resnet152")):
        assert f"{label}: {name}, {runs[name][:8]}" in page
    assert "Not better" not in page
    assert all(len(line) <= 80 for line in page.splitlines() if "http" not in line and "sqlite" not in line)
    assert len(re.findall(r"\d\.\d{3} \[\d\.\d\d, \d\.\d\d\]", page)) >= 4, "no interval is wrapped"
    paths = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, "figures")}
    assert "figures/differences.png" in paths


def test_runs_of_one_arch_are_distinguished_by_options_or_else_by_id(runs, capsys) -> None:
    config, client = CompareConfig(runs=f"{runs['first']}, {runs['second']},{runs['deep']},"), MlflowClient()
    compare(config)
    page = capsys.readouterr().out
    assert f"resnet50 {runs['second'][:8]} minus resnet50 {runs['first'][:8]}" in page
    assert "resnet152 minus resnet50" in page
    for name, options in (
        ("first", {"seed": 0, "lr": 0.1, "cache_dir": "a"}),
        ("second", {"seed": 1, "lr": 0.1, "cache_dir": "b"}),
    ):
        for option, value in options.items():
            client.log_param(runs[name], option, value)
    compare(config)
    assert "resnet50 seed 1 minus resnet50 seed 0: +" in " ".join(capsys.readouterr().out.split())
    for name, augment in (("first", "'crops'"), ("second", "light")):
        client.log_param(runs[name], "augment", augment)
    compare(config)
    page = " ".join(capsys.readouterr().out.split())
    assert "resnet50 seed 1 augment light minus resnet50 seed 0 augment crops" in page


def test_a_run_that_is_no_better_than_the_majority_class_is_named(runs, capsys) -> None:
    predictions = predict(0.3)
    decided = replace(predictions, decisions=np.random.default_rng(0).integers(0, 7, 300))
    log_predictions(runs["second"], decided)
    compare(CompareConfig(runs=f"{runs['second']},{runs['deep']}"))
    assert "Not better than always nv in balanced accuracy: resnet50.\n" in re.sub(
        " +\n", "\n", capsys.readouterr().out
    )


def test_a_leaking_run_is_not_the_best_and_is_marked_where_it_is_named(runs, capsys) -> None:
    mlflow.MlflowClient().set_tag(runs["second"], "split.leaks", "true")
    compare(CompareConfig(runs="best"))
    assert "leaks" not in capsys.readouterr().out
    compare(CompareConfig(runs=f"{runs['second']},{runs['deep']}"))
    assert "resnet50: The split of this training leaks" in capsys.readouterr().out


def test_best_compares_within_the_split_of_most_architectures_and_names_the_others(runs, capsys) -> None:
    client = mlflow.MlflowClient()
    for name in runs:
        client.log_param(runs[name], "data", "'/images/my clinic'")
    client.set_tag(runs["first"], "split.hash", "def")
    compare(CompareConfig(runs="best"))
    page = " ".join(capsys.readouterr().out.split())
    assert "resnet152 minus resnet50" in page
    assert "2 runs on my clinic, split abc" in page
    assert "Left out" in page
    assert "1 run on my clinic, split def" in page
    client.set_tag(runs["deep"], "split.hash", "ghi")
    with pytest.raises(UserError, match=r"pass runs=ID,ID.*Left out.*split abc; .*split def"):
        compare(CompareConfig(runs="best"))


def test_runs_of_two_splits_are_refused_and_named(runs) -> None:
    mlflow.MlflowClient().set_tag(runs["deep"], "split.hash", "def")
    with pytest.raises(UserError, match=f"3 runs on 2 splits.*{runs['deep']}"):
        compare(CompareConfig(runs=",".join(runs.values())))


@pytest.mark.parametrize("wrong", ["only one", "unknown", "no val", "no training", "other images"])
def test_what_cannot_be_compared_is_refused_before_a_run_is_opened(
    runs, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wrong == "other images":
        log_predictions(runs["second"], replace(predict(0.3), image_ids=tuple(map(str, range(300)))))
    config = {
        "only one": CompareConfig(runs=runs["deep"]),
        "unknown": CompareConfig(runs=f"{runs['deep']},{'0' * 32}"),
        "no val": CompareConfig(runs="best", split="val"),
        "no training": CompareConfig(runs=f"{runs['deep']},{start_other_run()}"),
        "other images": CompareConfig(runs=f"{runs['second']},{runs['deep']}"),
    }[wrong]
    before = len(mlflow.search_runs(output_format="list"))
    with pytest.raises(UserError, match="run"):
        compare(config)
    assert len(mlflow.search_runs(output_format="list")) == before
    # `mlflow run` has opened one: it ends with the reason.
    opened = MlflowClient().create_run(mlflow.get_run(runs["deep"]).info.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", opened)
    with pytest.raises(UserError, match="run"):
        compare(config)
    ended = mlflow.get_run(opened)
    assert (ended.info.status, ended.info.run_name) == ("FAILED", "compare")
    assert len(mlflow.search_runs(output_format="list")) == before + 1
