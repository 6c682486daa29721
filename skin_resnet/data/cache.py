"""Folders that are built once, whole or not at all, however many processes ask for them."""

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def build_once(folder: Path, is_built: Callable[[Path], bool], build: Callable[[Path], None]) -> bool:
    """Build a folder, unless another process has built it meanwhile; return whether this call did.

    The folder is written under a lock as `<folder>.tmp` and renamed when complete: what a killed process
    leaves is overwritten by the next, and the operating system releases its lock.

    Args:
        folder: The folder; one that is there, but not built, is replaced.
        is_built: Whether the folder is there and usable.
        build: Fills the empty folder that it is given.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.tmp")
    with FileLock(f"{folder}.lock"):
        if is_built(folder):
            return False
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            build(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return True
