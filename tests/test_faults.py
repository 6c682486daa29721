"""Full and read-only disks, killed processes, wrong clocks: nothing is half-written, nothing is lost."""

import logging
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from skin_resnet.data import store as transform
from skin_resnet.data.decode import decode_image
from skin_resnet.data.demo import open_demo
from skin_resnet.data.store import open_store
from skin_resnet.errors import UserError
from skin_resnet.training.checkpoint import read_checkpoint, save_checkpoint
from tests.test_store import assert_whole, draw_images, list_stores

HOURS_S = 3600.0


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 KB; `mount` it again for more room, or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "size=16k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def table(tmp_path: Path) -> pd.DataFrame:
    return draw_images(tmp_path / "images", 5)


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# At 32 px the pixels fit and what describes them does not; at 64 px the pixels do not fit.
@pytest.mark.parametrize("image_size", [32, 64])
def test_a_store_on_a_full_disk_is_refused_leaves_nothing_and_is_built_once_there_is_room(
    image_size: int, table: pd.DataFrame, disk: Path
) -> None:
    with pytest.raises(UserError, match=r"cache_dir: No space left on device .*make room"):
        open_store(table, image_size, disk, "stop")
    assert list_stores(disk) == []
    mount(disk, "remount,size=1m")
    assert_whole(open_store(table, image_size, disk, "stop"), table)


def test_a_read_only_cache_serves_the_stores_it_has_and_refuses_others(
    table: pd.DataFrame, disk: Path
) -> None:
    mount(disk, "remount,size=1m")
    open_store(table, 32, disk, "stop")
    mount(disk, "remount,ro")
    found = open_store(table, 32, disk, "stop")
    assert_whole(found, table)
    with pytest.raises(UserError, match=r"cache_dir: Read-only file system at .*another cache_dir"):
        open_store(table, 48, disk, "stop")
    assert [folder.name for folder in list_stores(disk)] == [found.key]


def test_a_damaged_store_in_a_read_only_cache_is_reported_not_used(table: pd.DataFrame, disk: Path) -> None:
    mount(disk, "remount,size=1m")
    pixels = disk / "stores" / open_store(table, 32, disk, "stop").key / "pixels.npy"
    pixels.write_bytes(pixels.read_bytes()[:-1] + b"?")
    mount(disk, "remount,ro")
    with pytest.raises(UserError, match=r"cache_dir: Read-only file system"):
        open_store(table, 32, disk, "stop")


