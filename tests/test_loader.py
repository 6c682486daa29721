"""Batches: every image once, in an order that the seed fixes, shared among processes without overlap."""

import itertools

import numpy as np
import pytest
import torch

from skin_resnet.data.loader import Loader


def build(size: int = 23, batch_size: int = 5, **share: int) -> Loader:
    pixels = np.arange(90, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    rows = np.arange(size)[::-1].copy() + 10
    return Loader(
        pixels=torch.from_numpy(pixels),
        rows=rows,
        device=torch.device("cpu"),
        targets=torch.from_numpy(rows % 7),
        batch_size=batch_size,
        **share,
    )


def test_ordered_gives_every_image_once_with_its_pixels_and_target() -> None:
    loader = build()
    batches = list(loader.ordered())
    assert torch.cat([batch.positions for batch in batches]).tolist() == list(range(23))
    pixels = torch.cat([batch.pixels for batch in batches])
    assert pixels.dtype == torch.uint8
    assert pixels[:, 0, 0, 0].tolist() == loader.rows.tolist()
    assert torch.equal(torch.cat([batch.targets for batch in batches]), loader.targets)


def test_shuffled_gives_every_image_once_in_an_order_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch.positions for batch in build().shuffled(seed, epoch)]).tolist()

    assert sorted(order(0, 0)) == list(range(23))
    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("size", "batch_size"), [(23, 5), (21, 5), (33, 32), (4, 32), (32, 32)])
def test_batches_are_even_and_never_over_size(size: int, batch_size: int) -> None:
    loader = build(size, batch_size)
    sizes = [len(batch.targets) for batch in loader.ordered()]
    assert len(sizes) == len(loader)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size"), [(65, 2, 1), (23, 4, 2), (7, 2, 1), (11, 6, 3), (9, 4, 4)]
)
def test_each_process_has_an_image_of_each_batch_and_every_batch_has_two(
    size: int, batch_size: int, world_size: int
) -> None:
    for rank in range(world_size):
        loader = build(size, batch_size, rank=rank, world_size=world_size)
        assert min(len(batch.targets) for batch in loader.ordered()) >= (2 if world_size == 1 else 1)
        assert min(len(batch.targets) for batch in loader.shuffled(0, 0)) >= 2


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_share_each_batch_of_val_and_have_each_of_train(world_size: int) -> None:
    shares = [build(batch_size=8, rank=rank, world_size=world_size) for rank in range(world_size)]
    for steps in zip(build(batch_size=8).ordered(), *(share.ordered() for share in shares), strict=True):
        whole, *parts = [batch.positions.tolist() for batch in steps]
        assert sorted(itertools.chain(*parts)) == whole
    for steps in zip(*(share.shuffled(0, 3) for share in shares), strict=True):
        assert len({tuple(batch.positions.tolist()) for batch in steps}) == 1
