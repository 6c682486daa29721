"""Epoch time and memory over the number of images and the depth: `python -m benchmarks.growth`.

The images are random pixels in a file that is mapped into memory, as the image store is. Each case runs in a
process of its own. Memory is what the process has for itself (RssAnon): pages of the mapped file, which the
system may drop at any moment, do not count.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.results import keep
from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Loader
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import fit
from skin_resnet.training.state import build_state

SIZE = 32
CASES = (
    *(("resnet50", images, 1) for images in (1_000, 3_000, 10_000, 100_000)),
    *(("resnet101", 3_000, 1), ("resnet152", 3_000, 1), ("resnet50", 1_000, 20)),
)


def run_case(file: Path, arch: str, images: int, epochs: int) -> None:
    """Train; print images a second of the last epoch, and the memory in MB after the first and last one."""
    shape = (images, SIZE, SIZE, 3)
    pixels = torch.from_numpy(np.memmap(file, np.uint8, "c", shape=shape))
    device = torch.device("cpu")
    rows = np.arange(images)
    train = Loader(pixels=pixels, rows=rows, targets=torch.from_numpy(rows % 7), device=device, batch_size=64)
    config = TrainConfig(arch=arch, weights="none", image_size=SIZE, epochs=epochs, device="cpu")
    fabric = build_fabric("cpu", config.precision, 1)
    warm = train.thin(256)
    list(
        fit(
            build_state(config.with_changes(epochs=1), fabric, build_resnet(arch), warm, 7),
            warm, warm.thin(64),
        )
    )  # fmt: skip
    state = build_state(config, fabric, build_resnet(arch), train, 7)
    results = [(result.images_per_s, read_memory_mb()) for result in fit(state, train, warm.thin(64))]
    print(results[-1][0], results[0][1], results[-1][1])


def read_memory_mb() -> float:
    """Return the memory of this process that is not a mapped file's, in MB."""
    match = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match.group(1)) / 1000


def main() -> None:
    """Run all cases and keep the table."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pixels"
        rng = np.random.default_rng(0)
        with file.open("wb") as written:
            for _ in range(max(images for _, images, _ in CASES) // 1000):
                written.write(rng.integers(0, 256, (1000, SIZE, SIZE, 3), np.uint8).tobytes())
        for arch, images, epochs in CASES:
            command = [sys.executable, "-m", "benchmarks.growth", str(file), arch, str(images), str(epochs)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rate, first_mb, last_mb = map(float, done.stdout.split())
            rows.append(
                [arch, f"{images:,}", str(epochs), f"{images / rate:.1f}", f"{1e6 / rate:.0f}",
                 f"{first_mb:.0f}", f"{last_mb:.0f}"]
            )  # fmt: skip
    names = ["network", "images", "epochs", "epoch [s]", "an image [µs]"]
    table = format_table([*names, "memory after the first [MB]", "after the last [MB]"], rows)
    keep("growth", f"{SIZE} x {SIZE} pixels, without val.\n\n{table}", data="random pixels")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_case(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
