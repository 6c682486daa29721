"""How long a training takes from its command to its first step: `python -m benchmarks.start`.

Starts `mlflow run` and `skin-resnet train` on the demo data in a terminal of their own, and waits
until the bar of epoch 1 counts its first batch. The first start writes and decodes the demo's images, and
creates the tracking database; the others find both.
"""

import contextlib
import os
import pty
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

from benchmarks.results import keep
from skin_resnet.evaluation.page import format_table

ROOT = Path(__file__).parent.parent
FIRST_BATCH = re.compile(rb"epoch 1/.*\| *[1-9][0-9.]*[kM]?/")
TIMES = 5


def measure(command: list[str], folder: Path) -> float:
    """Return the seconds from a command's start to the end of its first training step, and end it."""
    bin_folder = Path(sys.executable).parent
    environment = {
        **os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
    }  # fmt: skip
    terminal, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=inner, stdout=inner, stderr=inner, start_new_session=True
    )
    os.close(inner)
    output = b""
    try:
        while not FIRST_BATCH.search(output):
            try:
                output += os.read(terminal, 4096)
            except OSError:  # the command has ended
                raise SystemExit(output.decode()) from None
        return time.perf_counter() - start
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(OSError):
            while os.read(
                terminal, 4096
            ):  # until the training, which `mlflow run` has started, has ended too
                pass
        process.wait()
        os.close(terminal)


def measure_exit(code: int, *arguments: str) -> float:
    """Return the seconds that the command line takes to end by itself with an exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    command = [sys.executable, "-m", "skin_resnet", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, check=False)
    seconds = time.perf_counter() - start
    assert done.returncode == code, done.stderr
    return seconds


def main() -> None:
    """Measure and keep the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = {"image_size": 64, "cache_dir": folder / "cache", "checkpoint_dir": folder / "checkpoints"}
        typed = [part for option, value in options.items() for part in ("-P", f"{option}={value}")]
        project = ["mlflow", "run", str(ROOT), "--env-manager=local", *typed]
        own = [f"--{option}={value}" for option, value in options.items()]
        direct = [sys.executable, "-m", "skin_resnet", "train", *own]
        first = measure(project, folder)
        seconds = {
            "first step of `mlflow run . --env-manager=local`": [
                measure(project, folder) for _ in range(TIMES)
            ],
            "first step of `skin-resnet train`": [measure(direct, folder) for _ in range(TIMES)],
            "`skin-resnet train --help`": [measure_exit(0, "train", "--help") for _ in range(TIMES)],
            "`skin-resnet train --learning_rate 1`, an error": [
                measure_exit(2, "train", "--learning_rate", "1") for _ in range(TIMES)
            ],
        }
    rows = [["first `mlflow run`, images and database yet to be made", f"{first:.2f}", ""]]
    for title, taken in seconds.items():
        rows.append([title, f"{statistics.median(taken):.2f}", f"{min(taken):.2f} to {max(taken):.2f}"])
    keep("start", format_table(["", "seconds", f"of {TIMES}"], rows), data="demo")


if __name__ == "__main__":
    main()
