"""A whole training on small images, with a real tracking store: what the run shows is what was done."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from mlflow.entities import Run

from skin_resnet.commands.config import EvaluateConfig
from skin_resnet.commands.evaluate import evaluate
from skin_resnet.commands.train import train
from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.data.prepare import HIDDEN, open_test, prepare_data
from skin_resnet.data.split import Split
from skin_resnet.errors import UserError
from skin_resnet.evaluation.calibration import get_val_predictions
from skin_resnet.evaluation.metrics import compute_metrics
from skin_resnet.evaluation.page import LEAK_BANNER
from skin_resnet.tracking.history import download_checkpoint
from skin_resnet.tracking.run import open_run
from skin_resnet.training import engine
from skin_resnet.training import run as run_module
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.engine import EpochResult, NonFiniteLossError
from skin_resnet.training.run import run_training
from tests.conftest import write_class_folders

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tracking store, where the process is for this module's tests."""
    folder = tmp_path_factory.mktemp("store")
    before = Path.cwd()
    os.chdir(folder)
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    mlflow.set_system_metrics_sampling_interval(0.2)
    yield folder
    mlflow.set_system_metrics_sampling_interval(None)
    mlflow.set_tracking_uri(None)
    os.chdir(before)


@pytest.fixture(scope="module")
def config(store: Path, class_folders: Path) -> TrainConfig:
    return TrainConfig(
        data=str(class_folders), weights="none", image_size=32, epochs=2, batch_size=8, lr=1e-3,
        augment="light", device="cpu", cache_dir=store / "cache", checkpoint_dir=store / "checkpoints",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: TrainConfig, store: Path) -> Run:
    """One finished training."""
    with (store / "printed.txt").open("w") as file, redirect_stdout(file):
        train(config)
    return mlflow.search_runs(output_format="list", filter_string="attributes.status = 'FINISHED'")[0]


def list_artifacts(run: Run, path: str | None = None) -> set[str]:
    return {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id, path)}


def read_artifact(run: Run, path: str) -> Path:
    return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=path))


def get_latest() -> Run:
    return mlflow.search_runs(output_format="list", max_results=1)[0]


def test_a_training_ends_with_short_lines_on_what_came_out_and_what_to_do_next(run: Run, store: Path) -> None:
    printed = (store / "printed.txt").read_text()
    end = printed.rpartition("\n\n")[2].splitlines()
    names = ["test", "verdict", "report", "view", "predict", "app", "compare"]
    assert [line.split()[0] for line in end if line[0] != " "] == names
    assert max(len(line) for line in end if "http" not in line and "sqlite" not in line) <= 80
    assert len(end) <= 9
    low, high = (run.data.metrics[f"test_balanced_accuracy_{name}"] for name in ("low", "high"))
    assert (f"[{low:.2f}, {high:.2f}]" in end[0]) == (low < high)
    assert ("not better" in end[0]) == (low <= 1 / 3)
    assert end[2].split()[1].rstrip(",") in list_artifacts(run, "test")
    for command in ("predict", "app"):
        assert f"skin-resnet {command} {run.info.run_id}" in printed


def test_every_option_is_a_param_once(run: Run, config: TrainConfig) -> None:
    assert run.data.params == config.to_params()


def test_every_epoch_has_every_metric_at_its_step(run: Run) -> None:
    for name in ("train/loss", "train/accuracy", "val/macro_auc", "gap", "lr", "images_per_s"):
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, name)
        assert [point.step for point in history] == [1, 2], name


def test_a_run_has_a_name_that_says_what_it_is_and_few_metrics(run: Run, config: TrainConfig) -> None:
    for part in (config.arch, Path(config.data).name, f"{config.image_size} px", f"seed {config.seed}"):
        assert part in run.info.run_name
    assert len(run.data.metrics) <= 25
    # MLflow shows the metrics with a slash first, a section per prefix: the curves of train and val.
    assert {name.partition("/")[0] for name in run.data.metrics if "/" in name} == {"train", "val"}


