"""Where a result comes from, as a run records it: code, versions, hardware, data and split."""

import importlib.metadata
import platform
import subprocess
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mlflow.data.pandas_dataset import PandasDataset, from_pandas

import skin_resnet
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.page import format_leakage
from skin_resnet.training.run import TrainStart

_PACKAGES = (
    "torch",
    "torchvision",
    "mlflow",
    "lightning-fabric",
    "numpy",
    "pandas",
    "pillow",
    "scikit-learn",
)


def read_versions() -> dict[str, str]:
    """Return tags with the commit of the code and the versions of what it uses."""
    return {
        **_read_commit(),
        **{f"version.{package}": importlib.metadata.version(package) for package in _PACKAGES},
        "version.python": platform.python_version(),
    }


def _read_commit() -> dict[str, str]:
    """Return the commit of the code and whether it has been changed since; nothing outside a checkout."""
    folder = Path(skin_resnet.__file__).parent

    def ask_git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {
            "git.commit": ask_git("rev-parse", "HEAD"),
            "git.dirty": str(bool(ask_git("status", "--porcelain", "--", str(folder)))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def describe_start(start: TrainStart) -> dict[str, Any]:
    """Return tags with what a training runs on, what it starts from, and its data and split."""
    data, device = start.data, start.device
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine()
    tags = {
        "device": f"{device.type} ({name})",
        "precision": start.precision,
        "threads": torch.get_num_threads(),
        "image_size": data.store.image_size,
        "start": start.weights,
        "data.fingerprint": start.fingerprint,
        "split.hash": data.split.hash,
        "split.leaks": str(data.leakage.leaks).lower(),
        **{f"split.{name}": f"{len(getattr(data.split, name))} images" for name in SPLITS},
    }
    return tags | ({"skipped_images": len(data.store.skipped)} if data.store.skipped else {})


def list_data_files(data: PreparedData) -> dict[str, Any]:
    """Return split, class counts, leakage report and skipped images, by artifact path."""
    files = {
        "data/split.csv": data.split.to_frame(),
        "data/class_counts.csv": data.leakage.class_counts.reset_index(),
        "data/leakage.json": data.leakage.to_dict(),
        "data/leakage.md": format_leakage(data.leakage),
    }
    return files | ({"data/skipped_images.json": data.store.skipped} if data.store.skipped else {})


def build_datasets(data: PreparedData, source: str) -> Iterator[tuple[str, PandasDataset]]:
    """Build each split's MLflow data set, without the diagnoses of test."""
    columns = ["image_id", "lesion_id", "dx", "age", "sex", "localization"]
    for name in SPLITS:
        rows = data.select(getattr(data.split, name))[columns].astype({"dx": str})
        is_test = name == "test"
        with warnings.catch_warnings():
            # About integer columns, and about which of two classes of sources is taken.
            warnings.simplefilter("ignore")
            yield name, from_pandas(
                rows.drop(columns="dx") if is_test else rows, source=source,
                name=Path(source).name, targets=None if is_test else "dx",
            )  # fmt: skip
