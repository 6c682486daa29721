"""What a training records: its epochs, also while the tracking store is away, and where they come from."""

import importlib.metadata
import math
import platform
import subprocess
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from mlflow.entities import Metric

import skin_resnet
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.page import format_leakage
from skin_resnet.tracking.store import OUTAGES, describe_uri
from skin_resnet.training.engine import EpochResult
from skin_resnet.training.run import TrainStart

_WAIT_S = 60.0
_RETRY_S = 2.0
_PACKAGES = "torch torchvision mlflow lightning-fabric numpy pandas pillow scikit-learn".split()


class EpochLog:
    """Logs each epoch's metrics on a run, at the step of its number.

    What the store does not accept is buffered, and logged before the next epoch is. A killed process loses
    nothing: the next one is given the history in the checkpoint and logs all of it again. To MLflow, the same
    value with the same step and timestamp is the same metric.
    """

    def __init__(self, run_id: str, history: Iterable[EpochResult] = ()) -> None:
        self._run_id = run_id
        self._pending = list(history)
        self._is_away = False

    def write(self, result: EpochResult) -> None:
        """Log an epoch after those still pending, or buffer it."""
        self._pending.append(result)
        self._try_to_flush()

    def finish(self) -> None:
        """Log all that is pending; wait up to a minute for a store that is away, then raise its error."""
        deadline = time.monotonic() + _WAIT_S
        while not self._try_to_flush():
            if time.monotonic() > deadline:
                self._flush()
            time.sleep(_RETRY_S)

    def _try_to_flush(self) -> bool:
        try:
            self._flush()
        except OUTAGES:
            if not self._is_away:
                print(f"MLflow unreachable at {describe_uri()}; buffering metrics")
            self._is_away = True
            return False
        if self._is_away:
            print("MLflow reachable again; all buffered metrics are logged")
        self._is_away = False
        return True

    def _flush(self) -> None:
        while self._pending:
            result = self._pending[0]
            # With a fourth train metric, MLflow would show val's curves on the second screen.
            metrics = {name: v for name, v in result.to_metrics().items() if name != "train/macro_auc"}
            _log(self._run_id, metrics, result.timestamp_ms, result.epoch)
            del self._pending[0]


def log_best(run_id: str, result: EpochResult, final_gap: float) -> None:
    """Log the best epoch's metrics, and the final gap, under names of their own, for tables of runs."""
    metrics = {
        "best_epoch": float(result.epoch),
        "final_gap": final_gap,
        "best_val_balanced_accuracy": result.val.balanced_accuracy,
        "best_val_macro_auc": result.val.macro_auc,
    }
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    _log(run_id, finite, result.timestamp_ms, 0)


def _log(run_id: str, values: dict[str, float], timestamp_ms: int, step: int) -> None:
    metrics = [Metric(name, value, timestamp_ms, step) for name, value in values.items()]
    mlflow.MlflowClient().log_batch(run_id, metrics=metrics)


def read_versions() -> dict[str, str]:
    """Return tags with the commit of the code and the versions of what it uses."""
    return {
        **_read_commit(),
        **{f"version.{package}": importlib.metadata.version(package) for package in _PACKAGES},
        "version.python": platform.python_version(),
    }


def _read_commit() -> dict[str, str]:
    """Return the commit of the code and whether it has been changed since; nothing outside a checkout."""
    folder = str(Path(skin_resnet.__file__).parent)

    def run_git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = run_git("status", "--porcelain", "--", folder)
        return {"git.commit": run_git("rev-parse", "HEAD"), "git.dirty": str(bool(changes)).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def name_training(start: TrainStart) -> str:
    """Return what a training is, in a few words: `resnet50 · ham10000 · 64 px · seed 0`."""
    config = start.point.config
    return f"{config.arch} · {Path(config.data).stem} · {start.data.store.image_size} px · seed {config.seed}"


def describe_start(start: TrainStart) -> dict[str, Any]:
    """Return tags with what a training runs on, what it starts from, and its data and split."""
    data, device = start.data, start.fabric.device
    is_cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_cuda else platform.processor() or platform.machine()
    tags = {
        "device": f"{device.type} ({name})",
        "precision": start.fabric.strategy.precision.precision,
        "threads": torch.get_num_threads(),
        "image_size": data.store.image_size,
        "start": start.weights,
        "data.fingerprint": data.fingerprint,
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
    columns = ["image_id", "lesion_id", "age", "sex", "localization"]
    for name in SPLITS:
        targets = None if name == "test" else "dx"
        rows = data.select(getattr(data.split, name)).astype({"dx": str})
        rows = rows[[*columns, targets] if targets else columns]
        with warnings.catch_warnings():
            # About integer columns, and about which of two classes of sources is taken.
            warnings.simplefilter("ignore")
            yield name, from_pandas(rows, source=source, name=Path(source).name, targets=targets)
