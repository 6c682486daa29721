"""What a run records before it trains: its data and split, its code and versions, what it runs on."""

import importlib.metadata
import platform
import subprocess
import warnings
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.data.pandas_dataset import from_pandas

import skin_resnet
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS

_VERSIONS = (
    "torch",
    "torchvision",
    "mlflow",
    "lightning-fabric",
    "numpy",
    "pandas",
    "pillow",
    "scikit-learn",
)


def log_setting(data: PreparedData, device: torch.device, precision: str, start: str) -> None:
    """Log what the network runs on and starts from.

    Args:
        data: Whose image size `auto` was resolved to, and whose skipped images are listed.
        device: That the network trains on.
        precision: Fabric's name of it.
        start: What `load_weights` said.
    """
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    mlflow.set_tags(
        {
            "device": f"{device.type} ({name})",
            "precision": precision,
            "threads": torch.get_num_threads(),
            "image_size": data.store.image_size,
            "start": start,
        }
    )
    if data.store.skipped:
        mlflow.set_tag("skipped_images", len(data.store.skipped))
        mlflow.log_dict(data.store.skipped, "data/skipped_images.json")


def log_model_tested(checkpoint: dict[str, Any]) -> None:
    """Log which network an evaluation tests."""
    mlflow.set_tags(
        {
            "model.run_id": checkpoint["run_id"],
            "model.arch": checkpoint["arch"],
            "model.epoch": checkpoint["epoch"],
            "split.leaks": str(checkpoint["leaks"]).lower(),
        }
    )


def log_versions() -> None:
    """Log the versions and the commit of what runs."""
    mlflow.set_tags(_read_versions())


def _read_versions() -> dict[str, str]:
    return {
        **_read_commit(),
        **{f"version.{package}": importlib.metadata.version(package) for package in _VERSIONS},
        "version.python": platform.python_version(),
    }


def _read_commit() -> dict[str, str]:
    """Give the commit of the code that runs, and whether it was changed since; empty outside a checkout."""
    folder = Path(skin_resnet.__file__).parent

    def ask_git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        return {
            "git.commit": ask_git("rev-parse", "HEAD"),
            "git.dirty": str(bool(ask_git("status", "--porcelain", "--", str(folder)))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def log_data(data: PreparedData, source: str, fingerprint: str) -> None:
    """Log the data set, the split as a CSV, and the split's hash and class counts."""
    frame = data.split.to_frame()
    mlflow.log_text(frame.to_csv(index=False), "data/split.csv")
    mlflow.log_text(data.leakage.class_counts.to_csv(), "data/class_counts.csv")
    mlflow.set_tags(
        {
            "split.hash": data.split.hash,
            "data.fingerprint": fingerprint,
            **{f"split.{name}": f"{len(getattr(data.split, name))} images" for name in SPLITS},
        }
    )
    columns = ["image_id", "lesion_id", "dx", "age", "sex", "localization"]
    for name in SPLITS:
        is_sealed = name == "test"
        rows = data.select(getattr(data.split, name))[columns].astype({"dx": str})
        rows = rows.drop(columns="dx") if is_sealed else rows
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # about integer columns, and about which of two source classes it takes
            dataset = from_pandas(
                rows, source=source, name=Path(source).name, targets=None if is_sealed else "dx"
            )
        mlflow.log_input(dataset, context=name)


def log_passport(passport: dict[str, Any], page: str) -> None:
    """Log what the splits share; a leaking split is a tag on the run."""
    mlflow.log_dict(passport, "data/leak_passport.json")
    mlflow.log_text(page, "data/leak_passport.md")
    mlflow.set_tag("split.leaks", str(passport["leaks"]).lower())
