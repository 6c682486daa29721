"""Training images a second, end to end, beside what a user would pick instead:

    python -m benchmarks.alternatives [FOLDER] [--sizes 64,128] [--rounds 3] [--precision fp32]

`pip install timm` first.

All train a ResNet-50 on the same JPEGs with the same batch size, flips and rotations, instead of which timm's
loader crops and resizes. `dataset` is a PIL `Dataset` with torchvision's transforms in a DataLoader, in fp32,
as the student project had it; `reference` is torchvision's recipe with its v2 transforms; `timm` is timm's
loader, model and optimizer, channels-last and in bf16 where this package uses it, too. They take turns; each
is warm, and the best round of each counts.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.models import resnet50
from torchvision.transforms import v2

from benchmarks.results import keep
from benchmarks.store import draw_images
from skin_resnet.config import TrainConfig
from skin_resnet.data.prepare import prepare_data
from skin_resnet.evaluation.page import format_table
from skin_resnet.model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import fit
from skin_resnet.training.state import build_state

BATCH_SIZE = 64
WORKERS = os.cpu_count() or 1
# Steps of a round: on a GPU more, as a DataLoader has loaded two batches a worker before the first.
WARM, STEPS = (3 * WORKERS, 150) if torch.cuda.is_available() else (6, 12)


def read_clock() -> float:
    """Return the time in seconds at which all steps so far are done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Images(Dataset[tuple[Tensor, int]]):
    """JPEGs, decoded each time they are asked for; timm sets `transform` itself."""

    def __init__(self, paths: list[Path], transform: Callable[[Image.Image], Tensor] | None = None) -> None:
        self._paths, self.transform = paths, transform

    def __len__(self) -> int:
        """Count the images."""
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, float32 (3, S, S), and a class."""
        assert self.transform is not None
        with Image.open(self._paths[index]) as image:
            return self.transform(image.convert("RGB")), index % 7


Batches = Iterable[tuple[Tensor, Tensor]]


def build_loader(paths: list[Path], transform: Callable[[Image.Image], Tensor]) -> Batches:
    """Build PyTorch's loader."""
    return DataLoader(Images(paths, transform), BATCH_SIZE, shuffle=True, num_workers=WORKERS, drop_last=True)


def build_dataset_transform(size: int) -> v1.Compose:
    """Build the transforms of the usual notebook."""
    return v1.Compose(
        [
            v1.Resize(size), v1.CenterCrop(size), v1.RandomHorizontalFlip(), v1.RandomVerticalFlip(),
            v1.RandomRotation(180), v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )  # fmt: skip


def build_reference_transform(size: int) -> v2.Compose:
    """Build the transforms of torchvision's classification reference, with the same changes."""
    return v2.Compose(
        [
            v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size),
            v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), v2.RandomRotation(180),
            v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )  # fmt: skip


def build_timm_loader(paths: list[Path], size: int) -> Batches:
    """Build timm's loader, which normalizes batches of uint8 outside the workers."""
    from timm.data import create_loader

    loader: Batches = create_loader(
        Images(paths), (3, size, size), BATCH_SIZE, is_training=True, use_prefetcher=True,
        hflip=0.5, vflip=0.5, scale=(0.9, 1.0), color_jitter=None, interpolation="bilinear",
        num_workers=WORKERS, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=choose_device(),
    )  # fmt: skip
    return loader


def choose_device() -> torch.device:
    """Return the device that this package would choose."""
    return torch.device(build_fabric("auto", "auto", 1).device)


