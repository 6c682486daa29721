"""The share of its steps in an epoch, on a CPU: `python -m benchmarks.epoch [FOLDER] [SIZE:PRECISION ...]`.

Timed within the epoch is what any loop must do: forward and backward pass, loss, clipping, optimizer, EMA,
and the forward pass on val. The rest is what the product adds: loading, augmentation, metrics, tracking in
MLflow, and saving the whole state after each epoch and the best network after each better one.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlflow

from benchmarks.results import keep
from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.page import format_table
from skin_resnet.tracking.run import open_run
from skin_resnet.training import engine, run
from skin_resnet.training.checkpoint import RunFolder
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.resume import ResumePoint
from skin_resnet.training.state import TrainingState

CASES = ("64:fp32", "64:bf16", "128:fp32", "128:bf16")
EPOCHS = 3


class Clock:
    """Counts the seconds that a training spends in its steps."""

    def __init__(self) -> None:
        self.seconds, self._began = 0.0, 0.0

    def time(self, owner: Any, name: str) -> None:
        """Count the time of an object's method or a module's function from now on."""
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            result = function(*given, **named)
            self.seconds += time.perf_counter() - start
            return result

        setattr(owner, name, timed)

    def watch(self, state: TrainingState) -> None:
        """Count the time of a training's steps, and of the forward passes of its networks."""
        for owner, name in (
            (state.fabric, "backward"), (state.fabric, "clip_gradients"), (state.optimizer, "step"),
            (state.optimizer, "zero_grad"), (state, "update_ema"),
        ):  # fmt: skip
            self.time(owner, name)
        for network in {state.network, state.scored_network}:
            network.register_forward_pre_hook(lambda *_: self._begin())
            network.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._began = time.perf_counter()

    def _end(self) -> None:
        self.seconds += time.perf_counter() - self._began


def measure(config: TrainConfig) -> tuple[float, float]:
    """Return the seconds of a whole epoch, and those of its steps: medians over the epochs."""
    clock = Clock()
    build_state, compute_loss = run.build_state, engine.compute_loss

    def build(*given: Any) -> TrainingState:
        state = build_state(*given)
        clock.watch(state)
        return state

    run.build_state = build
    clock.time(engine, "compute_loss")
    readings = []

    def end_epoch(result: EpochResult) -> None:
        readings.append((time.perf_counter(), clock.seconds))

    try:
        with open_run("benchmark") as opened:
            folder = RunFolder(config.checkpoint_dir / opened.run_id)
            folder.acquire()
            point = ResumePoint(folder=folder, config=config)
            run.run_training(config, tracker=opened, on_epoch=end_epoch, resume=point)
            folder.release()
    finally:
        run.build_state, engine.compute_loss = build_state, compute_loss
    # Not the first epoch, which includes the start of the network.
    pairs = list(pairwise(readings))
    whole_s, step_s = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))
    return statistics.median(whole_s), statistics.median(step_s)


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
                device="cpu", checkpoint_dir=Path(folder),
            )  # fmt: skip
            whole_s, step_s = measure(config)
            rows.append(
                [f"{size} px, {precision}", f"{whole_s:.1f}", f"{step_s:.1f}", f"{step_s / whole_s:.3f}"]
            )
    keep("epoch", format_table(["case", "whole epoch [s]", "its steps [s]", "share"], rows), data=data)


if __name__ == "__main__":
    main()
