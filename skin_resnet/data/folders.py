"""File locks that the operating system releases when their owner dies."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: there, silence alone tells whether a writer is dead
    fcntl = None  # type: ignore[assignment]


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
