"""The training loop: `fit` yields one result per epoch and knows neither MLflow nor Optuna."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from skin_resnet.config import TrainConfig
from skin_resnet.data.augment import RECIPES, augment, mix
from skin_resnet.data.loader import Batch, Loader
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Metrics, Predictions, compute_metrics
from skin_resnet.model.preprocess import normalize, shrink, to_float
from skin_resnet.model.resnet import ResNet
from skin_resnet.training.device import sum_over_ranks
from skin_resnet.training.optim import compute_loss
from skin_resnet.training.state import TrainingState

# Wraps the batches of an epoch (given with its number) to show how far it is.
Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]


@dataclass(frozen=True, kw_only=True)
class EpochResult:
    """Result of one epoch.

    Attributes:
        epoch: Counted from 1.
        lr: Learning rate of its last step.
        seconds: Wall time, val included.
        images_per_s: Training images per second, val excluded.
        train: Measured over the epoch, on augmented images, while the network learned.
        val: Measured at its end.
        timestamp_ms: When it ended, in milliseconds since 1970. MLflow stores a value once, however often
            it is logged with the same step and timestamp.
    """

    epoch: int
    lr: float
    seconds: float
    images_per_s: float
    train: Metrics
    val: Metrics
    timestamp_ms: int = 0

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "EpochResult":
        """Build the result from what `dataclasses.asdict` returned."""
        return cls(**{**fields, **{split: Metrics(**fields[split]) for split in ("train", "val")}})

    @property
    def gap(self) -> float:
        """The train-val gap: balanced accuracy on train minus that on val."""
        return self.train.balanced_accuracy - self.val.balanced_accuracy

    def to_metrics(self) -> dict[str, float]:
        """Return the metrics under their MLflow keys, without those that are NaN."""
        return {
            **self.train.to_dict("train"),
            **self.val.to_dict("val"),
            "gap": self.gap,
            "lr": self.lr,
            "epoch_s": self.seconds,
            "images_per_s": self.images_per_s,
        }


def to_frame(history: Iterable[EpochResult]) -> pd.DataFrame:
    """Return a history as a table: a row an epoch (index `epoch`), a column an MLflow metric key."""
    history = list(history)
    index = pd.Index([result.epoch for result in history], name="epoch")
    return pd.DataFrame([result.to_metrics() for result in history], index=index)


def find_best(history: Sequence[EpochResult], metric: str) -> EpochResult:
    """Return the best epoch by a val metric, the first of equals: the lowest `loss`, or else the highest."""
    sign = -1 if metric == "loss" else 1
    scores = np.array([sign * getattr(result.val, metric) for result in history])
    return history[int(np.argmax(np.where(np.isnan(scores), -np.inf, scores)))]


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite; `positions` are those of the batch's images in the training split."""

    def __init__(self, message: str, positions: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.positions = positions


def fit(
    state: TrainingState,
    train: Loader,
    val: Loader,
    progress: Progress = lambda batches, epoch: batches,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[EpochResult]:
    """Train from `state.epoch` and `state.step` to `config.epochs`, and yield each epoch's result.

    The state is complete at each yield and whenever `on_batch` is called, which is after every batch of train
    and val: it may be saved there, and the caller may stop there.

    Raises:
        NonFiniteLossError: The loss or a prediction on val became NaN or infinite.
    """
    while state.epoch < state.config.epochs:
        start, before_s = time.perf_counter(), state.epoch_s

        def keep_time(start: float = start, before_s: float = before_s) -> None:
            state.epoch_s = before_s + time.perf_counter() - start
            on_batch()

        images = len(train.rows) * (len(train) - state.step) / len(train)
        trained = _train_epoch(state, train, progress, keep_time)
        train_s = time.perf_counter() - start
        scored = predict(state.scored_network, val, state.fabric, on_batch=keep_time)
        if not np.isfinite(scored).all():
            # The loss was finite to the end: the last batch broke the network.
            last = next(train.shuffled(state.config.seed, state.epoch, len(train) - 1))
            raise build_non_finite_error("a prediction on val", "nan", state, last.positions)
        train_metrics, val_metrics = measure(*trained), measure(scored, val.targets)
        state.val_probabilities = scored
        state.end_epoch(val_metrics.loss)
        yield EpochResult(
            epoch=state.epoch,
            lr=state.optimizer.param_groups[0]["lr"],
            seconds=before_s + time.perf_counter() - start,
            images_per_s=images / train_s,
            train=train_metrics,
            val=val_metrics,
            timestamp_ms=int(1000 * time.time()),
        )


def _train_epoch(
    state: TrainingState, train: Loader, progress: Progress, on_batch: Callable[[], None]
) -> tuple[NDArray[np.float64], Tensor]:
    """Run an epoch's steps; return probabilities (N, K) and targets (N,) of its training images."""
    state.model.train()
    fabric, config = state.fabric, state.config
    num_classes = len(state.class_weights)
    if state.seen is None:
        # The first column is the target: the larger part's, where images are mixed.
        state.seen = torch.zeros(len(train.rows), 1 + num_classes, device=fabric.device)
    seen = state.seen
    losses: list[tuple[Tensor, Tensor]] = []
    # Reading a loss makes a GPU wait, so there it is done rarely.
    check_every = 1 if fabric.device.type == "cpu" else 50
    size = compute_train_size(config, state.epoch, train.pixels.shape[1])
    # Each process augments the whole batch, so that any number of them train the same network.
    own = slice(fabric.global_rank, None, fabric.world_size)
    batches = train.shuffled(config.seed, state.epoch, state.step)
    for step, batch in enumerate(progress(batches, state.epoch + 1), start=state.step):
        generator = seed_step(config.seed, state.epoch, step, fabric.global_rank)
        state.schedule.set_lr(state.epoch * len(train) + step)
        images = shrink(to_float(batch.pixels), size)
        images = augment(images, RECIPES[config.augment], generator)
        images, targets = mix(images, batch.targets, num_classes, config.mixup, config.cutmix, generator)
        logits = state.model(normalize(images[own]))
        loss = compute_loss(logits, targets[own], state.class_weights, config.label_smoothing)
        # DDP averages over the processes, some of which may have an image less.
        fabric.backward(loss * (len(logits) * fabric.world_size / len(images)))
        if config.grad_clip > 0:
            norm = config.grad_clip
            fabric.clip_gradients(state.model, state.optimizer, max_norm=norm, error_if_nonfinite=False)
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.update_ema(state.epoch * len(train) + step)
        seen[batch.positions[own], 1:] = logits.detach().float().softmax(dim=1)
        loss = loss.detach()
        if fabric.world_size > 1:
            loss = sum_over_ranks(loss)  # none is finite if one is not: all processes stop
            # Each rank has filled the rows of its own images and left the others zero; so in `predict`.
            seen[batch.positions] = sum_over_ranks(seen[batch.positions])
        seen[batch.positions, 0] = targets.argmax(dim=1).to(seen.dtype)
        losses.append((loss, batch.positions))
        if len(losses) == check_every or step == len(train) - 1:
            _check_losses(losses, state)
            losses.clear()
        state.step = step + 1
        on_batch()
    return _to_probabilities(seen[:, 1:]), seen[:, 0].long().cpu()


def compute_train_size(config: TrainConfig, epoch: int, full_size: int) -> int:
    """Return the side in pixels at which an epoch, counted from 0, trains: about a multiple of 16.

    The square is our own. Source: Howard, "fastai DAWNBench" (2018); Tan, Le, "EfficientNetV2" (ICML 2021),
    section 4.
    """
    start_size = config.start_size or full_size
    if start_size >= full_size or epoch + 1 >= config.epochs:
        return full_size
    # Slowly at first: an epoch's time grows with the square of the side.
    grown = (epoch / (config.epochs - 1)) ** 2
    size = start_size + (full_size - start_size) * grown
    return min(full_size, max(start_size, 16 * round(size / 16)))


def seed_step(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """Seed a step's random numbers: torch's own, for dropout, by rank; the generator's, the same for all."""

    def draw(rank: int) -> int:
        sequence = np.random.SeedSequence((seed, epoch, step, rank))
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)

    torch.manual_seed(draw(rank))
    return torch.Generator().manual_seed(draw(0))


def _check_losses(losses: list[tuple[Tensor, Tensor]], state: TrainingState) -> None:
    """Stop at the first loss that is not finite; each is given with the positions of its images."""
    finite = torch.stack([loss for loss, _ in losses]).isfinite()
    if not finite.all():
        loss, positions = losses[int(finite.long().argmin())]
        raise build_non_finite_error("the loss", str(loss.item()), state, positions)


def build_non_finite_error(
    what: str, value: str, state: TrainingState, positions: Tensor
) -> NonFiniteLossError:
    """Build the error of something that became NaN or infinite; `positions` are those of its images."""
    hint = f"try lr below {state.config.lr:g}, a longer warm-up, or precision=fp32"
    return NonFiniteLossError(f"{what} became {value} in epoch {state.epoch + 1}; {hint}", positions.tolist())


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Loader,
    fabric: Fabric,
    views: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Predict class probabilities, float64 (N, K), of all images of a loader, in its order, on every rank.

    With 8 views, the probabilities of an image rotated by each right angle, mirrored and not, are averaged.
    """
    network.eval()
    probabilities: Tensor | None = None
    for batch in loader.ordered():
        images = normalize(to_float(batch.pixels))
        for view in range(views):
            mirrored = images.flip(3) if view >= 4 else images
            with fabric.autocast():
                logits = network(torch.rot90(mirrored, view % 4, (2, 3)))
            if probabilities is None:
                probabilities = torch.zeros(len(loader.rows), logits.shape[1], device=fabric.device)
            probabilities[batch.positions] += logits.float().softmax(dim=1) / views
        on_batch()
    assert probabilities is not None, "a loader has at least one batch"
    if loader.world_size > 1:
        probabilities = sum_over_ranks(probabilities)
    return _to_probabilities(probabilities)


@torch.no_grad()
def extract_features(network: ResNet, loader: Loader) -> Tensor:
    """Return the mean features of the first stage of a loader's images, float32 (N, 256) on the CPU."""
    batches = replace(loader, rank=0, world_size=1).ordered()
    return torch.cat([network.begin(normalize(to_float(each.pixels))).mean((2, 3)).cpu() for each in batches])


def _to_probabilities(values: Tensor) -> NDArray[np.float64]:
    probabilities = values.cpu().numpy().astype(np.float64)
    normalized: NDArray[np.float64] = probabilities / probabilities.sum(axis=1, keepdims=True)
    return normalized


def measure(probabilities: NDArray[np.float64], targets: Tensor) -> Metrics:
    """Compute the metrics of predicted probabilities (N, K) and true classes (N,)."""
    return compute_metrics(Predictions(probabilities=probabilities, targets=targets.numpy(), image_ids=()))
