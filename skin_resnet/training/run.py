"""A training from its data to its best network: what `train`, `reproduce` and a search's trials all run."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric

from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.data.prepare import PreparedData, prepare_data
from skin_resnet.errors import UserError
from skin_resnet.evaluation.calibration import Calibration, fit_calibration, get_val_predictions
from skin_resnet.evaluation.metrics import Metrics, Predictions
from skin_resnet.model.classifier import build_network, fit_familiarity
from skin_resnet.model.resnet import build_resnet
from skin_resnet.model.weights import load_weights
from skin_resnet.training import get_worker_task, interrupts
from skin_resnet.training.checkpoint import (
    RunFolder,
    copy_to_cpu,
    hash_network,
    read_checkpoint,
    save_checkpoint,
    save_checkpoints,
)
from skin_resnet.training.device import build_fabric, end_processes, launch
from skin_resnet.training.engine import (
    EpochResult,
    NonFiniteLossError,
    extract_features,
    find_best,
    fit,
    measure,
    predict,
)
from skin_resnet.training.progress import describe_epoch, describe_start, show_progress
from skin_resnet.training.resume import ResumePoint, describe_state, restore
from skin_resnet.training.state import TrainingState, build_state, describe_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainStart:
    """A training that is about to begin, or to be resumed; `weights` is what its network starts from."""

    data: PreparedData
    fabric: Fabric
    weights: str
    point: ResumePoint


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a training.

    Attributes:
        best: The epoch that val chose.
        final_train: The last epoch's network on training images, about as many as val has, evaluated as val
            is: without augmentation.
        checkpoint_path: The best epoch's network; a tracked run removes the file when it ends.
        val_predictions: Of the best epoch, before temperature, in the order of the val split.
        calibration: Fitted on them; it is in the checkpoint, too.
        weights_sha256: Digest of the best epoch's weights.
    """

    config: TrainConfig
    best: EpochResult
    history: tuple[EpochResult, ...]
    final_train: Metrics
    checkpoint_path: Path
    data: PreparedData
    val_predictions: Predictions
    calibration: Calibration
    weights_sha256: str

    @property
    def final_gap(self) -> float:
        """Train minus val balanced accuracy of the last epoch's network, both without augmentation."""
        return self.final_train.balanced_accuracy - self.history[-1].val.balanced_accuracy


class Tracker(Protocol):
    """Records a training as it proceeds."""

    run_id: str

    def on_start(self, start: TrainStart) -> None:
        """Called before the first step."""

    def on_epoch(self, result: EpochResult) -> None:
        """Called after each epoch, when its state has been saved: during the next one, if there is one."""

    def on_end(self, result: TrainResult) -> None:
        """Called when the best epoch's checkpoint is complete."""


def run_training(
    config: TrainConfig,
    *,
    tracker: Tracker | None = None,
    on_epoch: Callable[[EpochResult], None] | None = None,
    resume: ResumePoint | None = None,
) -> TrainResult:
    """Train a network. The test split is not touched.

    Args:
        config: All options.
        tracker: Records the training.
        on_epoch: Called when an epoch has been tracked; an exception that it raises stops the training.
        resume: Where to keep the whole state, and the state to resume from, if any; None: only the best
            network is kept, while the run lasts.

    Raises:
        UserError: Something the user gave cannot be used.
        NonFiniteLossError: The loss became NaN or infinite; the message names the images of the batch.
    """
    data = prepare_data(config)  # before other processes start, which then find the decoded images
    if task := get_worker_task():
        folder = RunFolder(Path(task["folder"]))
        saved = folder.read_state() if task["is_resumed"] else None
        resume = ResumePoint(folder=folder, config=config, saved=saved)
    name = tracker.run_id if tracker else f"untracked-{os.getpid()}"
    folder = resume.folder if resume else RunFolder(config.checkpoint_dir.expanduser() / name)
    point = resume or ResumePoint(folder=folder, config=config)
    fabric = build_fabric(config.device, config.precision, config.devices)
    is_resumed = "yes" if point.saved else ""
    task = {"config": config.model_dump_json(), "folder": str(folder.path), "is_resumed": is_resumed}
    processes = launch(fabric, task)
    if fabric.is_global_zero and not resume:
        folder.acquire()
    try:
        training = _Training(data, fabric, tracker, point, on_epoch, saves_state=resume is not None)
        training.run()
        return training.conclude()
    except BaseException as error:
        lost = end_processes(fabric, processes, error)
        if fabric.is_global_zero and not folder.last.exists():
            folder.remove()
        if isinstance(error, NonFiniteLossError):
            ids = [data.split.train[position] for position in error.positions]
            raise NonFiniteLossError(f"{error}. Its batch: {', '.join(ids)}", error.positions) from None
        if lost:
            raise UserError(lost) from None
        raise


def take_part() -> bool:
    """Take part in the training of the process that started this one; return False if none has."""
    task = get_worker_task()
    if task is None:
        return False
    run_training(TrainConfig.model_validate_json(task["config"]))
    return True


