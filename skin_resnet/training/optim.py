"""Loss, optimizer and learning-rate schedule."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from skin_resnet.config import TrainConfig


def build_optimizer(network: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer, fused; its first parameter group has the full learning rate.

    Weight decay is for convolutions and the head only: decaying BatchNorm's scales and the biases does not
    regularize. Source: He et al., "Bag of Tricks for Image Classification", CVPR 2019, section 3.1.

    What comes with the initial weights learns more slowly, the earlier the more so: its features are general
    already. Source: Howard, Ruder, "Universal Language Model Fine-tuning", ACL 2018, section 3.2.
    """
    decay = config.layer_decay if config.initial_weights != "none" else 1.0
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((decay ** _get_distance(name), parameter.ndim > 1), []).append(parameter)
    listed = [
        {"params": groups[key], "lr": config.lr * key[0], "weight_decay": config.weight_decay * key[1]}
        for key in sorted(groups, reverse=True)
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(listed, lr=config.lr, momentum=0.9, nesterov=True, fused=True)
    optimizer = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return optimizer(listed, lr=config.lr, fused=True)


def _get_distance(name: str) -> int:
    """Return how many stages a parameter's is away from the head's: 0 for `fc`, 5 for `conv1`."""
    stage = name.partition(".")[0]
    return {"fc": 0, "layer4": 1, "layer3": 2, "layer2": 3, "layer1": 4}.get(stage, 5)


def compute_lr_factor(schedule: str, step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the share of the peak learning rate at a step, counted from 0.

    `constant`, `cosine` and `plateau` begin with a linear warm-up, whose first step is already above 0.
    """
    if schedule == "onecycle":
        return _one_cycle(step, total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "cosine":
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return (1 + math.cos(math.pi * progress)) / 2
    return 1.0


def _one_cycle(step: int, total_steps: int) -> float:
    """Rise from 1/25 over 30 % of the steps, then fall to 1/250,000, both along a cosine.

    Source: Smith, Topin, "Super-Convergence" (2018), with the numbers of torch's OneCycleLR.
    """
    top = 0.3 * total_steps - 1
    low, end = 1 / 25, 1 / 25e4
    if step <= top:
        return low + (1 - low) * (1 - math.cos(math.pi * step / top)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * (step - top) / (total_steps - 1 - top))) / 2


class Schedule:
    """Sets the learning rate of every step, and lowers it when val stops improving (`plateau`).

    The optimizer must be new: its learning rates are the peaks.
    """

    PLATEAU_PATIENCE = 3  # epochs without a lower val loss before the rate falls
    PLATEAU_FACTOR = 0.3

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int) -> None:
        self._optimizer = optimizer
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._config = config
        self._warmup_steps = round(config.warmup_epochs * steps_per_epoch)
        self._total_steps = config.epochs * steps_per_epoch
        # What `end_epoch` gathers; all else follows from the step.
        self._plateau = {"reduction": 1.0, "lowest_loss": math.inf, "epochs_without": 0}

    def set_lr(self, step: int) -> None:
        """Set the learning rate for a step, counted from 0 over the whole training."""
        factor = compute_lr_factor(self._config.lr_schedule, step, self._warmup_steps, self._total_steps)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor * self._plateau["reduction"]

    def end_epoch(self, val_loss: float) -> None:
        """Add the val loss of an epoch."""
        if self._config.lr_schedule != "plateau":
            return
        self._plateau["epochs_without"] += 1
        if val_loss < self._plateau["lowest_loss"]:
            self._plateau.update(lowest_loss=val_loss, epochs_without=0)
        elif self._plateau["epochs_without"] > self.PLATEAU_PATIENCE:
            self._plateau["reduction"] *= self.PLATEAU_FACTOR
            self._plateau["epochs_without"] = 0

    def state_dict(self) -> dict[str, float]:
        """Return all of its state."""
        return dict(self._plateau)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._plateau = dict(state)


def compute_class_weights(counts: NDArray[np.int64], weighting: str) -> Tensor:
    """Compute a loss weight for each class, float32 (K,), from its number of training images, int64 (K,).

    By `weighting` it is the same (`none`), 1 / sqrt(images) (`sqrt`) or 1 / images (`balanced`), scaled to a
    mean of 1 over the training images, so that the learning rate keeps its meaning; 0 without images.
    """
    power = {"none": 0.0, "sqrt": -0.5, "balanced": -1.0}[weighting]
    weights = np.where(counts > 0, np.maximum(counts, 1).astype(np.float64) ** power, 0.0)
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def compute_loss(logits: Tensor, targets: Tensor, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """Compute the cross-entropy of each image, weighted by its class, and average over the images.

    The smoothing is not weighted, as it is in `F.cross_entropy` (pytorch/pytorch#104776): there, rare classes
    pull every prediction towards themselves, and the best output for a certain image depends on the weights.

    Args:
        logits: float (N, K).
        targets: float (N, K), rows sum to 1: one-hot, or mixed by MixUp or CutMix, as the weights are then.
        class_weights: float (K,).
        label_smoothing: Fraction of each target spread evenly over all classes.
            Source: Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, section 7.
    """
    losses = F.cross_entropy(logits.float(), targets, label_smoothing=label_smoothing, reduction="none")
    return (losses * (targets @ class_weights)).mean()
