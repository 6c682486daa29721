"""A whole epoch beside its bare steps: `python -m benchmarks.epoch [FOLDER] [SIZE:PRECISION ...]`.

The bare steps train the same network on one batch in memory, as often as the epoch does, and predict val as
often. All else is what the product adds: loading, augmentation, metrics, tracking in MLflow, and saving the
whole state after each epoch and the best network after each better one. The two take turns.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import mlflow
import torch
from torch.nn import functional as F

from benchmarks.results import keep
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import PreparedData, prepare_data
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.run import open_run
from skin_resnet.training.checkpoint import RunFolder
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.optim import compute_loss
from skin_resnet.training.resume import ResumePoint
from skin_resnet.training.run import run_training
from skin_resnet.training.state import build_state

CASES = ("64:fp32", "64:bf16", "128:fp32", "128:bf16")
EPOCHS = 3
STEPS = 5  # the bare steps, and batches of val, that are timed


class BareSteps:
    """The steps of an epoch without what surrounds them."""

    def __init__(self, config: TrainConfig, data: PreparedData) -> None:
        fabric = build_fabric(config.device, config.precision, 1)
        self._train, self._val = data.build_loaders(fabric, config.batch_size)
        network = build_resnet(config.arch, len(data.classes))
        self._state = build_state(config, fabric, network, self._train, len(data.classes))
        batch = next(self._train.shuffled(0, 0))
        self._images = normalize(to_float(batch.pixels))
        self._targets = F.one_hot(batch.targets, len(data.classes)).float()
        self.measure_epoch()  # the first steps allocate

    def measure_epoch(self) -> float:
        """Return the seconds that an epoch's steps and predictions of val take."""
        state, fabric = self._state, self._state.fabric
        state.model.train()
        step_s = []
        for step in range(STEPS):
            start = time.perf_counter()
            loss = compute_loss(state.model(self._images), self._targets, state.class_weights, 0.0)
            fabric.backward(loss)
            fabric.clip_gradients(state.model, state.optimizer, max_norm=1.0, error_if_nonfinite=False)
            state.optimizer.step()
            state.optimizer.zero_grad()
            state.update_ema(step)
            loss.item()  # waits for a GPU
            step_s.append(time.perf_counter() - start)
        state.scored_network.eval()
        predict_s = []
        with torch.no_grad(), fabric.autocast():
            for _ in range(STEPS):
                start = time.perf_counter()
                state.scored_network(self._images).sum().item()
                predict_s.append(time.perf_counter() - start)
        images = len(self._images)
        train_s = statistics.median(step_s) * len(self._train.rows) / images
        return train_s + statistics.median(predict_s) * len(self._val.rows) / images


def measure(config: TrainConfig) -> tuple[float, float]:
    """Return the seconds of a whole epoch and of its bare steps, medians over the epochs."""
    data = prepare_data(config)
    bare = BareSteps(config, data)
    whole_s, bare_s, start = [], [], 0.0

    def end_epoch(result: EpochResult) -> None:
        nonlocal start
        whole_s.append(time.perf_counter() - start)
        bare_s.append(bare.measure_epoch())
        start = time.perf_counter()

    with open_run("benchmark") as run:
        folder = RunFolder(config.checkpoint_dir / run.run_id)
        folder.acquire()
        start = time.perf_counter()
        run_training(
            config, tracker=run, on_epoch=end_epoch, resume=ResumePoint(folder=folder, config=config)
        )
        folder.release()
    # The first one includes the preparation of the data and the start of the network.
    return statistics.median(whole_s[1:]), statistics.median(bare_s[1:])


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
            whole_s, bare_s = measure(config)
            rows.append(
                [f"{size} px, {precision}", f"{whole_s:.1f}", f"{bare_s:.1f}", f"{bare_s / whole_s:.3f}"]
            )
    keep("epoch", format_table(["case", "whole epoch [s]", "bare steps [s]", "bare / whole"], rows))


if __name__ == "__main__":
    main()
