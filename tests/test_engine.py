"""The loop: it learns, resumes to the bit, repeats itself under a seed, and stops where the loss breaks."""

import copy
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.evaluation.metrics import Metrics
from skin_resnet.model.preprocess import shrink, to_float
from skin_resnet.training.device import build_fabric, is_bf16_fast
from skin_resnet.training.engine import EpochResult, NonFiniteLossError, find_best, fit, predict
from skin_resnet.training.state import TrainingState, build_state

ROOT = Path(__file__).parent.parent


def build_loaders() -> tuple[Loader, Loader]:
    """Three classes that differ by color, 60 images to train on and 20 for val."""
    rng = np.random.default_rng(0)
    targets = np.arange(80) % 3
    colors = np.array([(60, 60, 200), (60, 200, 60), (200, 60, 60)])[targets]
    pixels = np.clip(rng.normal(colors[:, None, None, :], 60, (80, 8, 8, 3)), 0, 255).astype(np.uint8)
    return tuple(
        Loader(
            pixels=torch.from_numpy(pixels),
            rows=rows,
            targets=torch.from_numpy(targets[rows]),
            device=torch.device("cpu"),
            batch_size=16,
        )
        for rows in (np.arange(60), np.arange(60, 80))
    )


def build(**options: Any) -> tuple[TrainingState, Loader, Loader]:
    config = TrainConfig(**{"epochs": 4, "lr": 1e-2, "batch_size": 16, **options})
    fabric = build_fabric("cpu", "fp32", devices=1)
    torch.manual_seed(config.seed)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3),
    )  # fmt: skip
    train, val = build_loaders()
    return build_state(config, fabric, network, train, num_classes=3), train, val


def strip_times(results: Iterator[EpochResult] | list[EpochResult]) -> list[EpochResult]:
    return [replace(result, seconds=0, images_per_s=0, timestamp_ms=0) for result in results]


VARIANTS = [
    {},
    {"optimizer": "sgd", "lr_schedule": "onecycle", "augment": "strong"},
    {"optimizer": "adam", "lr_schedule": "plateau", "ema_decay": 0.9, "class_weighting": "sqrt"},
    {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "lr_schedule": "constant"},
]


def test_it_learns_colors() -> None:
    results = list(fit(*build(epochs=8)))
    assert [result.epoch for result in results] == list(range(1, 9))
    assert results[-1].val.balanced_accuracy > 0.95
    assert results[-1].val.loss < results[0].val.loss
    assert results[-1].train.loss < results[0].train.loss


@pytest.mark.parametrize("options", VARIANTS)
def test_a_seed_gives_the_same_training_again_and_another_seed_another(options: dict[str, Any]) -> None:
    first, again = strip_times(fit(*build(**options))), strip_times(fit(*build(**options)))
    assert first == again
    assert strip_times(fit(*build(**options, seed=1))) != first


@pytest.mark.parametrize("options", VARIANTS)
def test_a_training_interrupted_within_an_epoch_resumes_to_the_bit(options: dict[str, Any]) -> None:
    whole, train, val = build(**options)
    expected = strip_times(fit(whole, train, val))
    epoch = len(train) + len(val)
    for stop_after in (2, epoch, epoch + len(train) + 1):  # in train, between epochs, in the second's val
        stopped, train, val = build(**options)
        calls = itertools.count(1)

        def stop(calls: Iterator[int] = calls, last: int = stop_after) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        results: list[EpochResult] = []
        with pytest.raises(KeyboardInterrupt):
            results.extend(fit(stopped, train, val, on_batch=stop))
        saved = copy.deepcopy(stopped.state_dict())
        torch.manual_seed(12345)  # whatever the new process has drawn before
        resumed, train, val = build(**options)
        resumed.load_state_dict(saved)
        assert strip_times([*results, *fit(resumed, train, val)]) == expected, stop_after
        for name, value in whole.scored_network.state_dict().items():
            assert torch.equal(value, resumed.scored_network.state_dict()[name]), name


def test_train_metrics_are_those_of_all_images_once() -> None:
    state, train, val = build(epochs=1, augment="none", lr=1e-30, optimizer="sgd", warmup_epochs=0)
    state.network[5].p = 0.0
    (result,) = fit(state, train, val)
    # At so small a rate the weights stand still; only BatchNorm's batch statistics differ from evaluation.
    assert 0 <= result.train.accuracy * 60 == pytest.approx(round(result.train.accuracy * 60))
    assert result.val.accuracy * 20 == pytest.approx(round(result.val.accuracy * 20))
    assert result.gap == result.train.balanced_accuracy - result.val.balanced_accuracy


def test_predictions_do_not_depend_on_the_batch_size() -> None:
    state, _, val = build()
    small = predict(state.network, replace(val, batch_size=3), state.fabric)
    assert small == pytest.approx(predict(state.network, replace(val, batch_size=20), state.fabric), abs=1e-6)
    assert small.sum(axis=1) == pytest.approx(np.ones(20))


def test_val_does_not_change_the_network() -> None:
    state, _, val = build()
    before = copy.deepcopy(state.network.state_dict())
    predict(state.network, val, state.fabric)
    assert all(torch.equal(value, before[name]) for name, value in state.network.state_dict().items())


def test_only_our_own_launch_decides_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "RANK", "SLURM_NTASKS", "SLURM_PROCID", "TORCHELASTIC_RUN_ID", "NODE_RANK"):
        monkeypatch.setenv(name, "3")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    for devices in (1, 2):
        fabric = build_fabric("cpu", "fp32", devices)
        assert (fabric.global_rank, fabric.is_global_zero, fabric.world_size) == (0, True, devices)
    script = "from skin_resnet import training; training.ignore_foreign_ranks(); import lightning_fabric"
    variables = {**os.environ, "LOCAL_RANK": "abc"}
    subprocess.run([sys.executable, "-c", script], env=variables, check=True, cwd=ROOT)


