"""What the doctor finds out about the machine and the packages installed on it."""

import importlib.metadata
import os
import platform
import re
import sys
import tomllib
import warnings
from dataclasses import dataclass
from pathlib import Path

_SHOWN = ("torch", "torchvision", "lightning-fabric", "mlflow", "optuna")
_ENOUGH_MEMORY = 2**30  # importing torch and MLflow takes half of it
INSTALL = "run `make setup`, or `python -m pip install -r requirements.lock`"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A line on the doctor's screen, and what is wrong there: the rule, the value found, what to do."""

    topic: str
    text: str
    problems: tuple[str, ...] = ()


def format_bytes(count: float) -> str:
    """Write a number of bytes as GB or MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def describe_error(error: BaseException) -> str:
    """Tell an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def check_python() -> Finding:
    """Tell the interpreter and the cores it may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = f"{allowed} of {os.cpu_count()} cores" if allowed != os.cpu_count() else f"{allowed} cores"
    problem = f"Python must be 3.11 or newer, but is {platform.python_version()}; {INSTALL} with a newer one."
    return Finding(
        topic="python",
        text=f"{platform.python_version()} on {platform.system()}, {cores}, {sys.executable}",
        problems=(problem,) if sys.version_info < (3, 11) else (),
    )


def check_packages(root: Path) -> Finding:
    """Compare what is installed with pyproject.toml's ranges, which must hold, and the pins of the lock."""
    from packaging.requirements import Requirement  # MLflow brings it, so it may be missing

    texts = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wrong = []
    for text in texts:
        requirement = Requirement(text)
        found = _find_version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{text} ({found or 'not installed'})")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    problem = (
        f"packages must be as pyproject.toml says, but are not: {', '.join(wrong[:3])}{more}; {INSTALL}."
    )
    versions = ", ".join(f"{name} {_find_version(name) or 'not installed'}" for name in _SHOWN)
    text = f"{versions}; {_compare_pins(root)}"
    return Finding(topic="packages", text=text, problems=(problem,) if wrong else ())


def _find_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _compare_pins(root: Path) -> str:
    from packaging.requirements import Requirement
    from packaging.version import Version

    lock = root / "requirements.lock"
    if not lock.is_file():
        return "no requirements.lock to compare with"
    others = []
    for pin in map(Requirement, filter(None, lock.read_text(encoding="utf-8").splitlines())):
        found = _find_version(pin.name)
        # Without +cpu, +cu130 and the like: the same release, built for another device.
        if found and (not pin.marker or pin.marker.evaluate()) and Version(found).public not in pin.specifier:
            others.append(f"{pin.name} {found} (there {str(pin.specifier).removeprefix('==')})")
    if not others:
        return "as in requirements.lock"
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"not as in requirements.lock: {', '.join(others[:3])}{more}"


def check_memory() -> Finding:
    """Tell the memory that is free, within the limit of a container where there is one."""
    import psutil

    memory = psutil.virtual_memory()
    total, available, limit = memory.total, memory.available, ""
    cgroup = Path("/sys/fs/cgroup")
    try:
        allowed = int((cgroup / "memory.max").read_text())  # "max", a ValueError, where there is no limit
        if allowed < total:
            used = int((cgroup / "memory.current").read_text())
            total, available, limit = allowed, min(available, allowed - used), ", this container's limit"
    except (OSError, ValueError):
        pass
    problem = f"1 GB of memory at least must be free, but {format_bytes(available)} is; end other programs."
    return Finding(
        topic="memory",
        text=f"{format_bytes(available)} free of {format_bytes(total)}{limit}",
        problems=(problem,) if available < _ENOUGH_MEMORY else (),
    )


def check_device() -> Finding:
    """Tell what `device=auto` trains on; a GPU that torch cannot use is a problem."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_cuda = torch.cuda.is_available()
    if has_cuda:
        return _check_gpus()
    if torch.backends.mps.is_available():
        return Finding(topic="device", text=f"mps ({_read_cpu()[0]}), fp32")
    name, has_bf16 = _read_cpu()
    text = f"cpu ({name}), {torch.get_num_threads()} threads, fp32; bf16 units: {'yes' if has_bf16 else 'no'}"
    gpus, complaint = _ask_driver()
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in {"", "-1"}:
        return Finding(topic="device", text=f"{text}; CUDA_VISIBLE_DEVICES hides any GPU")
    if not gpus and not complaint:
        return Finding(topic="device", text=text)
    if torch.version.cuda is None and torch.version.hip is None:
        reason, remedy = f"torch {torch.__version__} is built without CUDA", "install a build with CUDA"
    else:
        told = str(caught[-1].message).split(" (Triggered")[0] if caught else "torch does not tell why"
        reason = complaint or re.sub(r"\s+", " ", told).split(". ")[0]
        remedy = (
            f"see whether nvidia-smi works; reboot, or update the driver to one for CUDA {torch.version.cuda}"
        )
    seen = f"the driver's {', '.join(gpus)}" if gpus else "the NVIDIA GPU"
    problem = f"torch must be able to use {seen}, but trains on the CPU: {reason.rstrip('.')}; {remedy}."
    return Finding(topic="device", text=text, problems=(problem,))


def _check_gpus() -> Finding:
    import torch

    texts, problems = [], []
    for number in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(number)
        try:
            # What a torch built for other GPUs fails at: it has no kernels for this one.
            torch.ones(2, device=f"cuda:{number}").sum().item()
            free, total = torch.cuda.mem_get_info(number)
            texts.append(f"{name}, {format_bytes(free)} free of {format_bytes(total)}")
        except RuntimeError as error:
            texts.append(name)
            problems.append(
                f"GPU {number} must compute, but {describe_error(error)}; end what else uses it, or hide it "
                "with CUDA_VISIBLE_DEVICES."
            )
    precision = "bf16" if not problems and torch.cuda.is_bf16_supported() else "fp32"
    texts = [f"{texts[0]}, and {len(texts) - 1} more"] if len(texts) > 2 else texts
    return Finding(
        topic="device",
        text=f"cuda {torch.version.cuda or torch.version.hip} ({'; '.join(texts)}), {precision}",
        problems=tuple(problems),
    )


def _ask_driver() -> tuple[list[str], str]:
    """Ask the NVIDIA driver, without torch, for the GPUs it sees, and for its complaint if it fails."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles], ""
    except ImportError:
        return [], ""  # told among the packages
    except pynvml.NVMLError as error:
        # Without a driver there is nothing to complain about, unless there is a GPU.
        has_gpu = Path("/dev/nvidia0").exists()
        absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return [], "" if error.value in absent and not has_gpu else f"the driver says {error}"


def _read_cpu() -> tuple[str, bool]:
    """Give the CPU's name, and whether it has units for bf16, as far as Linux tells."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    name = re.search(r"model name\s*: (.+)", text)
    return (
        name[1] if name else platform.processor() or platform.machine(),
        bool(re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", text)),
    )