def test_data_and_split_are_on_the_run(run: Run, config: TrainConfig) -> None:
    assert [item.tags[0].value for item in run.inputs.dataset_inputs] == ["train", "val", "test"]
    split = Split.from_frame(pd.read_csv(read_artifact(run, "data/split.csv")))
    assert run.data.tags["split.hash"] == split.hash
    assert len(split.train) + len(split.val) + len(split.test) == 36
    assert run.data.tags["split.leaks"] == "false"
    assert json.loads(read_artifact(run, "data/leakage.json").read_text())["leaks"] is False


def test_what_it_stands_on_is_on_the_run(run: Run) -> None:
    tags = run.data.tags
    assert tags["version.torch"] == torch.__version__.split("+")[0]
    assert tags["device"].startswith("cpu")
    assert tags["image_size"] == "32"
    assert tags["start"] == "random weights"
    head = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert tags["git.commit"] == head.stdout.strip()


def test_figures_tables_report_and_note_are_on_the_run(run: Run) -> None:
    assert list_artifacts(run) >= {"config.yaml", "data", "figures", "val", "test", "report.md"}
    assert list_artifacts(run, "figures") == {"figures/curves.png"}
    tables = {"per_class.csv", "predictions.csv", "subgroups.csv", "metrics.csv"}
    tables |= {"referral.csv", "evaluation.md", "retest.csv", "reliability.csv"}
    names = tables | {"confusion.png", "reliability.png"}
    assert list_artifacts(run, "val") == {f"val/{name}" for name in names}
    assert list_artifacts(run, "test") == {f"test/{name}" for name in names}  # no Grad-CAM of 32 pixels
    note = run.data.tags["mlflow.note.content"]
    assert "balanced accuracy" in note
    assert "no lesion ids" in note
    assert "always" in note


def test_the_checkpoint_holds_the_best_epoch_and_the_split(run: Run) -> None:
    checkpoint = read_checkpoint(download_checkpoint(run.info.run_id))
    assert checkpoint["epoch"] == run.data.metrics["best_epoch"]
    assert checkpoint["classes"] == ["blue", "green", "red"]
    assert checkpoint["run_id"] == run.info.run_id
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "val/loss")
    loss = compute_metrics(get_val_predictions(checkpoint)).loss
    assert loss == min(point.value for point in history)


def test_test_was_evaluated_once_and_predictions_agree_with_the_metrics(run: Run) -> None:
    assert run.data.tags["test.access_count"] == "1"
    assert run.data.tags["test.access_log"].endswith(f"by {run.info.run_id}")
    predictions = pd.read_csv(read_artifact(run, "test/predictions.csv"))
    assert run.data.metrics["test_accuracy"] == pytest.approx(
        (predictions.dx == predictions.prediction).mean()
    )
    low, high = (run.data.metrics[f"test_balanced_accuracy_{end}"] for end in ("low", "high"))
    assert low <= run.data.metrics["test_balanced_accuracy"] <= high


def test_evaluate_gives_the_same_scores_and_logs_the_test_access(
    run: Run, config: TrainConfig, capsys
) -> None:
    for number, model in enumerate((run.info.run_id, str(download_checkpoint(run.info.run_id)))):
        evaluate(EvaluateConfig(model=model, device="cpu", cache_dir=config.cache_dir))
        latest = get_latest()
        for name in ("accuracy", "balanced_accuracy", "macro_auc", "loss"):
            assert latest.data.metrics[f"test_{name}"] == pytest.approx(
                run.data.metrics[f"test_{name}"], abs=1e-6
            )
        again = mlflow.get_run(run.info.run_id)
        assert again.data.tags["test.access_count"] == str(2 + number)
        assert latest.data.tags["test.accessed_before"] == str(1 + number)
    out = capsys.readouterr().out
    assert "30 left out" in out
    assert "evaluated before, by 2 runs of this experiment" in out


def test_eight_views_are_averaged_and_the_page_says_so(run: Run, config: TrainConfig) -> None:
    evaluate(EvaluateConfig(model=run.info.run_id, device="cpu", cache_dir=config.cache_dir, tta=8))
    latest = get_latest()
    assert latest.data.metrics["test_loss"] != run.data.metrics["test_loss"]
    assert "averaged over 8 views" in latest.data.tags["mlflow.note.content"]
    assert latest.data.tags["model.run_id"] == run.info.run_id


