"""Folders that are whole or not there, what their killed writers left, and whether one can be written."""

import contextlib
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, silence alone tells whether a writer is dead
    fcntl = None  # type: ignore[assignment]

_LEFTOVER_AGE_S = 3600.0
# What `name_aside` gives and hardly anything else: the folder may hold a user's own things, too.
_ASIDE = f"*.{32 * '[0-9a-f]'}.tmp"


def name_aside(folder: Path) -> Path:
    """Give a name beside `folder` that nobody else has."""
    return folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def write_aside(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes `folder` when the block is done, and vanishes when it fails.

    Where another process has made the same `folder` meanwhile, that one stays, and no error is raised.
    """
    aside = name_aside(folder)
    aside.mkdir(parents=True)
    try:
        # Held while writing: the operating system lets go of it when this process dies, however it dies.
        with hold_lock(aside):
            yield aside
            aside.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def find_leftovers(parent: Path) -> list[Path]:
    """List what killed writers left in `parent`: what nobody holds and where nothing was written for an hour.

    Neither sign is enough. Not every file system has locks, and on some they hold on one machine only; and a
    machine that was asleep, or whose clock is set, makes a living writer look silent.
    """
    leftovers = []
    for aside in parent.glob(_ASIDE):
        with contextlib.suppress(OSError):  # its owner or another process may be removing it
            written = max(path.stat().st_mtime for path in (aside, *aside.iterdir()))
            if time.time() - written > _LEFTOVER_AGE_S and not is_held(aside):
                leftovers.append(aside)
    return leftovers


def remove_leftovers(parent: Path) -> None:
    """Remove what killed writers left in `parent`."""
    for leftover in find_leftovers(parent):
        shutil.rmtree(leftover, ignore_errors=True)


def explain_unwritable(folder: Path) -> str | None:
    """Say what keeps one from writing into a folder, made first if need be; None if nothing does.

    Nothing is made or written to find out.
    """
    existing = find_existing(folder)
    if not existing.is_dir():
        return f"{existing} is no folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written"
    return None


def find_existing(path: Path) -> Path:
    """Give the path, or the nearest of its parents that exists; a link to nowhere counts as there."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))


@contextlib.contextmanager
def lock_file(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock that one process at a time can have, made of a file; give whether it was to be had.

    The operating system lets go of it when the process dies, however it dies.

    Args:
        path: The file; it is made, and stays.
        wait: For whoever holds it.

    Raises:
        OSError: The file cannot be made, or the file system or the system has no locks.
    """
    with path.open("a") as file:
        if fcntl is None:
            raise OSError("this system has no file locks")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextlib.contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Show other processes that a file or folder has an owner who lives."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Say whether a living process holds the lock; no where the file system has no locks."""
    if fcntl is None:
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
