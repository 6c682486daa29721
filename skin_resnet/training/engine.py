"""The training loop: `fit` yields one result per epoch, and knows neither MLflow nor Optuna."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from skin_resnet.data.augment import RECIPES, augment, mix
from skin_resnet.data.loader import Batch, Loader
from skin_resnet.data.store import normalize
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import EpochResult, Metrics, Predictions, compute_metrics
from skin_resnet.training.optim import compute_loss
from skin_resnet.training.state import TrainingState

# Wraps the batches of an epoch to show how far it is: given the batches and the epoch, gives the batches.
Progress = Callable[[Iterable[Batch], int], Iterable[Batch]]


class NonFiniteLossError(UserError):
    """The loss became NaN or infinite: training stops, since nothing after it can be trusted.

    Args:
        message: For the user.
        positions: Where in the training split the images of that batch stand.
    """

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
    """Train from `state.epoch` and `state.step` to `config.epochs`, and yield what each epoch gave.

    The state is whole at each yield and whenever `on_batch` is called, which is after every batch of train
    and val: it may be saved there, and the caller may stop there.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite, or what the network says of val did.
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
            # The loss was finite to the end: what broke the network came of the last batch.
            last = next(train.shuffled(state.config.seed, state.epoch, len(train) - 1))
            what, lr = "what the network says of val", state.config.lr
            raise build_non_finite_error(what, "nan", state.epoch + 1, lr, last.positions)
        train_metrics, val_metrics = _measure(trained), _measure((scored, val.targets))
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
    """Run an epoch's steps; give what the network said (N, K) and was to say (N,) of its training images."""
    state.model.train()
    fabric, config = state.fabric, state.config
    num_classes = len(state.class_weights)
    if state.seen is None:
        # A first column for the target: MixUp's stronger one, where images are mixed.
        state.seen = torch.zeros(len(train.rows), 1 + num_classes, device=fabric.device)
    seen = state.seen
    watch = _LossWatch(state.epoch + 1, config.lr, fabric.device)
    batches = train.shuffled(config.seed, state.epoch, state.step)
    for step, batch in enumerate(progress(batches, state.epoch + 1), start=state.step):
        generator = seed_step(config.seed, state.epoch, step, fabric.global_rank)
        state.schedule.set_lr(state.epoch * len(train) + step)
        images = augment(to_float(batch.pixels), RECIPES[config.augment], generator)
        images, targets = mix(images, batch.targets, num_classes, config.mixup, config.cutmix, generator)
        logits = state.model(normalize(images))
        loss = compute_loss(logits, targets, state.class_weights, config.label_smoothing)
        fabric.backward(loss)
        if config.grad_clip > 0:
            fabric.clip_gradients(
                state.model, state.optimizer, max_norm=config.grad_clip, error_if_nonfinite=False
            )
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.update_ema(state.epoch * len(train) + step)
        seen[batch.positions, 0] = targets.argmax(dim=1).to(seen.dtype)
        seen[batch.positions, 1:] = logits.detach().float().softmax(dim=1)
        watch.note(loss, batch, is_last=step == len(train) - 1)
        state.step = step + 1
        on_batch()
    if fabric.world_size > 1:
        seen = _sum_over_ranks(seen, fabric)
        _average_buffers(state.network, fabric)
    return _to_probabilities(seen[:, 1:]), seen[:, 0].long().cpu()