@pytest.mark.parametrize("fault", ["No space left on device", "Read-only file system"])
@pytest.mark.parametrize("content", [torch.zeros(100_000), b"x" * 400_000], ids=["tensor", "bytes"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_whole(
    fault: str, content: object, disk: Path
) -> None:
    path = disk / "run" / "best.pt"
    save_checkpoint(path, {"epoch": 1})
    if fault.startswith("Read"):
        mount(disk, "remount,ro,size=1m")
    with pytest.raises(UserError, match=rf"best.pt \({fault}\).*checkpoint_dir"):
        save_checkpoint(path, {"epoch": 2, "network": content})
    assert read_checkpoint(path)["epoch"] == 1
    assert list_files(disk) == ["run/best.pt"]
    mount(disk, "remount,rw,size=1m")
    save_checkpoint(path, {"epoch": 2, "network": content})
    assert read_checkpoint(path)["epoch"] == 2


def test_what_is_wrong_with_a_checkpoints_content_is_not_blamed_on_the_disk(tmp_path: Path) -> None:
    class Broken:
        def __reduce__(self) -> None:
            raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(RuntimeError, match="device-side assert"):
        save_checkpoint(tmp_path / "best.pt", {"network": Broken()})
    assert list_files(tmp_path) == []


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    content = {"network": {"w": torch.arange(3.0)}, "classes": ["a", "b"], "epoch": 3}
    save_checkpoint(tmp_path / "runs" / "best.pt", content)
    back = read_checkpoint(tmp_path / "runs" / "best.pt")
    assert torch.equal(back["network"]["w"], content["network"]["w"])
    assert (back["classes"], back["epoch"]) == (["a", "b"], 3)
    assert [file.name for file in (tmp_path / "runs").iterdir()] == ["best.pt"]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"epoch": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(path, {"epoch": 2, "bad": lambda: None})  # cannot be written: fails half-way
    assert read_checkpoint(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["best.pt"]


def save_slowly(path: Path, reached: Event) -> None:
    class Slow:
        def __reduce__(self) -> None:
            reached.set()
            time.sleep(600)

    save_checkpoint(path, {"network": torch.zeros(1000), "rest": Slow()})


@pytest.fixture
def start() -> Iterator[Callable[..., multiprocessing.Process]]:
    """Start functions in processes of their own, which do not outlive the test."""
    context = multiprocessing.get_context("fork")  # spawning would import torch anew in each
    processes: list[multiprocessing.Process] = []

    def start_process(function: Callable[..., None], *arguments: object) -> multiprocessing.Process:
        processes.append(context.Process(target=function, args=arguments))
        processes[-1].start()
        return processes[-1]

    yield start_process
    for process in processes:
        process.kill()
        process.join()


pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def test_what_a_killed_save_left_is_overwritten_by_the_next(
    tmp_path: Path, start: Callable[..., multiprocessing.Process]
) -> None:
    path, reached = tmp_path / "best.pt", multiprocessing.get_context("fork").Event()
    process = start(save_slowly, path, reached)
    assert reached.wait(60)
    process.kill()
    process.join()
    assert list_files(tmp_path) == [".best.pt.tmp"]
    save_checkpoint(path, {"epoch": 2})
    assert list_files(tmp_path) == ["best.pt"]


def test_the_demo_on_a_full_disk_is_refused_leaves_nothing_and_is_drawn_once_there_is_room(
    disk: Path,
) -> None:
    with pytest.raises(UserError, match=r"cache_dir: No space left on device"):
        open_demo(disk)
    assert list(disk.glob("demo*[!k]")) == []
    mount(disk, "remount,size=64m")
    demo = open_demo(disk)
    assert len(list(demo.rglob("*.jpg"))) == (demo / "HAM10000_metadata.csv").read_text().count("\n") - 1
    mount(disk, "remount,ro")
    assert open_demo(disk) == demo
    with pytest.raises(UserError, match=r"cache_dir: Read-only file system"):
        open_demo(disk / "other")


def build_halfway(table: pd.DataFrame, cache: Path, reached: Event) -> None:
    def decode_or_hang(path: Path, image_size: int) -> np.ndarray:
        if path.stem == "image_003":
            reached.set()
            time.sleep(600)
        return decode_image(path, image_size)

    transform._DECODED_AT_ONCE = 2
    transform.decode_image = decode_or_hang  # type: ignore[assignment]
    open_store(table, 32, cache, "stop")


def test_a_builder_killed_halfway_keeps_nobody_from_the_whole_store(
    table: pd.DataFrame, tmp_path: Path, start: Callable[..., multiprocessing.Process]
) -> None:
    cache, reached = tmp_path / "cache", multiprocessing.get_context("fork").Event()
    builder = start(build_halfway, table, cache, reached)
    assert reached.wait(60)
    (unfinished,) = (cache / "stores").glob("*.tmp")
    assert (unfinished / "pixels.npy").stat().st_size > 0
    assert list_stores(cache) == [unfinished]
    builder.kill()
    builder.join()
    assert builder.exitcode == -signal.SIGKILL
    store = open_store(table, 32, cache, "stop")
    assert_whole(store, table)
    assert list_stores(cache) == [cache / "stores" / store.key]


def test_the_store_of_another_version_is_neither_misread_nor_removed(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = open_store(table, 32, tmp_path, "stop")
    version = transform._STORE_VERSION
    monkeypatch.setattr(transform, "_STORE_VERSION", version + 1)
    theirs = open_store(table, 32, tmp_path, "stop")
    assert theirs.key != ours.key
    monkeypatch.undo()
    monkeypatch.setattr(transform, "decode_image", lambda *_: pytest.fail("decoded again"))
    assert open_store(table, 32, tmp_path, "stop").key == ours.key


def test_images_from_the_future_make_one_store(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in table["path"]:
        os.utime(path, (time.time() + 30 * 24 * HOURS_S,) * 2)
    open_store(table, 32, tmp_path / "cache", "stop")
    with monkeypatch.context() as patch:
        patch.setattr(transform, "decode_image", lambda *_: pytest.fail("decoded again"))
        found = open_store(table, 32, tmp_path / "cache", "stop")
    assert_whole(found, table)


def test_a_clock_that_runs_backwards_breaks_no_build_and_gives_no_negative_duration(
    table: pd.DataFrame,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = time.time()
    readings = iter(now - number * HOURS_S for number in range(2, 1000))
    monkeypatch.setattr(time, "time", lambda: next(readings))
    store = open_store(table, 32, tmp_path, "stop")
    (duration_s,) = (record.args[1] for record in caplog.records if record.msg.startswith("decoded"))
    assert 0 < duration_s < 600
    assert_whole(store, table)
