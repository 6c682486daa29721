import ctypes
import json
import logging
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2 import functional as F

from skin_resnet.config import TrainConfig
from skin_resnet.data import store as store_module
from skin_resnet.data.decode import decode_image
from skin_resnet.data.store import ImageStore, fingerprint_images, open_store
from skin_resnet.errors import UserError, expand_cache
from skin_resnet.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, normalize


def draw_images(folder: Path, count: int, sides: tuple[int, int] = (60, 45)) -> pd.DataFrame:
    """Write images of random blotches; give their table."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(count)
    paths = [folder / f"image_{number:03}.png" for number in range(count)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(sides).save(path)
    return pd.DataFrame({"image_id": [path.stem for path in paths], "path": [str(path) for path in paths]})


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return draw_images(tmp_path / "images", 5)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def list_stores(cache: Path) -> list[Path]:
    """List what is in the cache but the locks, which stay."""
    return [path for path in (cache / "stores").iterdir() if path.suffix != ".lock"]


def truncate(path: str | Path) -> None:
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) // 2])


def assert_whole(store: ImageStore, table: pd.DataFrame) -> None:
    """Compare every row with its image, decoded again."""
    assert len(store.image_ids) == len(store.pixels)
    paths = dict(zip(table["image_id"], table["path"], strict=True))
    for image_id, pixels in zip(store.image_ids, store.pixels, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(Path(paths[image_id]), store.image_size))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_agrees_with_torchvision(memory_format: torch.memory_format) -> None:
    images = torch.rand(4, 3, 8, 8).to(memory_format=memory_format)
    normalized = normalize(images)
    torch.testing.assert_close(normalized, F.normalize(images, list(IMAGENET_MEAN), list(IMAGENET_STD)))
    assert normalized.is_contiguous(memory_format=memory_format)
    assert normalized.dtype == torch.float32


def test_rows_follow_the_table(table: pd.DataFrame, cache: Path) -> None:
    store = open_store(table, 32, cache, "stop")
    assert store.image_ids == tuple(table["image_id"])
    assert store.pixels.shape == (5, 32, 32, 3)
    assert store.pixels.dtype == np.uint8
    assert_whole(store, table)
    with pytest.raises(ValueError, match="read-only"):
        store.pixels[0] = 0


def test_rows_are_found_by_image_id(table: pd.DataFrame, cache: Path) -> None:
    store = open_store(table, 32, cache, "stop")
    assert store.find_rows(["image_004", "image_000", "image_004"]).tolist() == [4, 0, 4]
    assert store.find_rows([]).tolist() == []
    with pytest.raises(KeyError, match="image_9 is not among the store's 5 images"):
        store.find_rows(["image_000", "image_9"])


def test_more_images_than_are_decoded_at_once_are_all_stored(tmp_path: Path, cache: Path) -> None:
    table = draw_images(tmp_path / "images", 300, (20, 16))
    table.loc[table.index[[0, 255, 256, 299]], "path"] = str(tmp_path / "missing.png")
    store = open_store(table, 16, cache, "skip")
    assert len(store.image_ids) == 296
    assert_whole(store, table)


def test_auto_enlarges_no_image(tmp_path: Path, cache: Path) -> None:
    small = draw_images(tmp_path / "small", 2, (50, 90))
    large = draw_images(tmp_path / "large", 1, (300, 400))
    assert open_store(small, "auto", cache, "stop").image_size == 50
    assert open_store(large, "auto", cache, "stop").image_size == 224


@pytest.mark.parametrize("damage", [truncate, lambda path: Path(path).write_text("not an image")])
def test_a_skipped_image_does_not_shrink_the_others(
    table: pd.DataFrame, tmp_path: Path, cache: Path, damage: Callable[[str], None]
) -> None:
    tiny = draw_images(tmp_path / "tiny", 1, (20, 20)).assign(image_id="tiny")
    damage(tiny["path"][0])
    both = pd.concat([tiny, table])
    store = open_store(both, "auto", cache, "skip")
    assert (store.image_size, list(store.skipped)) == (45, ["tiny"])
    assert_whole(store, both)


def test_a_bad_image_stops_the_build_and_is_named(table: pd.DataFrame, cache: Path) -> None:
    for row in (3, 1):  # the first in the table's order is named, whichever thread fails first
        truncate(table["path"][row])
    with pytest.raises(
        UserError, match=r"image_001 \(.*image_001.png\): it cannot be read .*on_bad_image=skip"
    ):
        open_store(table, "auto", cache, "stop")
    assert list_stores(cache) == []


def test_bad_images_are_skipped_counted_and_listed(table: pd.DataFrame, cache: Path) -> None:
    truncate(table["path"][1])
    Path(table["path"][3]).write_bytes(b"")
    for _ in range(2):  # built, then found
        store = open_store(table, 32, cache, "skip")
        assert store.image_ids == ("image_000", "image_002", "image_004")
        assert list(store.skipped) == ["image_001", "image_003"]
        assert store.skipped["image_003"] == "the file is empty"
        assert_whole(store, table)


def test_a_store_is_built_once(table: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_store(table, 32, cache, "stop")
    monkeypatch.setattr(store_module, "decode_image", lambda *_: pytest.fail("decoded again"))
    second = open_store(table, 32, cache, "stop")
    assert first.key == second.key
    np.testing.assert_array_equal(first.pixels, second.pixels)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what is in memory")
def test_read_ahead_brings_the_images_asked_for_into_memory(tmp_path: Path, cache: Path) -> None:
    table = draw_images(tmp_path / "large", 20, (300, 300))
    folder = cache / "stores" / open_store(table, 224, cache, "stop").key
    store = open_store(table, 224, cache, "stop")
    mapped: Any = store.pixels.base

    def find_in_memory() -> NDArray[np.bool_]:
        start = store.pixels.ctypes.data - 128
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(len(mapped)), pages.ctypes)
        loaded = np.repeat(pages & 1, mmap.PAGESIZE)[128 : len(mapped)]
        return loaded.reshape(len(store.pixels), -1).all(axis=1)

    with (folder / "pixels.npy").open("rb") as file:
        os.fsync(file.fileno())
        mapped.madvise(mmap.MADV_DONTNEED)  # what is mapped is not dropped
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if find_in_memory().any():
        pytest.skip("this file system keeps its files in memory")
    store.read_ahead(np.array([5, 12]))
    deadline = time.monotonic() + 20
    while not (found := find_in_memory())[[5, 12]].all():
        assert time.monotonic() < deadline
    assert np.flatnonzero(found).tolist() == [5, 12]


def test_a_moved_folder_keeps_its_store(table: pd.DataFrame, tmp_path: Path, cache: Path) -> None:
    key = open_store(table, 32, cache, "stop").key
    (tmp_path / "images").rename(tmp_path / "moved")
    moved = table.assign(path=table["path"].str.replace("images", "moved"))
    assert open_store(moved, 32, cache, "stop").key == key


def test_a_files_size_and_its_time_each_make_another_store(table: pd.DataFrame, cache: Path) -> None:
    path, keys = Path(table["path"][2]), set()
    for tail, mtime_ns in ((b"", 1), (b"", 2), (b"more", 2)):
        path.write_bytes(path.read_bytes() + tail)
        os.utime(path, ns=(mtime_ns, mtime_ns))
        keys.add(open_store(table, 32, cache, "stop").key)
    assert len(keys) == 3


def test_every_request_has_its_own_store(table: pd.DataFrame, cache: Path) -> None:
    renamed = table.assign(image_id=table["image_id"].str.upper())
    stores = (
        open_store(table, 45, cache, "stop"),
        open_store(table, "auto", cache, "stop"),
        open_store(table, 45, cache, "skip"),
        open_store(renamed, 45, cache, "stop"),
    )
    assert len({store.key for store in stores}) == 4


def flip_bit(folder: Path, position: int = -1) -> None:
    data = bytearray((folder / "pixels.npy").read_bytes())
    data[position] ^= 1
    (folder / "pixels.npy").write_bytes(data)


def edit_json(folder: Path, **changes: object) -> None:
    path = folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped bit in a pixel": flip_bit,
    "flipped bit in the header": lambda folder: flip_bit(folder, 60),
    "truncated pixels": lambda folder: truncate(folder / "pixels.npy"),
    "no pixels": lambda folder: (folder / "pixels.npy").unlink(),
    "truncated description": lambda folder: truncate(folder / "store.json"),
    "no thumbnails": lambda folder: (folder / "thumbnails.npy").unlink(),
    "swapped image ids": lambda folder: edit_json(
        folder, image_ids=[f"image_00{row}" for row in (1, 0, 2, 3, 4)]
    ),
    "empty folder": lambda folder: list(map(os.unlink, folder.iterdir())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_built_anew(
    damage: str, table: pd.DataFrame, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cache / "stores" / open_store(table, 32, cache, "stop").key
    DAMAGES[damage](folder)
    store = open_store(table, 32, cache, "stop")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "is damaged" in warnings[0]
    assert_whole(store, table)
    assert list_stores(cache) == [folder]


def test_a_copy_of_another_store_is_not_taken(table: pd.DataFrame, cache: Path) -> None:
    wanted, other = (cache / "stores" / open_store(table, size, cache, "stop").key for size in (32, 40))
    for name in ("pixels.npy", "thumbnails.npy", "store.json"):
        shutil.copy(other / name, wanted / name)
    assert open_store(table, 32, cache, "stop").image_size == 32


def test_the_checksum_is_computed_once_per_process(
    table: pd.DataFrame, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(table, 32, cache, "stop")
    monkeypatch.setattr(store_module, "_compute_checksum", lambda *_: pytest.fail("computed again"))
    open_store(table, 32, cache, "stop")


def test_the_fingerprint_changes_with_ids_diagnoses_and_pixels(table: pd.DataFrame, cache: Path) -> None:
    table = table.assign(dx=["nv", "nv", "mel", "mel", "nv"])
    store = open_store(table, 32, cache, "stop")
    before = fingerprint_images(table, store)
    assert fingerprint_images(table.sample(frac=1, random_state=0), store) == before
    assert fingerprint_images(table[1:], store) != before
    assert fingerprint_images(table.assign(dx=["mel", "nv", "nv", "mel", "nv"]), store) != before
    Image.new("RGB", (60, 45)).save(table["path"][2])
    assert fingerprint_images(table, open_store(table, 32, cache, "stop")) != before


def test_the_default_cache_is_in_the_home_folder_and_any_other_is_taken_as_typed() -> None:
    assert expand_cache(TrainConfig().cache_dir) == Path.home() / ".cache/skin-resnet"
    assert expand_cache(Path("~/images")) == Path.home() / "images"
    assert expand_cache(Path("./auto/images")) == Path("auto/images")


def test_a_cache_dir_that_is_a_file_is_refused(table: pd.DataFrame, cache: Path) -> None:
    cache.write_text("")
    with pytest.raises(UserError, match=r"cache_dir: .*cache"):
        open_store(table, 32, cache, "stop")
