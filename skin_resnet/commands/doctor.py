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
from skin_resnet.commands.config import DoctorConfig
from skin_resnet.errors import UserError, expand_cache

_SHOWN = ("torch", "torchvision", "lightning-fabric", "mlflow", "optuna")
_MIN_FREE_GB = 2.0  # the decoded images and the checkpoints of one training


def doctor(config: DoctorConfig) -> int:
    """Print what each check finds; return the exit code: 0 if there is no problem, else 1."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it would write an id into the home folder
    checks = {
        "python": describe_python,
        "packages": check_packages,
        "device": check_device,
        "disk": lambda: ", ".join(check_disk(name, folder) for name, folder in config),
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
    """Return the interpreter's version and place."""
    return f"{platform.python_version()} on {platform.system()}, {os.cpu_count()} cores, {sys.executable}"


def check_packages() -> str:
    """Return the versions of the main packages; a required one that is missing or too old is a UserError."""
    from packaging.requirements import Requirement  # comes with MLflow, so it may be missing

    wrong = []
    for requirement in map(Requirement, read_requirements()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        if version == "not installed" or not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} ({version})")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}; run `make setup`, or `python -m pip install -r requirements.lock`"
        )
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _SHOWN)


def read_requirements() -> list[str]:
    """Return what this package requires: from its checkout, or from its metadata if it is installed."""
    project = Path(skin_resnet.__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return importlib.metadata.requires("skin-resnet") or []


def check_device() -> str:
    """Return what `device=auto` trains on; a GPU that torch cannot use is a UserError."""
    import torch

    if torch.cuda.is_available():
        gpus = []
        for number in range(torch.cuda.device_count()):
            torch.ones(2, device=f"cuda:{number}").sum().item()  # fails if torch was built for other GPUs
            free, total = (f"{count / 1e9:.1f} GB" for count in torch.cuda.mem_get_info(number))
            gpus.append(f"{torch.cuda.get_device_name(number)} ({free} free of {total})")
        return f"CUDA {torch.version.cuda}: {', '.join(gpus)}"
    if torch.backends.mps.is_available():
        return "Apple MPS"
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}
    if not is_hidden and has_nvidia_gpu():
        fix = f"update its driver to one for CUDA {torch.version.cuda}"
        raise UserError(
            f"torch {torch.__version__} would train on the CPU: it cannot use the NVIDIA GPU; "
            f"{fix if torch.version.cuda else 'install torch with CUDA'}"
        )
    return f"CPU, {torch.get_num_threads()} threads{', GPUs hidden by CUDA_VISIBLE_DEVICES' * is_hidden}"


def has_nvidia_gpu() -> bool:
    """Return whether the driver sees a GPU, without torch."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount()) > 0
    except pynvml.NVMLError:  # no driver, or a broken one
        return Path("/dev/nvidia0").exists()


def check_disk(option: str, folder: Path) -> str:
    """Return the free space for a folder; a UserError if it is full or cannot be written to."""
    place = (expand_cache(folder) if option == "cache_dir" else folder.expanduser()).absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{option}={folder} is not a writable folder; choose another")
    free_gb = shutil.disk_usage(place).free / 1e9
    text = f"{free_gb:.1f} GB free for {option}"
    if free_gb < _MIN_FREE_GB:
        raise UserError(f"{text}; {_MIN_FREE_GB} GB are needed")
    return text


def check_tracking() -> str:
    """Return where runs are tracked; a store that cannot be used is a UserError."""
    from skin_resnet.tracking.store import check_store

    return check_store()
