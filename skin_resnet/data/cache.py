"""Folders that are built once, whole or not at all, however many processes ask for them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time build a folder; the operating system releases the lock of a killed one.

    Raises:
        OSError: The lock file beside the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        yield


@contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder, which takes the place of `folder` if the block succeeds and else is removed.

    It is always `<folder>.tmp`, so what a killed process left is overwritten; hold the lock meanwhile.
    """
    unfinished = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
