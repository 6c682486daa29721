"""The share of its steps in an epoch: `python -m benchmarks.epoch [FOLDER] [SIZE:PRECISION ...]`.

The steps are what any loop must do: forward and backward pass, loss, clipping, optimizer, EMA, and the
forward pass on val. The rest is what the product adds: loading, augmentation, metrics, tracking in MLflow,
and saving the whole state after each epoch and the best network after each better one. On a CPU, the steps
are timed within the epoch; those during which the state is written, beside them, count as the mean of the
others. On a GPU, which works in the background, they are timed alone, on one batch in its memory.
"""

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow
import torch
from torch.nn import functional as F

from benchmarks.results import keep
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.run import open_run
from skin_resnet.training import engine, run
from skin_resnet.training.checkpoint import RunFolder
from skin_resnet.training.device import build_fabric
from skin_resnet.training.resume import ResumePoint
from skin_resnet.training.state import TrainingState, build_state

CASES = ("64:fp32", "64:bf16", "128:fp32", "128:bf16")
EPOCHS = 6 if torch.cuda.is_available() else 3


class Clock:
    """Times the parts of a training's steps."""

    def __init__(self) -> None:
        self._began = 0.0
        self._seconds: dict[tuple[str, bool], list[float]] = defaultdict(list)
        self.is_writing = False

    def take_seconds(self) -> float:
        """Return the seconds of all steps since the last call, as if nothing had been written beside them."""
        alone = {name: each for (name, beside), each in self._seconds.items() if not beside}
        counts = {name: len(alone[name]) + len(self._seconds[name, True]) for name in alone}
        total = sum(counts[name] * statistics.mean(alone[name]) for name in alone)
        self._seconds.clear()
        return total

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name, self.is_writing].append(seconds)

    def time(self, owner: Any, name: str) -> None:
        """Count the time of an object's method or a module's function from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*given, **named)
            self._add(name, time.perf_counter() - start)
            return result

        setattr(owner, name, timed)

    def watch(self, state: TrainingState) -> None:
        """Count the time of a training's steps, and of the forward passes of its networks, on a CPU."""
        for owner, name in (
            (state.fabric, "backward"), (state.fabric, "clip_gradients"), (state.optimizer, "step"),
            (state.optimizer, "zero_grad"), (state, "update_ema"),
        ):  # fmt: skip
            self.time(owner, name)
        for network in {state.network, state.scored_network}:
            network.register_forward_pre_hook(lambda *_: self._begin())
            network.register_forward_hook(lambda network, *_: self._end(f"forward, {network.training}"))

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self, name: str) -> None:
        self._add(name, time.perf_counter() - self._began)


def time_steps_alone(config: TrainConfig) -> float:
    """Return the seconds of an epoch's steps on one batch in the memory of a GPU."""
    data, fabric = prepare_data(config), build_fabric("cuda", config.precision, 1)
    train, val = data.build_loaders(fabric, config.batch_size)
    network = build_resnet(config.arch, len(data.classes))
    state = build_state(config, fabric, network, train, len(data.classes))
    batch = next(train.shuffled(config.seed, 0))
    images = normalize(to_float(batch.pixels))
    targets = F.one_hot(batch.targets, len(data.classes)).float()

    def run_epoch() -> float:
        state.model.train()
        start = time.perf_counter()
        for step in range(len(train)):
            loss = engine.compute_loss(state.model(images), targets, state.class_weights, 0)
            fabric.backward(loss)
            fabric.clip_gradients(
                state.model, state.optimizer, max_norm=config.grad_clip, error_if_nonfinite=False
            )
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.update_ema(step)
        state.scored_network.eval()
        with torch.no_grad(), fabric.autocast():
            for _ in range(len(val)):
                state.scored_network(images)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return statistics.median([run_epoch() for _ in range(EPOCHS)][1:])


def measure(config: TrainConfig) -> tuple[float, float]:
    """Return the seconds of a whole epoch, and those of its steps: medians over the epochs."""
    clock = Clock()
    build_state, compute_loss, write = run.build_state, engine.compute_loss, run.save_checkpoints
    readings = []

    def build(*given: Any) -> TrainingState:
        state = build_state(*given)
        clock.watch(state)
        end_epoch = state.end_epoch

        def end(val_loss: float) -> None:
            readings.append((time.perf_counter(), clock.take_seconds()))
            end_epoch(val_loss)

        state.end_epoch = end
        return state

    def save(contents: dict[Path, dict[str, Any]]) -> None:
        clock.is_writing = True
        write(contents)
        clock.is_writing = False

    run.build_state, run.save_checkpoints = build, save
    clock.time(engine, "compute_loss")
    try:
        with open_run("benchmark") as opened:
            folder = RunFolder(config.checkpoint_dir / opened.run_id)
            folder.acquire()
            point = ResumePoint(folder=folder, config=config)
            run.run_training(config, tracker=opened, resume=point)
            folder.release()
    finally:
        run.build_state, engine.compute_loss, run.save_checkpoints = build_state, compute_loss, write
    # Not the first epoch, which includes the start of the network.
    whole_s = statistics.median([after - before for (before, _), (after, _) in pairwise(readings)])
    step_s = statistics.median([seconds for _, seconds in readings[1:]])
    return whole_s, time_steps_alone(config) if torch.cuda.is_available() else step_s


def main() -> None:
    """Measure each case and keep the table."""
    given = sys.argv[1:]
    cases = [word for word in given if ":" in word] or CASES
    data = next((word for word in given if ":" not in word), "demo")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        for case in cases:
            size, precision = case.split(":")
            config = TrainConfig(
                data=data, weights="none", image_size=int(size), precision=precision, epochs=EPOCHS,
                checkpoint_dir=Path(folder),
            )  # fmt: skip
            whole_s, step_s = measure(config)
            rows.append(
                [f"{size} px, {precision}", f"{whole_s:.1f}", f"{step_s:.1f}", f"{step_s / whole_s:.3f}"]
            )
    keep("epoch", format_table(["case", "whole epoch [s]", "its steps [s]", "share"], rows), data=data)


if __name__ == "__main__":
    main()
