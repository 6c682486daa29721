"""What finished runs left in MLflow: checkpoints, histories, predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import yaml

from skin_resnet.errors import UserError

_NAMES = ("image_id", "lesion_id", "dx", "prediction")


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished training.

    Attributes:
        split_hash: Which split it was trained and evaluated on.
        leaks: Whether that split leaks.
        history: Indexed by epoch, with columns `train/loss`, `val/loss`, ...
        predictions: A row an image: image_id, lesion_id, dx, prediction, and each class's probability.
    """

    run_id: str
    name: str
    arch: str
    split_hash: str
    leaks: bool
    metrics: dict[str, float]
    history: pd.DataFrame
    predictions: pd.DataFrame


@dataclass(frozen=True, kw_only=True)
class RecordedTraining:
    """What is on record of a finished training that it takes to run it again.

    Attributes:
        options: From `config.yaml`.
        split: The split's CSV.
        history: Values by metric name and epoch.
    """

    options: dict[str, Any]
    tags: dict[str, str]
    split: Path
    history: dict[str, dict[int, float]]


def read_training(run_id: str, folder: Path) -> RecordedTraining:
    """Read what it takes to run a finished training again.

    Args:
        run_id: The training's.
        folder: Where its split is put.

    Raises:
        UserError: There is no such run, or it is no finished training.
    """
    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
        if "best/epoch" not in run.data.metrics:
            raise OSError("it is no finished training")
        split = client.download_artifacts(run_id, "data/split.csv", str(folder))
        options = client.download_artifacts(run_id, "config.yaml", str(folder))
    except (mlflow.MlflowException, OSError) as error:
        raise UserError(
            f"run must be the id of a finished training, but {run_id!r} is none in "
            f"{mlflow.get_tracking_uri()} ({str(error).splitlines()[0]})."
        ) from None
    names = ["lr", *(name for name in run.data.metrics if name.startswith(("train/", "val/")))]
    of_epochs = {name: client.get_metric_history(run_id, name) for name in names}
    return RecordedTraining(
        options=yaml.safe_load(Path(options).read_text("utf-8")),
        tags=run.data.tags,
        split=Path(split),
        history={name: {p.step: p.value for p in points} for name, points in of_epochs.items()},
    )


def download_checkpoint(model: str) -> Path:
    """Fetch the best checkpoint of a run (`RUN_ID`, `runs:/RUN_ID`) or a model (`models:/NAME@ALIAS`, ...).

    Raises:
        UserError: There is no such run or model, or it has no checkpoint.
    """
    try:
        if model.startswith("models:/"):
            folder = Path(mlflow.artifacts.download_artifacts(model))
            return next(folder.rglob("*.pt"))
        run_id = model.removeprefix("runs:/").rstrip("/")
        experiment_id = mlflow.get_run(run_id).info.experiment_id
        models = mlflow.search_logged_models(
            [experiment_id], f"source_run_id = '{run_id}'", output_format="list"
        )
        return next(Path(mlflow.artifacts.download_artifacts(models[-1].model_uri)).rglob("*.pt"))
    except (mlflow.MlflowException, OSError, StopIteration, IndexError) as error:
        reason = (str(error).splitlines() or ["it holds none"])[0]
        raise UserError(
            f"model must be a run id, models:/NAME@ALIAS or a checkpoint file, but {model!r} gives no "
            f"checkpoint in {mlflow.get_tracking_uri()} ({reason})."
        ) from None


def find_best_runs() -> list[str]:
    """Give each arch's run with the highest val balanced accuracy, of the open run's experiment.

    Only runs on the split of the best of them all are compared, and none whose split leaks.

    Raises:
        UserError: There is no finished training in it.
    """
    run = mlflow.active_run()
    assert run is not None, "its experiment is searched"
    finished = mlflow.search_runs(
        [run.info.experiment_id],
        filter_string="attributes.status = 'FINISHED' AND tags.`split.leaks` = 'false' "
        "AND metrics.`best/val_balanced_accuracy` > 0",
        order_by=["metrics.`best/val_balanced_accuracy` DESC"],
        output_format="list",
    )
    if not finished:
        raise UserError("runs=best needs finished trainings in this experiment, but has none; train first.")
    best: dict[str, str] = {}
    for each in finished:
        if each.data.tags["split.hash"] == finished[0].data.tags["split.hash"]:
            best.setdefault(each.data.params["arch"], each.info.run_id)
    return [best[arch] for arch in sorted(best, key=lambda arch: (len(arch), arch))]  # 50 before 101


def read_run(run_id: str, split: str) -> FinishedRun:
    """Read a finished training and its predictions on val or test; test is not opened again by it.

    Raises:
        UserError: There is no such run, or it has no predictions on that split.
    """
    client = mlflow.MlflowClient()
    try:
        run = client.get_run(run_id)
        if "best/epoch" not in run.data.metrics:
            raise OSError("it is no finished training")
        path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=f"{split}/predictions.csv")
    except (mlflow.MlflowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"runs must be trainings with predictions on {split}, but {run_id!r} is not one in "
            f"{mlflow.get_tracking_uri()} ({reason})."
        ) from None
    names = [f"{part}/{name}" for part in ("train", "val") for name in ("loss", "balanced_accuracy")]
    history = {
        name: {point.step: point.value for point in client.get_metric_history(run_id, name)}
        for name in [*names, "speed/epoch_s", "speed/images_per_s"]
    }
    return FinishedRun(
        run_id=run_id,
        name=run.info.run_name,
        arch=run.data.params["arch"],
        split_hash=run.data.tags.get("split.hash", ""),
        leaks=run.data.tags.get("split.leaks") == "true",
        metrics=run.data.metrics,
        history=pd.DataFrame(history).sort_index(),
        predictions=pd.read_csv(
            path, dtype={"image_id": str, "lesion_id": str, "dx": str}, keep_default_na=False
        ),
    )
