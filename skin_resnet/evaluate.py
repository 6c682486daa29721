"""The command `evaluate`: what a trained network scores on images it has never seen."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch

from skin_resnet.config import EvaluateConfig, TrainConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.load import Loader, place_pixels
from skin_resnet.data.split import Split, drop_seen, join_lesions
from skin_resnet.data.transform import ImageStore, open_store
from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.plots.confusion import plot_confusion
from skin_resnet.evaluation.scores import Scores, compute_scores, format_scores, tabulate_predictions
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking import finished_runs, mlflow_run
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.engine import predict
from skin_resnet.training.state import build_fabric


def evaluate(config: EvaluateConfig) -> None:
    """Score a trained network in an MLflow run of its own, and print the scores.

    Images that the network has learnt from, or whose lesions it has, are left out: of its own data set the
    test split remains, of another data set usually all.

    Raises:
        UserError: The model or the data cannot be used.
    """
    with mlflow_run.open_run(f"evaluation of {config.model}") as run_id:
        mlflow_run.log_params(config)
        checkpoint = read_checkpoint(find_checkpoint(config.model))
        trained_with = TrainConfig.model_validate(checkpoint["config"])
        is_same = config.data == "same"
        data = trained_with.data if is_same else config.data
        table = extract(data, config.cache_dir)
        image_size = trained_with.image_size if is_same else checkpoint["image_size"]
        store = open_store(table, image_size, config.cache_dir, config.on_bad_image)
        table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
        split = Split(**{name: tuple(ids) for name, ids in checkpoint["split"].items()})
        unseen = drop_seen(_match_classes(table, tuple(checkpoint["classes"])), split)
        print(f"model    {config.model}: {checkpoint['arch']}, epoch {checkpoint['epoch']}")
        left_out = len(table) - len(unseen)
        print(f"data     {data}: {len(unseen)} images; {left_out} left out, whose lesions it learnt from")
        scores = evaluate_checkpoint(checkpoint, unseen, store, config)
        mlflow_run.log_metrics(scores.to_dict("test"))
        print(f"\n{log_scores(scores, checkpoint, 'test')}")
        if set(split.test) & set(unseen.image_id):
            mlflow_run.count_test_opening(checkpoint["run_id"], by=run_id)
    print(f"\n{mlflow_run.describe_location(run_id)}")


def find_checkpoint(model: str) -> Path:
    """Find the checkpoint that a name stands for: a file, a run id, or a logged or registered model's URI.

    Raises:
        UserError: There is none.
    """
    if Path(model).suffix == ".pt" or Path(model).is_file():
        return Path(model).expanduser()
    return finished_runs.download_checkpoint(model)


def _match_classes(table: pd.DataFrame, classes: tuple[str, ...]) -> pd.DataFrame:
    """Number the table's diagnoses as the model does."""
    unknown = sorted(set(table.dx) - set(classes))
    if unknown:
        raise UserError(
            f"the data may only have the model's classes ({', '.join(classes)}), but it has {unknown[0]!r}."
        )
    dx = pd.Categorical(table.dx.astype(str), categories=list(classes), ordered=True)
    return table.assign(dx=dx, target=dx.codes.astype("int64"))


def evaluate_checkpoint(
    checkpoint: dict[str, Any], table: pd.DataFrame, store: ImageStore, machine: TrainConfig | EvaluateConfig
) -> Scores:
    """Score a checkpoint's network on the images of a table.

    Args:
        checkpoint: From `read_checkpoint`.
        table: Rows to be scored, with targets in the checkpoint's class order.
        store: Their pixels.
        machine: Device, precision and batch size.

    Raises:
        UserError: There is no image to score.
    """
    if table.empty:
        raise UserError(
            "a test needs images the model has not learnt from, but there are none; give other data."
        )
    classes = tuple(checkpoint["classes"])
    fabric = build_fabric(machine.device, machine.precision, devices=1)
    network = build_resnet(checkpoint["arch"], len(classes))
    network.load_state_dict(checkpoint["network"])
    network.to(fabric.device).to(memory_format=torch.channels_last)
    loader = Loader(
        source=place_pixels(store, fabric.device),
        rows=store.find_rows(tuple(table.image_id)),
        targets=torch.tensor(table.target.to_numpy()),
        batch_size=machine.batch_size,
    )
    predictions = Predictions(
        probabilities=predict(network, loader, fabric),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
    )
    return compute_scores(
        predictions, join_lesions(table).to_numpy(str), classes, checkpoint["baseline_class"]
    )


def log_scores(scores: Scores, checkpoint: dict[str, Any], split: str) -> str:
    """Log the tables and figures of a split's scores on the open run, and give them as Markdown."""
    mlflow_run.log_table(scores.class_table, f"{split}/per_class.csv")
    mlflow_run.log_table(tabulate_predictions(scores), f"{split}/predictions.csv")
    title = f"{split.capitalize()}: {checkpoint['arch']}, epoch {checkpoint['epoch']}"
    mlflow_run.log_figure(plot_confusion(scores.predictions, scores.classes, title), f"{split}/confusion.png")
    page = format_scores(scores, split)
    mlflow_run.log_text(page, f"{split}/scores.md")
    return page
