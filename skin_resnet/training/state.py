"""What training changes: network, optimizer, schedule and weight EMA, on one device or several."""

import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor, nn

from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS
from skin_resnet.training.device import share_batchnorm
from skin_resnet.training.optim import Schedule, build_optimizer, compute_class_weights


@dataclass(kw_only=True)
class TrainingState:
    """All that training changes, and what it needs to continue.

    Attributes:
        model: The network as Fabric wraps it for precision and several devices: used for training steps.
        ema: The network with the EMA of the weights, or None.
        epoch: Epochs finished; `step`: steps done in the current one.
        seen: Target and predicted probabilities of the training images in the current epoch, float32
            (N, 1 + K); None between epochs.
        epoch_s: Seconds that the current epoch had taken when the state was saved.
        val_probabilities: Of the last epoch that finished, float64 (N, K); not part of what is saved.
    """

    config: TrainConfig
    fabric: Fabric
    network: nn.Module
    model: nn.Module
    optimizer: Any
    schedule: Schedule
    ema: nn.Module | None
    class_weights: Tensor
    epoch: int = 0
    step: int = 0
    seen: Tensor | None = None
    epoch_s: float = 0.0
    val_probabilities: NDArray[np.float64] | None = None

    @property
    def scored_network(self) -> nn.Module:
        """The network that is evaluated: the weight EMA if there is one."""
        return self.network if self.ema is None else self.ema

    @torch.no_grad()
    def update_ema(self, step: int) -> None:
        """Update the EMA of weights and BatchNorm statistics after a step, counted from 0 in all."""
        if self.ema is None:
            return
        # A short memory at first: a short training would otherwise end near its random start.
        decay = min(self.config.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(*self._averaged, 1 - decay)

    @cached_property
    def _averaged(self) -> tuple[list[Tensor], list[Tensor]]:
        """The tensors of the EMA and of the network: listing them takes a tenth of a fast GPU step."""
        assert self.ema is not None
        pairs = zip(self.ema.state_dict().values(), self.network.state_dict().values(), strict=True)
        averages, current = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        return list(averages), list(current)

    def end_epoch(self, val_loss: float) -> None:
        """Move on to the next epoch."""
        self.schedule.end_epoch(val_loss)
        self.epoch, self.step, self.seen, self.epoch_s = self.epoch + 1, 0, None, 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a later process needs to continue exactly here.

        That includes no random state: order, augmentation and dropout are functions of seed, epoch and step.
        """
        return {
            "network": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "seen": self.seen,
            "epoch_s": self.epoch_s,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, in a state built from the same config."""
        self.network.load_state_dict(state["network"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.epoch, self.step, self.epoch_s = state["epoch"], state["step"], state["epoch_s"]
        self.seen = None if state["seen"] is None else state["seen"].to(self.fabric.device)


def build_state(
    config: TrainConfig, fabric: Fabric, network: nn.Module, train: Loader, num_classes: int
) -> TrainingState:
    """Move a network to the device and set up its training."""
    network = share_batchnorm(network, fabric).to(fabric.device).to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False) if config.ema_decay > 0 else None
    model, optimizer = fabric.setup(network, build_optimizer(network, config))
    counts = np.bincount(train.targets.numpy(), minlength=num_classes)
    return TrainingState(
        config=config,
        fabric=fabric,
        network=network,
        model=model,
        optimizer=optimizer,
        schedule=Schedule(optimizer, config, len(train)),
        ema=ema,
        class_weights=compute_class_weights(counts, config.class_weighting).to(fabric.device),
    )


def describe_checkpoint(state: TrainingState, data: PreparedData, run_id: str) -> dict[str, Any]:
    """Return what it takes to use a network anywhere, and never to test it on its training images."""
    split = data.split
    return {
        "arch": state.config.arch,
        "classes": list(data.classes),
        "image_size": data.store.image_size,
        "network": state.scored_network.state_dict(),
        "epoch": state.epoch,
        "val_probabilities": torch.tensor(state.val_probabilities),
        "val_targets": torch.tensor(data.select(split.val).target.to_numpy()),
        "class_counts": data.class_counts.tolist(),
        "config": state.config.model_dump(mode="json"),
        "split": {name: list(getattr(split, name)) for name in SPLITS},
        "split_fingerprints": dict(data.split_fingerprints),
        "baseline_class": data.baseline_class,
        "leaks": data.leakage.leaks,
        "license": data.license,
        "run_id": run_id,
    }
