"""The only module that talks to MLflow: what a run records, and how it ends."""

import importlib.metadata
import logging
import os
import platform
import re
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import torch
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import RunStatus
from numpy.typing import NDArray

import skin_resnet
from skin_resnet.config import FrozenConfig
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import EpochResult
from skin_resnet.tracking import packaged_model

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


@contextmanager
def open_run(description: str) -> Iterator[str]:
    """Open the run that `mlflow run` has begun, or a new one, and give its id.

    However the block is left, the run ends: FINISHED; KILLED where it was interrupted; FAILED, with the
    reason as a tag, on any error.

    Raises:
        UserError: The tracking store cannot be used.
    """
    # Tables being made, the monitor starting and files being copied are no news to whoever trains.
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        run = mlflow.start_run(description=description, log_system_metrics=True)
    except mlflow.MlflowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the run must be tracked, but {mlflow.get_tracking_uri()} does not answer ({reason}); "
            "check MLFLOW_TRACKING_URI."
        ) from None
    try:
        yield run.info.run_id
    except (KeyboardInterrupt, SystemExit):
        log_note("interrupted")
        mlflow.end_run(RunStatus.to_string(RunStatus.KILLED))
        raise
    except BaseException as error:
        log_note(f"failed: {error}")
        mlflow.set_tag("failure", f"{type(error).__name__}: {error}"[:5000])
        mlflow.end_run(RunStatus.to_string(RunStatus.FAILED))
        raise
    mlflow.end_run()


def is_project_run() -> bool:
    """Say whether `mlflow run` started this process, and with it a run."""
    return "MLFLOW_RUN_ID" in os.environ


def get_active_run_id() -> str | None:
    """Give the id of the run that is open in this process."""
    run = mlflow.active_run()
    return run.info.run_id if run else None


def log_params(config: FrozenConfig) -> None:
    """Log every field once: `mlflow run` has logged what was typed, as text, before our code started."""
    run = mlflow.active_run()
    assert run is not None, "params are logged on an open run"
    known = mlflow.MlflowClient().get_run(run.info.run_id).data.params
    mlflow.log_params({name: text for name, text in config.to_params().items() if name not in known})


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
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {
            "git.commit": ask_git("rev-parse", "HEAD"),
            "git.dirty": str(bool(ask_git("status", "--porcelain", "--", str(folder)))).lower(),
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def log_data(data: PreparedData, source: str) -> None:
    """Log the data set, the split as a CSV, and the split's hash and class counts."""
    frame = data.split.to_frame()
    mlflow.log_text(frame.to_csv(index=False), "data/split.csv")
    mlflow.log_text(data.passport.class_counts.to_csv(), "data/class_counts.csv")
    mlflow.set_tags(
        {
            "split.hash": data.split.hash,
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


def log_epoch(result: EpochResult) -> None:
    """Log an epoch's figures in one call, at the step of its number."""
    mlflow.log_metrics(
        {
            **result.train.to_dict("train"),
            **result.val.to_dict("val"),
            "val/gap": result.gap,
            "lr": result.lr,
            "speed/epoch_s": result.seconds,
            "speed/images_per_s": result.images_per_s,
        },
        step=result.epoch,
    )


def log_best(result: EpochResult) -> None:
    """Log the best epoch's figures by a name of their own, which run tables can be sorted by."""
    figures = {name.replace("val/", "best/val_"): value for name, value in result.val.to_dict("val").items()}
    mlflow.log_metrics({"best/epoch": result.epoch, "best/gap": result.gap, **figures})


def log_passport(passport: dict[str, Any], page: str) -> None:
    """Log what the splits share; a leaking split is a tag on the run."""
    mlflow.log_dict(passport, "data/leak_passport.json")
    mlflow.log_text(page, "data/leak_passport.md")
    mlflow.set_tag("split.leaks", str(passport["leaks"]).lower())


def log_metrics(metrics: dict[str, float], step: int | None = None) -> None:
    """Log figures in one call, without those that are not finite."""
    # A data set's own class names may hold what MLflow's metric names may not.
    figures = {
        re.sub(r"[^\w./ -]", "_", name): value for name, value in metrics.items() if np.isfinite(value)
    }
    mlflow.log_metrics(figures, step=step)


def log_table(table: pd.DataFrame, path: str) -> None:
    """Log a table as a CSV artifact."""
    mlflow.log_text(table.to_csv(index=False), path)


def log_text(text: str, path: str) -> None:
    """Log a text artifact."""
    mlflow.log_text(text, path)


def log_figure(figure: Any, path: str) -> None:
    """Log a matplotlib figure as a PNG artifact."""
    mlflow.log_figure(figure, path)


def log_image(image: NDArray[np.uint8], key: str, step: int) -> None:
    """Log an image (H, W, 3) of a series, which the run's page shows with a slider over the steps."""
    mlflow.log_image(image, key=key, step=step)


def set_tags(tags: dict[str, Any]) -> None:
    """Set tags on the open run."""
    mlflow.set_tags(tags)


def log_note(text: str) -> None:
    """Write the run's description, Markdown, as the MLflow UI shows it first."""
    mlflow.set_tag("mlflow.note.content", text)


def log_model(checkpoint: Path, classes: tuple[str, ...]) -> str:
    """Log the best checkpoint, and the model that serves it; give the model's URI."""
    mlflow.log_artifact(str(checkpoint), "checkpoint")
    package = Path(skin_resnet.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        # A copy without caches: MLflow takes along whatever lies in the folder.
        code = Path(folder) / package.name
        _copy_sources(package, code)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=packaged_model.__file__,
            code_paths=[str(code)],
            artifacts={"checkpoint": str(checkpoint)},
            signature=packaged_model.build_signature(classes),
            input_example=packaged_model.draw_example(),
            pip_requirements=[
                f"{name}=={importlib.metadata.version(name).split('+')[0]}"
                for name in packaged_model.REQUIREMENTS
            ],
        )
    return str(info.model_uri)


def _copy_sources(package: Path, target: Path) -> None:
    for file in package.rglob("*"):
        if file.suffix in {".py", ".csv"}:
            (target / file.relative_to(package)).parent.mkdir(parents=True, exist_ok=True)
            (target / file.relative_to(package)).write_bytes(file.read_bytes())


def describe_location(run_id: str) -> str:
    """Say where a run is, and how to look at it."""
    run = mlflow.MlflowClient().get_run(run_id)
    uri = mlflow.get_tracking_uri()
    look = (
        uri
        if uri.startswith("http")
        else f"mlflow server --backend-store-uri {uri}   then http://127.0.0.1:5000"
    )
    return f"run {run_id} ({run.info.run_name}) in {uri}\nlook at it: {look}"
