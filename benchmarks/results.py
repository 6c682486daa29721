"""Keeps what a benchmark measured, with the machine and the versions, in `benchmarks/results/`."""

import os
import platform
import re
from datetime import date
from pathlib import Path

import torch
import torchvision

FOLDER = Path(__file__).parent / "results"


def keep(name: str, text: str) -> None:
    """Print a result in Markdown and write it to `results/NAME.md`."""
    FOLDER.mkdir(exist_ok=True)
    page = f"# {name}\n\n`python -m benchmarks.{name}`, {date.today()}, {describe_machine()}.\n\n{text}\n"
    (FOLDER / f"{name}.md").write_text(page)
    print(page)


def describe_machine() -> str:
    """Return processor, GPU and versions in a line."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    parts = [f"{model.group(1) if model else platform.machine()} ({os.cpu_count()} logical CPUs)"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    return ", ".join([*parts, *(f"{name} {version}" for name, version in versions.items())])
