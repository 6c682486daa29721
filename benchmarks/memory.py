"""Memory over epochs and over trials: `python -m benchmarks.memory [DATA] [--option VALUE ...]`.

Trains for 20 epochs and searches with 20 trials of two epochs, and each time that it says that an epoch or a
trial is done, reads the most resident memory that the process and those it started have had so far (Linux).
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from benchmarks.results import keep
from skin_resnet.evaluation.page import format_table

SHOWN = (1, 2, 5, 10, 20)


def follow(command: list[str], pattern: str, folder: str) -> dict[int, float]:
    """Run a command of the package in a folder; return its peak memory in MB at each line with a number."""
    found: dict[int, float] = {}
    peaks: dict[int, float] = {}
    full = [sys.executable, "-u", "-m", "skin_resnet", *command]
    with subprocess.Popen(full, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(pattern, line):
                parent = psutil.Process(process.pid)
                family = [parent, *parent.children(recursive=True)]
                # A process that is ending has no memory any more.
                peaks |= {each.pid: read_peak(each.pid) or peaks.get(each.pid, 0) for each in family}
                found[int(match[1])] = sum(peaks.values())
    assert process.returncode == 0, f"{' '.join(full)} failed"
    return found


def read_peak(pid: int) -> float:
    """Return the most resident memory that a process has had, in MB."""
    found = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return sum(map(int, found)) * 1.024e-3


def main() -> None:
    """Measure both and keep the table."""
    options = ["--data", "demo"] if len(sys.argv) == 1 else ["--data", *sys.argv[1:]]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        options += ["--checkpoint_dir", f"{folder}/checkpoints", "--weights", "none", "--test", "never"]
        train = follow(["train", *options, "--epochs", "20"], r"epoch (\d+)/", folder)
        search = ["search", *options, "--epochs", "2", "--n_trials", "20", "--seeds", "0", "--pruner", "none"]
        trials = follow(search, r"(\d+)/20 trial", folder)
    for name, found in (("epochs", train), ("trials", trials)):
        rows.append([name, *(f"{found[n]:.0f}" for n in SHOWN), f"{found[20] / found[2]:.2f}x"])
    header = ["peak MB after", *map(str, SHOWN), "20th / 2nd"]
    keep("memory", format_table(header, rows), data=options[1])


if __name__ == "__main__":
    main()
