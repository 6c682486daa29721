"""The command doctor: check the packages, the device, the disks and the tracking store; create nothing."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tomllib
import warnings
from pathlib import Path

import skin_resnet
from skin_resnet.config import DoctorConfig
from skin_resnet.errors import UserError

_SHOWN = ("torch", "torchvision", "lightning-fabric", "mlflow", "optuna")
_MIN_FREE_BYTES = 2_000_000_000  # the decoded images and the checkpoints of one training


def doctor(config: DoctorConfig) -> int:
    """Print what each check finds; return the exit code: 0 if there is no problem, else 1."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would write an id into the home folder
    checks = {
        "python": describe_python,
        "packages": check_packages,
        "device": check_device,
        "disk": lambda: check_disk({"cache_dir": config.cache_dir, "checkpoint_dir": config.checkpoint_dir}),
        "tracking": check_tracking,
    }
    problems = 0
    for topic, check in checks.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                text = check()
        except Exception as error:  # what is broken here breaks in ways that nobody can list
            problems += 1
            name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            text = f"PROBLEM: {name}{' '.join(str(error).split())}"
        # As they are found: importing torch and MLflow takes seconds.
        print(f"{topic:10}{text}", flush=True)
    print(f"problems found: {problems}" if problems else "no problems found")
    return min(problems, 1)


def describe_python() -> str:
    """Return the interpreter's version and place, and the number of cores it may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.python_version()} on {platform.system()}, {cores} cores, {sys.executable}"


def check_packages() -> str:
    """Return the versions of the main packages; a required one that is missing or too old is a UserError."""
    from packaging.requirements import Requirement  # comes with MLflow, so it may be missing

    wrong = []
    for requirement in map(Requirement, read_requirements()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _find_version(requirement.name)
        if not version or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} ({version or 'not installed'})")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}; run `make setup`, or `python -m pip install -r requirements.lock`"
        )
    return ", ".join(f"{name} {_find_version(name)}" for name in _SHOWN)


def read_requirements() -> list[str]:
    """Return what this package requires: from its checkout, or from its metadata if it is installed."""
    project = Path(skin_resnet.__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return importlib.metadata.requires("skin-resnet") or []


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_device() -> str:
    """Return what `device=auto` trains on; a GPU that torch cannot use is a UserError."""
    import torch

    if torch.cuda.is_available():
        gpus = []
        for number in range(torch.cuda.device_count()):
            torch.ones(2, device=f"cuda:{number}").sum().item()  # fails if torch was built for other GPUs
            free, total = (format_bytes(count) for count in torch.cuda.mem_get_info(number))
            gpus.append(f"{torch.cuda.get_device_name(number)} ({free} free of {total})")
        return f"CUDA {torch.version.cuda}: {', '.join(gpus)}"
    if torch.backends.mps.is_available():
        return "Apple MPS"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}
    if not is_hidden and count_gpus():
        cuda = torch.version.cuda
        fix = (
            f"run nvidia-smi, and update the driver to one for CUDA {cuda}"
            if cuda
            else "install it with CUDA"
        )
        raise UserError(
            f"torch {torch.__version__} would train on the CPU: it cannot use the NVIDIA GPU; {fix}"
        )
    return f"CPU, {torch.get_num_threads()} threads{', GPUs hidden by CUDA_VISIBLE_DEVICES' * is_hidden}"


def count_gpus() -> int:
    """Return how many NVIDIA GPUs the driver sees, without torch."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:  # no driver, or a broken one
        return int(Path("/dev/nvidia0").exists())


def check_disk(folders: dict[str, Path]) -> str:
    """Return the free space for each folder by its option; one that is full or read-only is a UserError."""
    texts, problems = [], []
    for option, folder in folders.items():
        place = Path(os.path.expanduser(folder)).absolute()
        while not os.path.lexists(place):
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            problems.append(f"{option}={folder} is not a writable folder; choose another")
            continue
        free = shutil.disk_usage(place).free
        texts.append(f"{format_bytes(free)} free for {option}")
        if free < _MIN_FREE_BYTES:
            problems.append(f"{texts[-1]}; {format_bytes(_MIN_FREE_BYTES)} are needed")
    if problems:
        raise UserError("; ".join(problems))
    return ", ".join(texts)


def check_tracking() -> str:
    """Return where runs are tracked; a store that cannot be used is a UserError."""
    from skin_resnet.tracking.store import check_store

    return check_store()


def format_bytes(count: float) -> str:
    """Return a number of bytes as GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
