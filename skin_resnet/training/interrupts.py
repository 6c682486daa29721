"""Signals to end a process: recorded at once, handled where nothing is left half done."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

# The last two are Slurm's warning before a job's time limit, where `--signal` sets one.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
NUMBERS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class _Noted:
    """The signal that came, and whether it may interrupt: one for the process, as signals are."""

    number: int | None = None
    at_s = 0.0
    repeats_after_s = 0.0
    waits_for_check = False


@contextlib.contextmanager
def handled(repeats_after_s: float = 1.0) -> Iterator[None]:
    """Handle SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 in this block.

    The first raises KeyboardInterrupt with the signal's number, or within `deferred` waits for `check`. A
    second one ends the process at once with exit code 128 + n, but not within `repeats_after_s` of the first:
    Ctrl-C reaches `mlflow run` as well, which then sends SIGTERM.
    """
    _Noted.repeats_after_s = repeats_after_s
    # SIGINT too, which background jobs of a shell script start with ignored.
    before = {number: signal.signal(number, _note) for number in NUMBERS}
    try:
        yield
    finally:
        _Noted.number = None
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore() -> None:
    """Ignore these signals from now on."""
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, frame: FrameType | None) -> None:
    now = time.monotonic()
    if _Noted.number is None:
        _Noted.number, _Noted.at_s = number, now
        if not _Noted.waits_for_check:
            raise KeyboardInterrupt(number)
        text = f"\n{signal.Signals(number).name}: saving and stopping; repeat to stop at once\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())  # not print, which may have been interrupted itself
    elif now - _Noted.at_s > _Noted.repeats_after_s:
        os._exit(128 + number)  # nothing is saved: what was saved before is whole


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Defer signals in this block until `check` is called.

    An exception raised by a signal handler can surface anywhere, even where Python drops it (in a `__del__`,
    or in a callback from C), and the signal with it; or between two writes that belong together.
    """
    before, _Noted.waits_for_check = _Noted.waits_for_check, True
    try:
        yield
    finally:
        _Noted.waits_for_check = before


def is_requested() -> bool:
    """Return whether a signal to end the process came."""
    return _Noted.number is not None


def check() -> None:
    """Raise KeyboardInterrupt with the signal's number if one came."""
    if _Noted.number is not None:
        raise KeyboardInterrupt(_Noted.number)