class _Training:
    """A training in progress: what it consists of, and its results so far."""

    def __init__(
        self,
        data: PreparedData,
        fabric: Fabric,
        tracker: Tracker | None,
        point: ResumePoint,
        on_epoch: Callable[[EpochResult], None] | None,
        *,
        saves_state: bool,
    ) -> None:
        self._config, self._data, self._fabric = point.config, data, fabric
        self._tracker, self._point, self._history = tracker, point, point.history
        self._on_epoch = on_epoch
        self._unrecorded: tuple[EpochResult, Future[None]] | None = None
        self._loaders = self._train, self._val = data.build_loaders(fabric, self._config.batch_size)
        self._state, weights = _build_state(self._config, data, fabric, self._train)
        restore(point, self._state, data.fingerprint)
        self._saves_state = saves_state and fabric.is_global_zero
        self._saved_at_s = time.monotonic()
        self._print(describe_start(self._config, data, fabric, weights))
        if point.saved:
            self._print(f"resumed   after epoch {self._state.epoch}, batch {self._state.step}")
        if tracker:
            tracker.on_start(TrainStart(data=data, fabric=fabric, weights=weights, point=point))

    def run(self) -> None:
        """Train, epoch by epoch; what is tracked has always been saved."""
        with interrupts.deferred(), ThreadPoolExecutor(1) as writer:
            self._save_state()
            progress = show_progress(self._state, self._train)
            epochs = fit(self._state, self._train, self._val, progress, self._on_batch)
            try:
                while not self._stops_early() and (result := next(epochs, None)):
                    self._record()
                    self._history.append(result)
                    is_best = find_best(self._history, self._config.best_by) is result
                    self._print(describe_epoch(result, self._config, is_best=is_best))
                    contents = self._pack_epoch(is_best=is_best)
                    # Beside the next epoch: it takes up to a second, which can be a third of an epoch.
                    self._unrecorded = result, writer.submit(save_checkpoints, copy_to_cpu(contents))
                    self._saved_at_s = time.monotonic()
                    if not self._saves_state:
                        self._record()
                    interrupts.check()
            finally:
                self._record()

    def _record(self, *, waits: bool = True) -> None:
        """Track the last epoch once it has been saved; if `waits` is False, only if it already has."""
        if not self._unrecorded or not (waits or self._unrecorded[1].done()):
            return
        (result, saving), self._unrecorded = self._unrecorded, None
        saving.result()
        if self._tracker:
            self._tracker.on_epoch(result)
        if self._on_epoch:
            self._on_epoch(result)

    def conclude(self) -> TrainResult:
        """Calibrate the best epoch's network on its val predictions, and complete its checkpoint."""
        config, data, fabric = self._config, self._data, self._fabric
        fabric.barrier()  # the first process has written it
        checkpoint = read_checkpoint(path := self._point.folder.best)
        predictions = get_val_predictions(checkpoint)
        calibration = fit_calibration(predictions, data.classes, config.coverage, data.class_counts)
        if fabric.is_global_zero:
            network = build_network(checkpoint).to(fabric.device)
            features = (extract_features(network, each.thin(2000)) for each in self._loaders)
            familiarity = fit_familiarity(*features)
            save_checkpoint(path, {**checkpoint, "calibration": calibration, "familiarity": familiarity})
        sample = self._train.thin(len(predictions.targets))
        result = TrainResult(
            config=config,
            best=find_best(self._history, config.best_by),
            history=tuple(self._history),
            final_train=measure(predict(self._state.scored_network, sample, fabric), sample.targets),
            checkpoint_path=path,
            data=data,
            val_predictions=predictions,
            calibration=calibration,
            weights_sha256=hash_network(checkpoint["network"]),
        )
        if self._tracker:
            self._tracker.on_end(result)
        return result

    def _pack_epoch(self, *, is_best: bool) -> dict[Path, dict[str, Any]]:
        """Return what is to be saved after an epoch, by file; the state last, for it names the best epoch."""
        contents = {}
        if is_best and self._fabric.is_global_zero:
            run_id = self._tracker.run_id if self._tracker else ""
            contents[self._point.folder.best] = describe_checkpoint(self._state, self._data, run_id)
        return contents | self._pack_state()

    def _pack_state(self) -> dict[Path, dict[str, Any]]:
        if not self._saves_state:
            return {}
        state = describe_state(self._state, self._data.fingerprint, self._history)
        return {self._point.folder.last: state}

    def _save_state(self) -> None:
        save_checkpoints(self._pack_state())
        self._saved_at_s = time.monotonic()

    def _on_batch(self) -> None:
        """Save if it is time to, or a signal to end came, on which the training then stops."""
        pause_s = 60 * self._config.checkpoint_minutes
        is_due = time.monotonic() - self._saved_at_s >= pause_s or interrupts.is_requested()
        self._record(waits=is_due)
        if is_due:
            self._save_state()
        interrupts.check()

    def _stops_early(self) -> bool:
        patience = self._config.patience
        if not self._history or not patience:
            return False
        best = find_best(self._history, self._config.best_by).epoch
        if stops := self._history[-1].epoch - best >= patience:
            self._print(f"stopped early: no improvement in {patience} epochs since epoch {best}")
        return stops

    def _print(self, text: str) -> None:
        if self._fabric.is_global_zero:
            print(text, flush=True)


def _build_state(
    config: TrainConfig, data: PreparedData, fabric: Fabric, train_loader: Loader
) -> tuple[TrainingState, str]:
    """Return the state at the start of a training, and what the network starts from in words."""
    torch.manual_seed(config.seed)  # in every process the same: all must start from equal weights
    rates = {"dropout": config.dropout, "stochastic_depth": config.stochastic_depth}
    network = build_resnet(config.arch, len(data.classes), **rates)
    started_from = load_weights(network, config.initial_weights, config.arch)
    return build_state(config, fabric, network, train_loader, len(data.classes)), started_from
