"""Folders that are built once, whole or not at all, however many processes ask for them."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_folder(folder: Path, is_whole: Callable[[Path], object], write: Callable[[Path], None]) -> None:
    """Let one process at a time build a folder, unless it is whole by then.

    `write` fills `<folder>.tmp`, which then takes the place of `folder`: what a killed process left there is
    overwritten, and the operating system releases its lock.

    Raises:
        OSError: The folder cannot be written.
    """
    if is_whole(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if is_whole(folder):  # built by another process meanwhile
            return
        unfinished = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            write(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