def train_plainly(
    loader: Batches,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    fast: bool,
    precision: str = "auto",
) -> Iterator[int]:
    """Train step after step, and yield the images of each; `fast` is channels-last, with this precision."""
    device = choose_device()
    layout = torch.channels_last if fast else torch.contiguous_format
    network = network.to(device, memory_format=layout).train()
    bf16 = fast and build_fabric("auto", precision, 1)._precision.precision == "bf16-mixed"
    while True:
        for images, targets in loader:
            images, targets = images.to(device, memory_format=layout), targets.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = F.cross_entropy(network(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield len(images)


def train_with_timm(paths: list[Path], size: int, precision: str) -> Iterator[int]:
    """Train timm's model with timm's optimizer."""
    from timm import create_model
    from timm.optim import create_optimizer_v2

    network = create_model("resnet50", num_classes=7)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=5e-4, weight_decay=0.05)
    loader = build_timm_loader(paths, size)
    return train_plainly(loader, network, optimizer, fast=True, precision=precision)


def train_with_torchvision(loader: Batches) -> Iterator[int]:
    """Train torchvision's network with Adam, in fp32."""
    network = resnet50(num_classes=7)
    return train_plainly(loader, network, torch.optim.Adam(network.parameters()), fast=False)


class _Enough(Exception):  # noqa: N818 (not an error)
    pass


class Ours:
    """Trains with this package: its store, augmentation `light`, AdamW, clipping and weight EMA."""

    def __init__(self, folder: Path, size: int, cache_dir: Path, precision: str) -> None:
        config = TrainConfig(
            data=str(folder), weights="none", image_size=size, batch_size=BATCH_SIZE, augment="light",
            epochs=1000, cache_dir=cache_dir, allow_leaks="true",  # the drawn folders are alike
        )  # fmt: skip
        data = prepare_data(config)
        fabric = build_fabric("auto", precision, 1)
        self._loaders = data.build_loaders(fabric, BATCH_SIZE)
        network, classes = build_resnet(config.arch, len(data.classes)), len(data.classes)
        self._state = build_state(config, fabric, network, self._loaders[0], classes)

    def measure(self) -> float:
        """Return the images a second of some steps, after others to warm up."""
        stamps: list[float] = []
        steps = itertools.count()

        def stop() -> None:
            step = next(steps)
            if step in (WARM, WARM + STEPS):
                stamps.append(read_clock())
            if step == WARM + STEPS:
                raise _Enough

        with suppress(_Enough):
            for _ in fit(self._state, *self._loaders, on_batch=stop):
                pass
        return BATCH_SIZE * STEPS / (stamps[1] - stamps[0])


class Plain:
    """Trains with a loop that yields the number of images of each step."""

    def __init__(self, steps: Iterator[int]) -> None:
        self._steps = steps

    def measure(self) -> float:
        """Return the images a second of some steps, after others that use up what was loaded before."""
        for _ in range(WARM):
            next(self._steps)
        start = read_clock()
        images = sum(next(self._steps) for _ in range(STEPS))
        return images / (read_clock() - start)


def main() -> None:
    """Measure all in turns and keep the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder", nargs="?", help="Images in folders, one for each class; default: drawn ones."
    )
    parser.add_argument("--sizes", default="64,128")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="auto", help="Of this package and timm.")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(given.folder or scratch, "" if given.folder else "drawn")
        if not given.folder:
            for name in ("a", "b", "c"):
                (folder / name).mkdir(parents=True)
                draw_images(folder / name)
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        for size in map(int, given.sizes.split(",")):
            contenders = {
                "this package": Ours(folder, size, Path(scratch, "cache"), given.precision),
                "dataset": Plain(train_with_torchvision(build_loader(paths, build_dataset_transform(size)))),
                "reference": Plain(
                    train_with_torchvision(build_loader(paths, build_reference_transform(size)))
                ),
                "timm": Plain(train_with_timm(paths, size, given.precision)),
            }
            speeds: dict[str, float] = dict.fromkeys(contenders, 0.0)
            for _ in range(given.rounds):
                for name, contender in contenders.items():
                    speeds[name] = max(speeds[name], contender.measure())
            for name, speed in speeds.items():
                rows.append([f"{size} px", name, f"{speed:.1f}", f"{speeds['this package'] / speed:.2f}x"])
    table = format_table(["images", "trained with", "img/s", "this package is"], rows)
    keep("alternatives", table, data=folder if given.precision == "auto" else f"{folder}-{given.precision}")


if __name__ == "__main__":
    main()
