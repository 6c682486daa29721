"""Batches of pixels and targets, on the device, in an order that a seed fixes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skin_resnet.data.store import ImageStore


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some images of a split.

    Attributes:
        pixels: uint8 (N, S, S, 3), on the device.
        targets: int64 (N,), on the device.
        positions: int64 (N,), on the device: the images' positions in the split.
    """

    pixels: Tensor
    targets: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """The store's pixels where batches are gathered: on the accelerator if they fit, else on disk."""

    pixels: NDArray[np.uint8] | Tensor
    device: torch.device

    def gather(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the pixels of some rows, uint8 (N, S, S, 3), on the device."""
        if isinstance(self.pixels, Tensor):
            return self.pixels[torch.from_numpy(rows).to(self.device)]
        return torch.from_numpy(self.pixels[rows]).to(self.device)


def place_pixels(store: ImageStore, device: torch.device) -> PixelSource:
    """Copy the whole store to an accelerator if it takes less than half of the free memory there.

    HAM10000 at 224 px is 1.5 GB. On the CPU, the store stays a memory map, shared by all processes.
    """
    if device.type == "cuda" and store.pixels.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        return PixelSource(pixels=torch.from_numpy(np.array(store.pixels)).to(device), device=device)
    return PixelSource(pixels=store.pixels, device=device)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The batches of one split, for one of `world_size` processes.

    Attributes:
        source: Where the pixels are.
        rows: int64 (N,): the split's rows of the store.
        targets: int64 (N,), on the CPU.
        batch_size: Images per step, over all processes.
        rank: This process's index, from 0.
        world_size: Number of processes that share each batch.
    """

    source: PixelSource
    rows: NDArray[np.int64]
    targets: Tensor
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        """Count the batches of an epoch: as few as the batch size allows, with at least two images each.

        BatchNorm cannot train on one image per process, so some batches of a tiny size have one image more.
        """
        return max(1, min(-(-len(self.rows) // self.batch_size), len(self.rows) // (2 * self.world_size)))

    def shuffled(self, seed: int, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield every image once, in the order that `seed` and `epoch` fix: for training.

        A resumed epoch starts at batch `first_step`.
        """
        order = np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return self._split_up(order, first_step)

    def ordered(self) -> Iterator[Batch]:
        """Yield every image once, in the split's order: for val and test."""
        return self._split_up(np.arange(len(self.rows)))

    def _split_up(self, order: NDArray[np.int64], first_step: int = 0) -> Iterator[Batch]:
        # Batches of almost equal size instead of full ones and a rest: no image is dropped or weighs more.
        for step_positions in np.array_split(order, len(self))[first_step:]:
            positions = step_positions[self.rank :: self.world_size]
            yield Batch(
                pixels=self.source.gather(self.rows[positions]),
                targets=self.targets[positions].to(self.source.device),
                positions=torch.from_numpy(positions).to(self.source.device),
            )
