"""Signals that ask a process to end: noted at once, heeded where nothing is left half done."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
# Ctrl-C reaches `mlflow run` as well, which then sends SIGTERM: that is the same wish, not a second one.
_SAME_WISH_S = 1.0


class _Noted:
    """What came, and whether it may interrupt: a process's signals are its own, so there is one of these."""

    number: int | None = None
    at_s = 0.0
    waits_for_check = False


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP in this block.

    The first raises KeyboardInterrupt with the signal's number, or within `deferred` waits for `check`. A
    second one ends the process at once with exit code 128 + n.
    """
    # SIGINT too, which a shell script's background jobs begin with ignored, and a closed terminal's.
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.signal(number, _note) for number in numbers}
    try:
        yield
    finally:
        _Noted.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Noted.number is None:
        _Noted.number, _Noted.at_s = number, now
        if not _Noted.waits_for_check:
            raise KeyboardInterrupt(number)
        # Not print: it may have been interrupted itself.
        os.write(2, f"\n{signal.Signals(number).name}: ending; once more to stop at once\n".encode())
    elif now - _Noted.at_s > _SAME_WISH_S:
        os._exit(128 + number)  # nothing is saved: what was saved before is whole


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let signals wait in this block until `check` is called.

    An exception raised by a signal handler can surface anywhere, even where Python drops it (in a `__del__`,
    or in a callback from C), and the signal with it; or between two writes that belong together.
    """
    _Noted.waits_for_check = True
    try:
        yield
    finally:
        _Noted.waits_for_check = False


def is_asked() -> bool:
    """Say whether the process has been asked to end."""
    return _Noted.number is not None


def check() -> None:
    """Heed a signal that came.

    Raises:
        KeyboardInterrupt: One did; it holds the signal's number.
    """
    if _Noted.number is not None:
        raise KeyboardInterrupt(_Noted.number)
