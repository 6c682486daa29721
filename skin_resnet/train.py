"""The command `train`: from a data set to a tracked, tested network."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning_fabric import Fabric
from tqdm import tqdm

from skin_resnet.config import TrainConfig
from skin_resnet.data.extract import has_lesion_ids
from skin_resnet.data.load import Batch, Loader
from skin_resnet.data.prepare import PreparedData, open_test, prepare_data
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluate import assess_and_log, predict_checkpoint
from skin_resnet.evaluation.assessment import LEAK_BANNER, calibrate
from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.evaluation.passport import format_passport
from skin_resnet.evaluation.plots.curves import plot_curves
from skin_resnet.evaluation.report import describe_training
from skin_resnet.model.resnet import build_resnet
from skin_resnet.model.weights import load_weights
from skin_resnet.tracking import mlflow_run
from skin_resnet.tracking.openings import record_opening
from skin_resnet.training.checkpoint import read_checkpoint, save_checkpoint
from skin_resnet.training.engine import BestEpoch, Progress, fit
from skin_resnet.training.state import TrainingState, build_fabric, build_state


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training leaves.

    Attributes:
        best: The epoch that val chose.
        history: All epochs, in order.
        checkpoint: The file with the best epoch's network.
        data: What it was trained on.
    """

    best: EpochResult
    history: tuple[EpochResult, ...]
    checkpoint: Path
    data: PreparedData


def train(config: TrainConfig) -> None:
    """Train in an MLflow run of its own, score the best epoch on test, and print where all of it is.

    Raises:
        UserError: Something the user gave cannot be used; the run ends FAILED.
    """
    if _get_rank() > 0:
        run_training(config)  # a process that Fabric started: it takes part, and leaves the rest to the first
        return
    with mlflow_run.open_run("training under way") as run_id:
        mlflow_run.log_params(config)
        mlflow_run.log_versions()
        result = run_training(config)
        text = report(config, result)
        print(f"\n{text}\n")
        page = _test(config, result) if config.test == "at_end" else ""
        print(page)
        # The UI shows the first lines only: the test comes first there.
        mlflow_run.log_note(f"{page}\n\n{text}".strip())
        mlflow_run.log_model(result.checkpoint, result.data.classes)
    print(f"\n{mlflow_run.describe_location(run_id)}")


def report(config: TrainConfig, result: TrainResult) -> str:
    """Tell a training in words, on the open run."""
    classes_in_val = result.data.select(result.data.split.val).dx.nunique()
    text = describe_training(result.history, result.best.epoch, config, classes_in_val)
    if result.data.passport.leaks:
        text = f"{LEAK_BANNER}\n\n{text}"
    mlflow_run.log_text(text, "report.md")
    return text


def break_seal(config: TrainConfig, data: PreparedData) -> tuple[pd.DataFrame, str]:
    """Open the test split, once, on the open run: the one place that does.

    Returns:
        The rows of the test images with their diagnoses, and a warning where others have opened it before.
    """
    warning = record_opening(data.split.hash)
    return open_test(config, data), warning


def _test(config: TrainConfig, result: TrainResult) -> str:
    table, warning = break_seal(config, result.data)
    checkpoint = read_checkpoint(result.checkpoint)
    page = assess_and_log(checkpoint, table, result.data.store, config, "test")
    return f"{warning}\n\n{page}" if warning else page


def _get_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def run_training(config: TrainConfig, on_epoch: Callable[[EpochResult], None] | None = None) -> TrainResult:
    """Train a network and log to the MLflow run that is open, if one is. The test split is not touched.

    Args:
        config: What to do.
        on_epoch: Called after each epoch is logged; what it raises stops the training.

    Returns:
        What the training left; the checkpoint of the best epoch is on disk.

    Raises:
        UserError: Something the user gave cannot be used, or the loss became non-finite.
    """
    data = prepare_data(config)  # before other processes start, which then find the store built
    fabric = build_fabric(config.device, config.precision, config.devices)
    fabric.launch()
    try:
        return _train_and_log(config, data, fabric, on_epoch)
    except BaseException:
        # The other processes wait for this one in the middle of a step, and would do so for half an hour.
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.kill()
        raise