def test_training_cannot_see_the_diagnoses_of_the_test_images(config: TrainConfig) -> None:
    data = prepare_data(config)
    sealed = data.select(data.split.test)
    assert sealed.dx.isna().all()
    assert (sealed.target == HIDDEN).all()
    assert data.select(data.split.train).dx.notna().all()
    opened = open_test(config, data)
    assert tuple(opened.image_id) == data.split.test
    assert (opened.target >= 0).all()


def test_a_leaking_split_is_refused_unless_allowed_and_then_every_report_says_so(
    config: TrainConfig, tmp_path
) -> None:
    paths = sorted(Path(config.data).rglob("*.png"))
    twin = tmp_path / "twin.csv"
    rows = [(path, path.parent.name, path.stem, path.stem) for path in paths]
    # Two photos of one lesion, on two sides.
    rows[1] = (*rows[1][:3], rows[0][2])
    table = pd.DataFrame(rows, columns=["path", "dx", "image_id", "lesion_id"])
    table.to_csv(twin, index=False)
    split = tmp_path / "split.csv"
    sides = ["train", "test"] + ["train", "train", "val", "test"] * 9
    pd.DataFrame({"image_id": table.image_id, "split": sides[: len(table)]}).to_csv(split, index=False)
    leaking = config.with_changes(data=str(twin), split=str(split), epochs=1)
    with pytest.raises(UserError, match=r"leaks.*allow_leaks=true"):
        train(leaking)
    train(leaking.with_changes(allow_leaks="true"))
    latest = get_latest()
    assert latest.data.tags["split.leaks"] == "true"
    assert "The split of this training leaks" in latest.data.tags["mlflow.note.content"]
    for name in ("report.md", "val/evaluation.md", "test/evaluation.md"):
        assert read_artifact(latest, name).read_text().startswith(LEAK_BANNER)
    evaluate(EvaluateConfig(model=latest.info.run_id, device="cpu", cache_dir=config.cache_dir))
    latest = get_latest()
    assert "The split of this training leaks" in latest.data.tags["mlflow.note.content"]
    assert latest.data.tags["split.leaks"] == "true"


def test_evaluate_takes_the_logged_model_and_another_source(run: Run, config: TrainConfig, tmp_path) -> None:
    other = write_class_folders(tmp_path / "other", images_per_class=4)
    for file in other.rglob("*.png"):
        file.rename(file.with_name(f"new_{file.name}"))
    model = mlflow.search_logged_models(output_format="list")[0]
    evaluate(EvaluateConfig(model=model.model_uri, data=str(other), device="cpu", cache_dir=config.cache_dir))
    latest = get_latest()
    assert "Test: 12 images" in latest.data.tags["mlflow.note.content"]


def test_training_without_a_run_tracks_nothing_and_calls_back(config: TrainConfig) -> None:
    before = len(mlflow.search_runs(output_format="list"))
    seen: list[EpochResult] = []
    result = run_training(config, on_epoch=seen.append)
    assert [epoch.epoch for epoch in seen] == [1, 2]
    assert tuple(seen) == result.history
    assert result.checkpoint_path.exists()
    assert len(mlflow.search_runs(output_format="list")) == before


def test_a_pruned_training_ends_killed_and_leaves_no_weights(config: TrainConfig) -> None:
    def prune(result: EpochResult) -> None:
        raise KeyError(result.epoch)

    with pytest.raises(KeyError), open_run("pruned", pruned=(KeyError,)) as run:
        run_training(config, tracker=run, on_epoch=prune)
    ended = mlflow.get_run(run.run_id)
    assert (ended.info.status, "failure" in ended.data.tags) == ("KILLED", False)
    assert ended.data.metrics["train/loss"] > 0
    assert not config.checkpoint_dir.joinpath(run.run_id).exists()


