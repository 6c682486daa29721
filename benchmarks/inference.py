"""How fast images are scored by ONNX Runtime, by PyTorch, and by torchvision's network in PyTorch.

`python -m benchmarks.inference [SECONDS]`
ResNet-50 on one CPU thread, decoding left out. They take turns, so that what else the machine does slows
them alike. Images per second are of the thread's own time, latencies are of the clock and include waiting.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torchvision.models import resnet50

from benchmarks.results import keep
from skin_resnet.evaluation.page import format_table
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.model.classifier import build_classifier
from skin_resnet.model.export import read_exported, write_exported
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.device import build_fabric


def build_scores(image_size: int, folder: Path) -> dict[str, Callable[[NDArray[np.uint8]], object]]:
    """Return what scores images in each way; the weights are random."""
    checkpoint = {
        "arch": "resnet50", "classes": HAM10000_CLASSES, "image_size": image_size, "license": "none",
        "network": build_resnet("resnet50", 7).state_dict(), "run_id": "benchmark", "epoch": 1,
        "calibration": {"temperature": 1.0, "decision_weights": [1.0] * 7, "least_probability": 0.5},
        "familiarity": {"center": torch.zeros(256), "whitening": torch.eye(256)},
    }  # fmt: skip
    write_exported(checkpoint, folder / f"{image_size}.onnx")
    bf16 = build_fabric("cpu", "bf16", devices=1).autocast
    plain = resnet50(num_classes=len(HAM10000_CLASSES)).eval()

    @torch.inference_mode()
    def score_plainly(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        probabilities: NDArray[np.float32] = (
            plain(normalize(to_float(torch.from_numpy(pixels)).contiguous())).softmax(1).numpy()
        )
        return probabilities

    return {
        "torchvision fp32": score_plainly,
        "ONNX Runtime": read_exported(folder / f"{image_size}.onnx").score,
        "PyTorch fp32": build_classifier(checkpoint, torch.device("cpu")).score,
        "PyTorch bf16": build_classifier(checkpoint, torch.device("cpu"), bf16).score,
    }


def measure(
    scores: dict[str, Callable[[NDArray[np.uint8]], object]], image_size: int, batch: int, seconds: float
) -> list[list[str]]:
    """Return a row of the table for each way."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, image_size, image_size, 3), np.uint8)
    used: dict[str, list[float]] = {name: [] for name in scores}
    waited: dict[str, list[float]] = {name: [] for name in scores}
    start = time.perf_counter()
    rounds = -1  # the first compiles kernels
    while rounds < 2 or time.perf_counter() - start < seconds:
        for name, score in scores.items():
            thread, clock = time.thread_time(), time.perf_counter()
            score(pixels)
            if rounds >= 0:
                used[name].append(time.thread_time() - thread)
                waited[name].append(time.perf_counter() - clock)
        rounds += 1
    plain = np.median(used["torchvision fp32"])
    return [
        [
            f"{image_size} px", str(batch), name, f"{batch / np.median(used[name]):.1f}",
            f"{plain / np.median(used[name]):.2f}",
            *(f"{1000 * np.percentile(waited[name], share):.0f}" for share in (50, 99)), str(rounds),
        ]
        for name in scores
    ]  # fmt: skip


def main() -> None:
    """Measure and keep the table."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for image_size in (64, 224):
            scores = build_scores(image_size, Path(folder))
            for batch in (1, 8, 64):
                rows += measure(scores, image_size, batch, seconds)
    head = ["image", "batch", "", "img/s", "times torchvision", "p50 ms", "p99 ms", "rounds"]
    text = f"One thread, onnxruntime {onnxruntime.__version__}.\n\n{format_table(head, rows)}"
    keep("inference", text, data="random pixels")


if __name__ == "__main__":
    main()