def _train_and_log(
    config: TrainConfig, data: PreparedData, fabric: Fabric, on_epoch: Callable[[EpochResult], None] | None
) -> TrainResult:
    source = data.place(fabric)
    train_loader = data.build_loader(data.split.train, source, fabric, config.batch_size)
    val_loader = data.build_loader(data.split.val, source, fabric, config.batch_size)
    state, start = _build_state(config, data, fabric, train_loader)
    run_id = mlflow_run.get_active_run_id() if fabric.is_global_zero else None
    say = print if fabric.is_global_zero else _say_nothing
    say(_describe_start(config, data, fabric, start))
    if run_id:
        mlflow_run.log_params(config)
        mlflow_run.log_setting(data, fabric.device, str(fabric.strategy.precision.precision), start)
        mlflow_run.log_data(data, config.data)
        mlflow_run.log_passport(data.passport.to_dict(), format_passport(data.passport))
    checkpoint = config.checkpoint_dir.expanduser() / (run_id or f"untracked-{os.getpid()}") / "best.pt"
    best = BestEpoch(config.best_by, config.patience)
    history: list[EpochResult] = []
    for result in fit(state, train_loader, val_loader, _show_progress(config, fabric, train_loader)):
        history.append(result)
        if best.update(result) and fabric.is_global_zero:
            save_checkpoint(checkpoint, _describe_checkpoint(state, data, result, run_id))
        say(_describe_epoch(result, config, is_best=best.epoch == result))
        if run_id:
            mlflow_run.log_epoch(result)
        if on_epoch:
            on_epoch(result)
        if best.should_stop:
            say(f"stopped early: none of {config.patience} epochs was better than epoch {best.epoch.epoch}")
            break
    if fabric.is_global_zero:
        _calibrate(checkpoint, data, config)
    if run_id:
        mlflow_run.log_best(best.epoch)
        mlflow_run.log_figure(plot_curves(history, best.epoch.epoch), "figures/curves.png")
        table = data.select(data.split.val)
        assess_and_log(read_checkpoint(checkpoint), table, data.store, config, "val")
    return TrainResult(best=best.epoch, history=tuple(history), checkpoint=checkpoint, data=data)


def _calibrate(path: Path, data: PreparedData, config: TrainConfig) -> None:
    """Fit on val what a network's probabilities need to be used, and keep it with the network."""
    checkpoint = read_checkpoint(path)
    predictions = predict_checkpoint(checkpoint, data.select(data.split.val), data.store, config)
    calibration = calibrate(predictions, data.classes, config.coverage)
    save_checkpoint(path, {**checkpoint, "calibration": calibration.to_dict()})


def _build_state(
    config: TrainConfig, data: PreparedData, fabric: Fabric, train_loader: Loader
) -> tuple[TrainingState, str]:
    torch.manual_seed(config.seed)  # on every process the same: they must start from equal weights
    network = build_resnet(
        config.arch, len(data.classes), dropout=config.dropout, stochastic_depth=config.stochastic_depth
    )
    start = load_weights(network, config.weights, config.arch)
    return build_state(config, fabric, network, train_loader, len(data.classes)), start


def _say_nothing(text: str) -> None:
    """Stand in for print on every process but the first."""


def _describe_checkpoint(
    state: TrainingState, data: PreparedData, result: EpochResult, run_id: str | None
) -> dict[str, Any]:
    """Give what a network needs to be used and tested anywhere: also the split, so that it is never tested on
    images it has learnt from.
    """
    return {
        "arch": state.config.arch,
        "classes": list(data.classes),
        "image_size": data.store.image_size,
        "network": state.scored_network.state_dict(),
        "epoch": result.epoch,
        "val": result.val.to_dict("val"),
        "config": state.config.model_dump(mode="json"),
        "split": {
            "train": list(data.split.train),
            "val": list(data.split.val),
            "test": list(data.split.test),
        },
        "baseline_class": data.select(data.split.train).dx.mode()[0],
        "leaks": data.passport.leaks,
        "run_id": run_id or "",
    }


def _describe_start(config: TrainConfig, data: PreparedData, fabric: Fabric, start: str) -> str:
    sizes = ", ".join(f"{len(getattr(data.split, name))} {name}" for name in SPLITS)
    skipped = f", {len(data.store.skipped)} skipped" if data.store.skipped else ""
    known = has_lesion_ids(data.table)
    lesions = f"{data.table.lesion_id.nunique()} lesions" if known else "no known lesions"
    return (
        f"data     {config.data}: {len(data.table)} images, {lesions}{skipped}, {data.store.image_size} px\n"
        f"split    {sizes} ({data.split.hash})\n"
        f"network  {config.arch}, {start}\n"
        f"training {config.epochs} epochs on {fabric.world_size} x {fabric.device.type}, "
        f"{config.optimizer} lr {config.lr:g}, augment {config.augment}"
    )


def _describe_epoch(result: EpochResult, config: TrainConfig, *, is_best: bool) -> str:
    train, val = result.train, result.val
    return (
        f"epoch {result.epoch}/{config.epochs}  "
        f"train loss {train.loss:.3f} bal.acc {train.balanced_accuracy:.3f} | "
        f"val loss {val.loss:.3f} acc {val.accuracy:.3f} bal.acc {val.balanced_accuracy:.3f} "
        f"auc {val.macro_auc:.3f} | lr {result.lr:.2g} | {result.images_per_s:.0f} img/s | "
        f"{result.seconds:.1f} s"
        f"{'  *best' if is_best else ''}"
    )


def _show_progress(config: TrainConfig, fabric: Fabric, loader: Loader) -> Progress:
    """Give what shows a bar with images per second and time to go on a terminal, and nothing in a log."""

    def show(batches: Iterable[Batch], epoch: int) -> Iterator[Batch]:
        with tqdm(
            desc=f"epoch {epoch}/{config.epochs}",
            total=len(loader.rows),
            unit=" img",
            leave=False,
            disable=not (fabric.is_global_zero and sys.stderr.isatty()),
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.targets) * fabric.world_size)

    return show