def test_the_weights_of_a_finished_run_are_in_its_model_only(run: Run, config: TrainConfig) -> None:
    assert not config.checkpoint_dir.joinpath(run.info.run_id).exists()
    assert not any(path.endswith(".pt") for path in list_artifacts(run))
    path = download_checkpoint(run.info.run_id)
    assert len(list(path.parent.parent.rglob("*.pt"))) == 1


def test_val_is_predicted_once_an_epoch_and_train_once_at_the_end_without_augmentation(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[list[int]] = []
    predict = engine.predict

    def watch(network: torch.nn.Module, loader: Loader, *args: Any, **more: Any) -> Any:
        rows.append(loader.rows.tolist())
        return predict(network, loader, *args, **more)

    for module in (engine, run_module):
        monkeypatch.setattr(module, "predict", watch)
    result = run_training(config)
    val, train = (result.data.store.find_rows(getattr(result.data.split, name)) for name in ("val", "train"))
    assert rows == [val.tolist()] * config.epochs + [train[:: len(train) // len(val)].tolist()]
    assert compute_metrics(result.val_predictions) == result.best.val
    final = result.final_train.balanced_accuracy - result.history[-1].val.balanced_accuracy
    assert result.final_gap == final


def test_patience_stops_a_training_that_no_longer_improves(config: TrainConfig, capsys) -> None:
    result = run_training(config.with_changes(epochs=30, patience=1))
    assert len(result.history) == result.best.epoch + 1 < 30
    assert f"since epoch {result.best.epoch}" in capsys.readouterr().out


def test_a_failed_run_ends_failed_with_the_reason(config: TrainConfig) -> None:
    with pytest.raises(UserError, match="no file"):
        train(config.with_changes(weights="/nowhere.pth"))
    latest = get_latest()
    assert latest.info.status == "FAILED"
    assert "/nowhere.pth" in latest.data.tags["failure"]
    assert latest.data.tags["mlflow.note.content"].startswith("failed: ")
    assert latest.data.params["weights"] == "/nowhere.pth"
    assert "version.torch" in latest.data.tags


def test_a_loss_that_is_not_finite_names_the_images_of_its_batch(config, monkeypatch, capsys) -> None:
    compute_loss, calls = engine.compute_loss, itertools.count(1)
    monkeypatch.setattr(
        engine, "compute_loss", lambda *args: compute_loss(*args) * (torch.nan if next(calls) == 3 else 1)
    )
    with pytest.raises(NonFiniteLossError, match="became nan in epoch 1") as told:
        train(config)
    named = str(told.value).split("Its batch: ")[1].rstrip(".").split(", ")
    data = prepare_data(config)
    order = np.random.default_rng((config.seed, 0)).permutation(len(data.split.train))
    batches = np.array_split(order, -(-len(order) // config.batch_size))
    assert named == [data.split.train[position] for position in batches[2]]
    assert "resume with" not in capsys.readouterr().out, "it would come to the same again"
    assert mlflow.search_runs(output_format="list")[0].info.status == "FAILED"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_a_full_memory_names_what_to_try(config: TrainConfig, monkeypatch, error: Exception) -> None:
    def fill_memory(*args: object) -> None:
        raise error

    monkeypatch.setattr(engine, "compute_loss", fill_memory)
    with pytest.raises(UserError, match="out of memory at batch_size=8, image_size=32; try batch_size=4"):
        train(config)


@pytest.mark.parametrize(("data", "expected"), [("demo", "none"), ("", "imagenet")])
def test_all_but_the_demo_start_from_imagenet(
    config: TrainConfig, monkeypatch, data: str, expected: str
) -> None:
    def stop(network: torch.nn.Module, weights: str, arch: str) -> str:
        raise UserError(f"starts from {weights}")

    monkeypatch.setattr("skin_resnet.training.run.load_weights", stop)
    with pytest.raises(UserError, match=f"starts from {expected}"):
        run_training(config.with_changes(weights="auto", data=data or config.data))


def test_skipped_images_are_counted_and_listed(config: TrainConfig, tmp_path) -> None:
    folder = write_class_folders(tmp_path / "data")
    (folder / "red" / "red_03.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="red_03"):
        train(config.with_changes(data=str(folder)))
    train(config.with_changes(data=str(folder), on_bad_image="skip", epochs=1, test="never"))
    latest = get_latest()
    assert not list_artifacts(latest, "figures")  # of one epoch there are no curves
    assert "get-artifact" not in latest.data.tags["mlflow.note.content"]
    assert latest.data.tags["skipped_images"] == "1"
    assert list(json.loads(read_artifact(latest, "data/skipped_images.json").read_text())) == ["red_03"]
    assert not any(name.startswith("test/") for name in latest.data.metrics)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line."""
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        # What torchrun and Slurm leave behind is not ours.
        "LOCAL_RANK": "abc", "RANK": "1", "WORLD_SIZE": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
        "SLURM_JOB_NAME": "job", "MASTER_PORT": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "skin_resnet", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def start_two(config: TrainConfig, *options: str) -> subprocess.Popen[str]:
    """Start `train` on two devices with the options of a config."""
    params = config.with_changes(devices=2).to_params().items()
    return start("train", *(f"--{name}={value}" for name, value in params), *options)


@pytest.mark.slow
def test_two_processes_train_the_network_of_one_in_one_run_and_reproduce_it(
    config: TrainConfig, store: Path
) -> None:
    # Batches of 5 are shared unequally. Adam would make large steps of the smallest differences.
    config = config.with_changes(
        epochs=1, image_size=64, batch_size=5, optimizer="sgd", augment="strong", mixup=0.2, cutmix=1.0,
        ema_decay=0.9, class_weighting="sqrt", label_smoothing=0.1, grad_clip=1.0, precision="fp32",
    )  # fmt: skip
    before = len(mlflow.search_runs(output_format="list"))
    train(config)
    process = start_two(config)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert stdout.count("\nepoch ") == 1
    two, one, *_ = mlflow.search_runs(output_format="list")
    assert len(mlflow.search_runs(output_format="list")) == before + 2
    assert two.info.status == "FINISHED"
    networks = [read_checkpoint(download_checkpoint(run.info.run_id))["network"] for run in (one, two)]
    for name, values in networks[0].items():
        # Batches of other sizes are convolved in another order, which moves the largest variances most.
        limit = 2e-6 if "running" in name else 1e-6
        assert (networks[1][name].double() - values.double()).abs().max() <= limit * max(1, values.max()), (
            name
        )
    for key, value in one.data.metrics.items():
        if key.startswith(("train/", "val/", "test_")):
            assert two.data.metrics[key] == pytest.approx(value, abs=1e-5), key
    again = start("reproduce", two.info.run_id, f"--cache_dir={config.cache_dir}")
    stdout, _ = again.communicate(timeout=300)
    assert again.returncode == 0, stdout


@pytest.mark.slow
def test_a_run_whose_second_process_is_killed_ends_and_resumes_to_the_bit(
    config: TrainConfig, store: Path
) -> None:
    config = config.with_changes(epochs=4, batch_size=4)
    unbroken = start_two(config)
    unbroken.communicate(timeout=300)
    assert unbroken.returncode == 0
    expected = get_latest().data.tags["best.sha256"]
    process = start_two(config)
    assert process.stdout is not None
    next(line for line in process.stdout if line.startswith("epoch 2/"))
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in stderr.splitlines() if "rank 1" in line], stderr
    assert "Traceback" not in stderr
    run_id = get_latest().info.run_id
    assert get_latest().info.status == "FAILED"

    def resume() -> subprocess.Popen[str]:
        return start("train", f"--resume={run_id}", f"--checkpoint_dir={config.checkpoint_dir}")

    interrupted = resume()
    assert interrupted.stdout is not None
    next(line for line in interrupted.stdout if line.startswith("epoch 3/"))
    time.sleep(0.8)  # into the next epoch
    interrupted.send_signal(signal.SIGTERM)
    _, stderr = interrupted.communicate(timeout=120)
    assert interrupted.returncode == 128 + signal.SIGTERM, stderr
    last = resume()
    stdout, stderr = last.communicate(timeout=300)
    assert last.returncode == 0, stderr
    assert re.search("resumed   after epoch 3, batch [1-9]", stdout), stdout
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["best.sha256"] == expected
