"""A signal is handled at the next check, or at once where nothing waits for one, and it is never lost."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from skin_resnet.training import interrupts

ROOT = Path(__file__).parent.parent
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_waits_for_a_check_it_interrupts_at_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as told, interrupts.handled():
        signal.raise_signal(number)
    assert told.value.args == (number,)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", SIGNALS)
def test_where_one_waits_for_a_check_it_interrupts_there(number: signal.Signals) -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt) as told, interrupts.handled(), interrupts.deferred():  # noqa: PT012
        interrupts.check()
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)  # `mlflow run` sends one after Ctrl-C
        reached.append(interrupts.is_requested())
        interrupts.check()
        reached.append(False)
    assert told.value.args == (number,)
    assert reached == [True]
    assert not interrupts.is_requested(), "the next command of this process is not asked"


def test_one_that_python_drops_is_handled_at_the_next_check() -> None:
    class Dropping:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    dropped = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda args: dropped.append(args.exc_type)
    try:
        with pytest.raises(KeyboardInterrupt), interrupts.handled():  # noqa: PT012
            Dropping()
            assert dropped == [KeyboardInterrupt], "what is raised in a __del__ is dropped"
            interrupts.check()
    finally:
        sys.unraisablehook = hook


@contextmanager
def start(script: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("repeats_after_s", [1, 60])
def test_a_second_one_ends_the_process_at_once_whatever_it_does(repeats_after_s: int) -> None:
    script = (
        "import time; from skin_resnet.training import interrupts\n"
        f"with interrupts.handled({repeats_after_s}), interrupts.deferred():\n"
        "    print('ready')\n"
        "    while True: time.sleep(0.01)\n"
    )
    with start(script) as process:
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.5)
        process.send_signal(signal.SIGTERM)
        if repeats_after_s > 1.5:  # a worker's, whose search ends it, too
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
        else:
            assert process.wait(20) == 128 + signal.SIGTERM
