"""Batches of pixels and targets, on the device, in an order that a seed fixes."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skin_resnet.data.store import ImageStore


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images of a split, on the device."""

    pixels: Tensor  # uint8 (N, S, S, 3)
    targets: Tensor  # int64 (N,)
    positions: Tensor  # int64 (N,): the images' positions in the split


def place_pixels(store: ImageStore, device: torch.device) -> Tensor:
    """Copy the whole store to an accelerator if it takes less than half of the free memory there.

    HAM10000 at 224 px is 1.5 GB. Else the pixels stay a memory map on disk, which all processes share.
    """
    if device.type == "cuda" and store.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return torch.from_numpy(np.array(store.pixels)).to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map is read-only, and nothing writes to it
        return torch.from_numpy(store.pixels)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The batches of one split, for one of `world_size` processes."""

    pixels: Tensor  # uint8 (M, S, S, 3), of the whole store, from `place_pixels`
    rows: NDArray[np.int64]  # (N,): the split's rows of the store
    targets: Tensor  # int64 (N,), on the CPU
    device: torch.device  # where the batches go
    read_ahead: Callable[[NDArray[np.int64]], None] = lambda rows: None  # given the next batch's rows
    batch_size: int  # images per step, over all processes
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Count the batches of an epoch: as few as the batch size allows, with at least two images each.

        BatchNorm cannot train on one image, and each process needs one of its own, so with a tiny batch
        size, some batches have one image more.
        """
        smallest = max(2, self.world_size)
        return max(1, min(-(-len(self.rows) // self.batch_size), len(self.rows) // smallest))

    def thin(self, count: int) -> "Loader":
        """Return a loader of about `count` of the images, evenly spaced in the split's order."""
        kept = np.arange(0, len(self.rows), max(1, len(self.rows) // count))
        return replace(self, rows=self.rows[kept], targets=self.targets[kept])

    def shuffled(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield every image once, in the order that `seed` and `epoch` fix: for training.

        Every process gets whole batches. A resumed epoch starts at batch `first_step`.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return self._build_batches(np.array_split(order, len(self))[first_step:])

    def ordered(self) -> Iterator[Batch]:
        """Yield every image once, in the split's order, each in one of the processes: for val and test."""
        batches = np.array_split(np.arange(len(self.rows)), len(self))
        return self._build_batches([batch[self.rank :: self.world_size] for batch in batches])

    def _build_batches(self, batches: list[NDArray[np.int64]]) -> Iterator[Batch]:
        # Batches of almost equal size instead of full ones and a rest: no image is dropped or weighs more.
        for number, positions in enumerate(batches):
            if self.pixels.device.type == "cpu" and number + 1 < len(batches):
                self.read_ahead(self.rows[batches[number + 1]])
            rows, indices = (torch.from_numpy(each) for each in (self.rows[positions], positions))
            yield Batch(
                pixels=self._place(self.pixels[rows.to(self.pixels.device, non_blocking=True)]),
                targets=self._place(self.targets[indices]),
                positions=self._place(indices),
            )

    def _place(self, values: Tensor) -> Tensor:
        # Otherwise each copy would wait until a GPU has done all the steps before.
        return values.to(self.device, non_blocking=self.device.type == "cuda")
