"""Images a second from disk to float batches: the image store beside a usual PIL data set in a DataLoader.

`python -m benchmarks.store [FOLDER]`: on images drawn as large as HAM10000's, and on those of a folder,
with a table for each.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.results import keep
from skin_resnet.data.store import ImageStore, open_store
from skin_resnet.evaluation.page import format_table

DRAWN_IMAGES = 1000
IMAGE_SIDES = (600, 450)
BATCH_SIZE = 64
WORKERS = 2


class PilDataset(Dataset[Tensor]):
    """Decode, resize and crop an image each time it is asked for."""

    def __init__(self, paths: list[str], image_size: int) -> None:
        self.paths = paths
        self.crop = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size)])
        self.to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        """Count the images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """Return an image, float32 (3, S, S) in [0, 1]."""
        pixels: Tensor = self.to_tensor(self.decode(index))
        return pixels

    def decode(self, index: int) -> Image.Image:
        """Return an image of S x S pixels."""
        with Image.open(self.paths[index]) as image:
            square: Image.Image = self.crop(image.convert("RGB"))
        return square


def draw_images(folder: Path) -> None:
    """Write JPEGs of smooth colors under sensor noise, about as heavy as photographs."""
    rng = np.random.default_rng(0)
    for number in range(DRAWN_IMAGES):
        smooth = Image.fromarray(rng.integers(60, 220, (9, 12, 3), dtype=np.uint8))
        image = np.asarray(smooth.resize(IMAGE_SIDES, Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=92)


def read_batches(store: ImageStore) -> Iterator[Tensor]:
    """Yield every image of the store once, in random order, float32 (N, 3, S, S) in [0, 1]."""
    order = np.random.default_rng(0).permutation(len(store.image_ids))
    for start in range(0, len(order), BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        yield torch.from_numpy(store.pixels[rows]).permute(0, 3, 1, 2).float().div_(255)


def measure(batches: Iterable[Tensor]) -> float:
    """Measure the images a second of one pass."""
    start = time.perf_counter()
    images = sum(len(batch) for batch in batches)
    return images / (time.perf_counter() - start)


def compare(folder: Path, cache_dir: Path, size: int | Literal["auto"]) -> list[list[str]]:
    """Build the store of a folder's images, read it and the images, and return the rows of the table."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    table = pd.DataFrame({"image_id": map(str, range(len(paths))), "path": map(str, paths)})
    start = time.perf_counter()
    store = open_store(table, size, cache_dir, "stop")
    built = len(paths) / (time.perf_counter() - start)
    dataset = PilDataset(list(table["path"]), store.image_size)
    start = time.perf_counter()
    decoded = np.stack([np.asarray(dataset.decode(index)) for index in range(len(paths))])
    looped = len(paths) / (time.perf_counter() - start)
    pairs = zip(decoded, store.pixels, strict=True)
    difference = max(int(np.abs(theirs.astype(np.int16) - ours).max()) for theirs, ours in pairs)
    order = np.random.default_rng(0).integers(0, len(paths), 2000)
    start = time.perf_counter()
    for row in order:
        store.pixels[row].copy()
    read = len(order) / (time.perf_counter() - start)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, num_workers=WORKERS, persistent_workers=True)
    next(iter(loader))  # the workers start here, which an epoch of many would not notice
    theirs, ours = measure(loader), measure(read_batches(store))
    rows = [
        (f"build the store vs. decoding in a loop (largest difference {difference}/255)", built, looped),
        ("read an image from the store vs. decoding it", read, looped),
        (f"batches of the store vs. a DataLoader of PIL images with {WORKERS} workers", ours, theirs),
    ]
    shown = f"{len(paths)} images to {store.image_size} px: "
    return [[shown + name, f"{a:,.0f}", f"{b:,.0f}", f"{a / b:.2f}x"] for name, a, b in rows]


def main() -> None:
    """Compare on drawn images, and on the folder of the command line, and keep a table of each."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        drawn = Path(scratch, "drawn")
        drawn.mkdir()
        draw_images(drawn)
        cases: list[tuple[Path, int | Literal["auto"]]] = [(drawn, 224)]
        cases += [(Path(folder), "auto") for folder in sys.argv[1:2]]
        for folder, size in cases:
            rows = compare(folder, Path(scratch, "cache"), size)
            keep("store", format_table(["", "ours [img/s]", "theirs [img/s]", ""], rows), data=folder)


if __name__ == "__main__":
    main()