def seed_step(seed: int, epoch: int, step: int, rank: int) -> torch.Generator:
    """Seed every random number of a step: the generator given back, and torch's own for dropout."""
    step_seed = int(np.random.SeedSequence((seed, epoch, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    torch.manual_seed(step_seed)
    return torch.Generator().manual_seed(step_seed)


def to_float(pixels: Tensor) -> Tensor:
    """Turn pixels uint8 (N, H, W, 3) into images float32 (N, 3, H, W) in [0, 1], laid out channels-last."""
    return pixels.permute(0, 3, 1, 2).float().div_(255)


class _LossWatch:
    """Stops an epoch whose loss is no longer finite, and knows the batch it happened in."""

    def __init__(self, epoch: int, lr: float, device: torch.device) -> None:
        self._epoch, self._lr = epoch, lr
        # Asking a GPU for a loss makes it wait, so there it is asked rarely.
        self._check_every = 1 if device.type == "cpu" else 50
        self._losses: list[tuple[Tensor, Tensor]] = []

    def note(self, loss: Tensor, batch: Batch, *, is_last: bool) -> None:
        self._losses.append((loss.detach(), batch.positions))
        if len(self._losses) < self._check_every and not is_last:
            return
        finite = torch.stack([loss for loss, _ in self._losses]).isfinite()
        if not finite.all():
            loss, positions = self._losses[int(finite.long().argmin())]
            raise build_non_finite_error("the loss", str(loss.item()), self._epoch, self._lr, positions)
        self._losses.clear()


def build_non_finite_error(
    what: str, value: str, epoch: int, lr: float, positions: Tensor
) -> NonFiniteLossError:
    """Build the error of something that became NaN or infinite; `positions` are those of its images."""
    return NonFiniteLossError(
        f"{what} must stay finite, but it became {value} in epoch {epoch}; try an lr below {lr:g}, a longer "
        "warm-up, or precision=fp32.",
        positions.tolist(),
    )


@torch.no_grad()
def predict(
    network: nn.Module,
    loader: Loader,
    fabric: Fabric,
    views: int = 1,
    on_batch: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """Give the class probabilities float64 (N, K) of all images of a loader, in its order, on every rank.

    With 8 views, those of an image turned by each right angle, mirrored and not, are averaged.
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
    return _to_probabilities(
        _sum_over_ranks(probabilities, fabric) if loader.world_size > 1 else probabilities
    )


def _sum_over_ranks(values: Tensor, fabric: Fabric) -> Tensor:
    # Each rank has filled the rows of its own images and left the others zero.
    return fabric.all_reduce(values, reduce_op="sum")  # type: ignore[return-value]


def _average_buffers(network: nn.Module, fabric: Fabric) -> None:
    """Give all ranks the same BatchNorm statistics: each has seen its own images only."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(fabric.all_reduce(buffer, reduce_op="mean"))  # type: ignore[arg-type]


def _to_probabilities(values: Tensor) -> NDArray[np.float64]:
    probabilities = values.cpu().numpy().astype(np.float64)
    normalised: NDArray[np.float64] = probabilities / probabilities.sum(axis=1, keepdims=True)
    return normalised


def _measure(predicted: tuple[NDArray[np.float64], Tensor]) -> Metrics:
    probabilities, targets = predicted
    return compute_metrics(Predictions(probabilities=probabilities, targets=targets.numpy(), image_ids=()))


class BestEpoch:
    """Remembers the best epoch by a val metric, and says when none better has come for too long.

    Args:
        metric: `balanced_accuracy`, `macro_auc` (higher is better) or `loss` (lower is).
        patience: Epochs to wait for a better one; 0: for ever.
    """

    def __init__(self, metric: str, patience: int) -> None:
        self._metric = metric
        self._patience = patience
        self._best: EpochResult | None = None
        self._last_epoch = 0

    @property
    def epoch(self) -> EpochResult:
        """The best epoch so far; there must have been one."""
        assert self._best is not None, "no epoch has finished yet"
        return self._best

    def update(self, result: EpochResult) -> bool:
        """Take note of an epoch; say whether it is the best so far. The first of equals stays."""
        self._last_epoch = result.epoch
        if self._best is not None and self._score(result) <= self._score(self._best):
            return False
        self._best = result
        return True

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self._patience > 0 and self._last_epoch - self.epoch.epoch >= self._patience

    def _score(self, result: EpochResult) -> float:
        value: float = getattr(result.val, self._metric)
        if np.isnan(value):
            return -np.inf
        return -value if self._metric == "loss" else value