def test_auto_trains_in_bf16_on_a_cpu_with_units_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def is_bf16() -> bool:
        with build_fabric("cpu", "auto", 1).autocast():
            return torch.is_autocast_enabled("cpu")

    info = Path("/proc/cpuinfo")
    if info.exists():
        assert is_bf16() == any(unit in info.read_text() for unit in ("avx512_bf16", "amx_bf16"))
    for units, expected in (({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda units=units: units)
        assert is_bf16() == expected


@pytest.mark.parametrize(("major", "expected"), [(7, False), (8, True)])
def test_auto_trains_in_bf16_only_on_gpus_with_units_for_it(monkeypatch, major: int, expected: bool) -> None:
    properties = SimpleNamespace(major=major)  # a T4 has 7 and computes bf16, slowly
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
    assert is_bf16_fast("cuda") == expected


def test_the_moving_average_is_that_of_the_definition() -> None:
    state, train, val = build(ema_decay=0.9, epochs=1)
    shadow = {name: value.clone().double() for name, value in state.network.state_dict().items()}
    original = state.update_ema

    def follow(step: int) -> None:
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in state.network.state_dict().items():
            shadow[name] = decay * shadow[name] + (1 - decay) * value.double()
        original(step)

    state.update_ema = follow  # type: ignore[method-assign]
    list(fit(state, train, val))
    for name, value in state.scored_network.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), shadow[name], atol=1e-6), name


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_loss_that_breaks_stops_the_training_and_says_where() -> None:
    state, train, val = build(grad_clip=0, optimizer="sgd", lr=100, warmup_epochs=0, epochs=50)
    state.schedule.set_lr = lambda step: None  # type: ignore[assignment, method-assign]
    for group in state.optimizer.param_groups:
        group["lr"] = 1e30
    with pytest.raises(NonFiniteLossError, match=r"(nan|inf) in epoch 1") as told:
        list(fit(state, train, val))
    batch = next(itertools.islice(train.shuffled(0, 0), state.step, None))
    assert told.value.positions == batch.positions.tolist()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_network_that_the_last_batch_breaks_names_it_too() -> None:
    state, train, val = build(epochs=2, ema_decay=0)  # else the average is broken one step later

    def break_after_the_last() -> None:
        if state.step == len(train):
            next(state.network.parameters()).data.fill_(torch.nan)

    with pytest.raises(NonFiniteLossError, match=r"val became nan in epoch 1") as told:
        list(fit(state, train, val, on_batch=break_after_the_last))
    (*_, last) = train.shuffled(0, 0)
    assert told.value.positions == last.positions.tolist()


def test_progressive_resizing_trains_small_first_and_scores_at_full_size() -> None:
    state, train, val = build(epochs=6, start_size=32, ema_decay=0)
    wide = torch.zeros(80, 96, 96, 3, dtype=torch.uint8)
    train, val = (replace(each, pixels=wide) for each in (train, val))
    sizes: list[tuple[bool, int]] = []
    state.network.register_forward_pre_hook(
        lambda net, given: sizes.append((net.training, given[0].shape[2]))
    )
    list(fit(state, train, val))
    trained = [size for is_training, size in sizes if is_training]
    assert trained[:: len(train)] == [32, 32, 48, 48, 80, 96]
    assert {size for is_training, size in sizes if not is_training} == {96}


def test_shrinking_is_pillows_up_to_rounding() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((48, 48), Image.Resampling.BILINEAR), dtype=float)
    shrunk = 255 * shrink(to_float(torch.from_numpy(pixels)[None]), 48)[0].permute(1, 2, 0).numpy()
    assert np.abs(shrunk - expected).max() < 1.01


def test_clipping_bounds_the_step() -> None:
    def moved(grad_clip: float) -> float:
        state, train, val = build(
            grad_clip=grad_clip, optimizer="sgd", lr=1.0, lr_schedule="constant", epochs=1, weight_decay=0.0
        )
        before = [p.detach().clone() for p in state.network.parameters()]
        list(fit(state, replace(train, rows=train.rows[:16], targets=train.targets[:16]), val))
        after = state.network.parameters()
        return (
            sum((new.detach() - old).square().sum().item() for new, old in zip(after, before, strict=True))
            ** 0.5
        )

    # One step of SGD with Nesterov momentum 0.9 from rest moves by lr * (1 + 0.9) * gradient.
    assert moved(0.01) == pytest.approx(0.019, rel=1e-3)
    assert moved(0) > 0.1


def result(epoch: int, balanced_accuracy: float, loss: float = 1.0) -> EpochResult:
    metrics = Metrics(loss=loss, accuracy=0.5, balanced_accuracy=balanced_accuracy, macro_auc=float("nan"))
    return EpochResult(epoch=epoch, lr=0.1, seconds=1, images_per_s=1, train=metrics, val=metrics)


@pytest.mark.parametrize(("metric", "best"), [("balanced_accuracy", 2), ("loss", 4), ("macro_auc", 1)])
def test_the_best_epoch_is_the_first_of_the_best_and_an_unknown_score_never_better(
    metric: str, best: int
) -> None:
    scores = [(0.2, 2.0), (0.5, 3.0), (0.5, float("nan")), (0.4, 1.0)]
    history = [result(epoch, *values) for epoch, values in enumerate(scores, start=1)]
    assert find_best(history, metric).epoch == best
