"""A training from its data to its best network: what `train`, a search's trials and `reproduce` all run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from skin_resnet.commands.evaluate import assess_and_log, predict_checkpoint
from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.data.prepare import PreparedData, prepare_data
from skin_resnet.evaluation.assess import fit_calibration
from skin_resnet.evaluation.leakage_page import format_leakage
from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.evaluation.plots.curves import plot_curves
from skin_resnet.model.resnet import build_resnet
from skin_resnet.model.weights import load_weights
from skin_resnet.tracking import log_setting
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking.epoch_log import EpochLog, log_best, to_frame
from skin_resnet.training import interrupts
from skin_resnet.training.checkpoint import hash_network, read_checkpoint, save_checkpoint
from skin_resnet.training.engine import BestEpoch, NonFiniteLossError, fit
from skin_resnet.training.progress import describe_epoch, describe_start, show_progress
from skin_resnet.training.resume import Kept, describe_state, fingerprint, restore
from skin_resnet.training.run_folder import Keeper, RunFolder
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


def run_training(
    config: TrainConfig, on_epoch: Callable[[EpochResult], None] | None = None, kept: Kept | None = None
) -> TrainResult:
    """Train a network and log to the MLflow run that is open, if one is. The test split is not touched.

    Args:
        config: What to do.
        on_epoch: Called after each epoch is logged; what it raises stops the training.
        kept: Where to keep the whole state, and from which to go on; None: keep the best network only.

    Returns:
        What the training left; the checkpoint of the best epoch is on disk.

    Raises:
        UserError: Something the user gave cannot be used.
        NonFiniteLossError: The loss became non-finite; the message names the images of the batch.
    """
    data = prepare_data(config)  # before other processes start, which then find the store built
    fabric = build_fabric(config.device, config.precision, config.devices)
    fabric.launch()
    try:
        training = _Training(config, data, fabric, kept)
        training.run(on_epoch)
        return training.conclude()
    except BaseException as error:
        # The other processes wait for this one in the middle of a step, and would do so for half an hour.
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.kill()
        if isinstance(error, NonFiniteLossError):
            ids = [data.split.train[position] for position in error.positions]
            raise NonFiniteLossError(f"{error} Its batch: {', '.join(ids)}.", error.positions) from None
        raise


class _Training:
    """A training under way: what it has, and what came of it so far."""

    def __init__(self, config: TrainConfig, data: PreparedData, fabric: Fabric, kept: Kept | None) -> None:
        self._config, self._data, self._fabric, self._kept = config, data, fabric, kept
        source = data.place(fabric)
        self._train = data.build_loader(data.split.train, source, fabric, config.batch_size)
        self._val = data.build_loader(data.split.val, source, fabric, config.batch_size)
        self._state, start = _build_state(config, data, fabric, self._train)
        self._run_id = mlflow_run.get_active_run_id() if fabric.is_global_zero else None
        name = self._run_id or f"untracked-{os.getpid()}"
        self._checkpoint = RunFolder(config.checkpoint_dir.expanduser() / name).best
        self._best = BestEpoch(config.best_by, config.patience)
        self._history: list[EpochResult] = []
        self._fingerprint = fingerprint(data)
        if kept:
            restore(kept, self._state, self._fingerprint)
            self._history = kept.history
            for result in self._history:
                self._best.update(result)
        self._say(describe_start(config, data, fabric, start))
        if kept and kept.before:
            self._say(f"resumed  after epoch {self._state.epoch}, batch {self._state.step}")
        if self._run_id:
            mlflow_run.log_params(config)
            log_setting.log_setting(data, fabric.device, str(fabric.strategy.precision.precision), start)
            log_setting.log_data(data, config.data, self._fingerprint)
            log_setting.log_passport(data.leakage.to_dict(), format_leakage(data.leakage))

    def run(self, on_epoch: Callable[[EpochResult], None] | None) -> None:
        """Train, epoch by epoch; what is saved is never behind what is logged."""
        epoch_log = EpochLog(self._run_id, self._history) if self._run_id else None
        keeper = self._build_keeper()
        with interrupts.deferred():
            if keeper:
                keeper.save()
            on_batch = keeper.on_batch if keeper else interrupts.check
            progress = show_progress(self._state, self._train)
            epochs = fit(self._state, self._train, self._val, progress, on_batch)
            while not self._stops_early() and (result := next(epochs, None)):
                self._history.append(result)
                is_best = self._best.update(result)
                if is_best and self._fabric.is_global_zero:
                    content = _describe_checkpoint(self._state, self._data, result, self._run_id)
                    save_checkpoint(self._checkpoint, content)
                if keeper:
                    keeper.save()
                self._say(describe_epoch(result, self._config, is_best=is_best))
                if epoch_log:
                    epoch_log.write(result)
                if on_epoch:
                    on_epoch(result)
                interrupts.check()
        if epoch_log:
            epoch_log.finish()

    def conclude(self) -> TrainResult:
        """Calibrate the best epoch's network, and log what it scores on val."""
        if self._fabric.is_global_zero:
            _calibrate(self._checkpoint, self._data, self._config)
        if self._run_id:
            log_best(self._best.epoch)
            figure = plot_curves(to_frame(self._history), self._best.epoch.epoch)
            mlflow_run.log_figure(figure, "figures/curves.png")
            table = self._data.select(self._data.split.val)
            checkpoint = read_checkpoint(self._checkpoint)
            mlflow_run.set_tags({"best.sha256": hash_network(checkpoint["network"])})
            assess_and_log(checkpoint, table, self._data.store, self._config, "val")
        return TrainResult(
            best=self._best.epoch, history=tuple(self._history), checkpoint=self._checkpoint, data=self._data
        )

    def _build_keeper(self) -> Keeper | None:
        if self._kept is None or not self._fabric.is_global_zero:
            return None
        # Within an epoch, each of several processes has statistics of its own: there only its end is whole.
        minutes = self._config.checkpoint_minutes if self._fabric.world_size == 1 else 0.0
        return Keeper(
            self._kept.folder.last,
            lambda: describe_state(self._state, self._fingerprint, self._history, self._run_id),
            minutes,
        )

    def _stops_early(self) -> bool:
        if self._history and self._best.should_stop:
            self._say(
                f"stopped early: none of {self._config.patience} epochs was better than epoch "
                f"{self._best.epoch.epoch}"
            )
            return True
        return False

    def _say(self, text: str) -> None:
        if self._fabric.is_global_zero:
            print(text)


def _calibrate(path: Path, data: PreparedData, config: TrainConfig) -> None:
    """Fit on val what a network's probabilities need to be used, and keep it with the network."""
    checkpoint = read_checkpoint(path)
    predictions = predict_checkpoint(checkpoint, data.select(data.split.val), data.store, config)
    calibration = fit_calibration(predictions, data.classes, config.coverage)
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
        "leaks": data.leakage.leaks,
        "run_id": run_id or "",
    }
