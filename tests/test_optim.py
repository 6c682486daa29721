"""Schedules step by step, weights of classes, and the loss against plain torch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from search.space import build_hyperparameters
from skin_resnet.config import TrainConfig
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.optim import (
    Schedule,
    build_optimizer,
    compute_class_weights,
    compute_loss,
    compute_lr_factor,
)


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))


def factors(schedule: str, warmup: int = 4, total: int = 12) -> list[float]:
    return [compute_lr_factor(schedule, step, warmup, total) for step in range(total)]


def test_constant_rises_through_the_warm_up_and_stays() -> None:
    assert factors("constant") == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert factors("constant", warmup=0) == [1] * 12


def test_cosine_falls_from_the_peak_towards_zero() -> None:
    expected = [0.25, 0.5, 0.75, 1] + [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]
    assert factors("cosine") == pytest.approx(expected)
    assert factors("cosine", warmup=12)[-1] == 1  # all warm-up: no step is left to fall in


def test_onecycle_is_torchs() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1, total_steps=40, cycle_momentum=False)
    expected = []
    for _ in range(40):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert factors("onecycle", total=40) == pytest.approx(expected)


@pytest.mark.parametrize("total", [1, 2, 3, 4])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle", "plateau"])
def test_the_shortest_trainings_have_a_finite_rate(schedule: str, total: int) -> None:
    assert all(0 < factor <= 1 for factor in factors(schedule, warmup=1, total=total))


def test_plateau_lowers_the_rate_when_val_loss_stops_falling_and_survives_a_restart() -> None:
    config = TrainConfig(lr=1.0, lr_schedule="plateau", warmup_epochs=0)
    optimizer = build_optimizer(network(), config)
    schedule = Schedule(optimizer, config, steps_per_epoch=1)
    rates = []
    for loss in [3, 2, 2, 2, 2, 2, 1, 1, 1]:
        schedule.end_epoch(loss)
        schedule.set_lr(10)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer = build_optimizer(network(), config)
        restarted = Schedule(optimizer, config, steps_per_epoch=1)
        restarted.load_state_dict(schedule.state_dict())
        schedule = restarted
    # Four epochs without a lower loss than the second's: the rate falls once.
    assert rates == pytest.approx([1, 1, 1, 1, 1, 0.3, 0.3, 0.3, 0.3])


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_only_kernels_decay(name: str) -> None:
    optimizer = build_optimizer(network(), TrainConfig(optimizer=name, weight_decay=0.1))
    decayed, kept = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3, 1, 1)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(kept["params"]) == 3


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_schedule_reaches_every_parameter(name: str) -> None:
    config = TrainConfig(optimizer=name, lr=0.5, lr_schedule="cosine", warmup_epochs=1)
    optimizer = build_optimizer(network(), config)
    Schedule(optimizer, config, steps_per_epoch=10).set_lr(0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_each_stage_of_pretrained_weights_learns_at_a_fraction_of_the_next_ones_rate() -> None:
    config = TrainConfig(lr=1.0, layer_decay=0.5, weights="imagenet", weight_decay=0.1, warmup_epochs=0)
    resnet = build_resnet("resnet50")
    names = {parameter: name for name, parameter in resnet.named_parameters()}
    optimizer = build_optimizer(resnet, config)
    Schedule(optimizer, config.with_changes(lr_schedule="constant"), steps_per_epoch=1).set_lr(0)
    rates = {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(names)
    assert optimizer.param_groups[0]["lr"] == rates["fc.weight"] == rates["fc.bias"] == 1
    assert [rates[f"layer{stage}.0.conv1.weight"] for stage in (4, 3, 2, 1)] == [0.5, 0.25, 0.125, 0.0625]
    assert rates["conv1.weight"] == rates["bn1.bias"] == 0.03125
    decays = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert (decays["conv1.weight"], decays["fc.weight"], decays["bn1.weight"], decays["fc.bias"]) == (
        0.1,
        0.1,
        0,
        0,
    )
    from_random = build_optimizer(resnet, config.with_changes(weights="none"))
    assert {group["lr"] for group in from_random.param_groups} == {1.0}


def test_class_weights_average_one_over_the_images() -> None:
    counts = np.array([100, 25, 4, 0])
    for weighting, ratio in (("none", 1.0), ("sqrt", 2.0), ("balanced", 4.0)):
        weights = compute_class_weights(counts, weighting).numpy()
        assert (weights * counts).sum() / counts.sum() == pytest.approx(1)
        assert weights[1] / weights[0] == pytest.approx(ratio)
        assert weights[3] == 0


HAM10000_COUNTS = np.array([327, 514, 1099, 115, 1113, 6705, 142])  # akiec to vasc
SPACE = build_hyperparameters(epochs=16)


@pytest.mark.parametrize("smoothing", np.arange(0, SPACE["label_smoothing"].high + 0.01, 0.05).round(2))
@pytest.mark.parametrize("weighting", SPACE["class_weighting"].choices)
def test_the_best_prediction_for_a_certain_image_is_the_smoothed_target_whatever_the_weights(
    smoothing: float, weighting: str
) -> None:
    weights = compute_class_weights(HAM10000_COUNTS, weighting)
    one_hot = torch.eye(7)
    smoothed = one_hot * (1 - smoothing) + smoothing / 7
    # Also of a mixed image; and without smoothing the best logits are infinite.
    targets = torch.stack([smoothed[5], smoothed[3], 0.7 * smoothed[5] + 0.3 * smoothed[3]])
    logits = targets.clamp(min=1e-12).log().requires_grad_()
    mixed = torch.stack([one_hot[5], one_hot[3], 0.7 * one_hot[5] + 0.3 * one_hot[3]])
    compute_loss(logits, mixed, weights, smoothing).backward()
    assert logits.grad.abs().max() < 1e-6
    if smoothing == 0.1:
        assert logits.softmax(dim=1)[0, 5].item() == pytest.approx(0.914, abs=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_each_image_is_torchs_times_the_weight_of_its_class(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, targets, weights = torch.randn(16, 7), torch.randint(7, (16,)), torch.rand(7) + 0.5
    ours = compute_loss(logits, F.one_hot(targets, 7).float(), weights, smoothing)
    theirs = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none") * weights[targets]
    assert ours.item() == pytest.approx(theirs.mean().item(), rel=1e-6)
