"""Keeps what a benchmark measured, with data, command, machine and versions, in `benchmarks/results/`."""

import os
import platform
import re
import shlex
import sys
from datetime import date
from pathlib import Path

import psutil
import torch
import torchvision

from skin_resnet.training.device import is_bf16_fast

FOLDER = Path(__file__).parent / "results"


def keep(name: str, text: str, *, data: str | Path) -> None:
    """Print a result in Markdown and write it to `results/NAME-DATA.md`, or `NAME-DATA-GPU.md` beside a GPU.

    So figures of other data, or of another kind of machine, are not overwritten. `data` is a folder, of which
    only the name is kept, or a word for what was measured on instead.
    """
    FOLDER.mkdir(exist_ok=True)
    measured = [Path(os.path.abspath(data)).name, *name_gpu()]
    slug = re.sub(r"[^a-z0-9]+", "-", " ".join([name, *measured]).lower()).strip("-")
    intro = f"`{describe_command(name)}`, {date.today()}, {describe_machine()}."
    page = f"# {name}: {', '.join(measured)}\n\n{intro}\n\n{text}\n"
    (FOLDER / f"{slug}.md").write_text(page)
    print(page)


def name_gpu() -> list[str]:
    """Return the short name of the GPU, such as H100, if there is one."""
    if not torch.cuda.is_available():
        return []
    name = torch.cuda.get_device_name()
    found = re.search(r"\w*\d\w*", name)
    return [found.group() if found else name]


def describe_command(name: str) -> str:
    """Return the command line, without the paths of this machine and without a database's password."""
    words = [
        "STORAGE" if "://" in word else "FOLDER" if "/" in word or Path(word).is_dir() else word
        for word in sys.argv[1:]
    ]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *words])


def describe_machine() -> str:
    """Return processor, GPU and versions in a line."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    units = "with" if is_bf16_fast("cpu") else "without"
    parts = [
        f"{model.group(1) if model else platform.machine()} ({psutil.cpu_count(logical=False)} cores, "
        f"{os.cpu_count()} threads, {units} bf16 units)"
    ]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    return ", ".join([*parts, *(f"{name} {version}" for name, version in versions.items())])
