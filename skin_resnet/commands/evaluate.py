"""The command `evaluate`: what a trained network scores on images it has never seen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from skin_resnet.config import EvaluateConfig, TrainConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.split import Split, drop_seen
from skin_resnet.data.store import ImageStore, normalize, open_store
from skin_resnet.errors import UserError
from skin_resnet.evaluation.assess import Assessment, Calibration, assess, format_assessment
from skin_resnet.evaluation.explain import choose_examples, compute_gradcam
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.model.resnet import ResNet, build_resnet
from skin_resnet.tracking import history as finished_runs
from skin_resnet.tracking import log_assessment, log_setting
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking.openings import record_opening
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.engine import predict, to_float
from skin_resnet.training.state import build_fabric


def evaluate(config: EvaluateConfig) -> None:
    """Assess a trained network in an MLflow run of its own, and print what it scores.

    Images that the network has learnt from, or whose lesions it has, are left out, as far as their ids tell:
    of its own data set the test split remains, of another data set usually all.

    Raises:
        UserError: The model or the data cannot be used.
    """
    with mlflow_run.open_run(f"evaluation of {config.model}") as run_id:
        mlflow_run.log_params(config)
        log_setting.log_versions()
        checkpoint = read_finished(config.model)
        log_setting.log_model_tested(checkpoint)
        trained_with = TrainConfig.model_validate(checkpoint["config"])
        is_same = config.data == "same"
        data = trained_with.data if is_same else config.data
        table = extract(data, config.cache_dir, fewest_classes=1)
        image_size = trained_with.image_size if is_same else checkpoint["image_size"]
        store = open_store(table, image_size, config.cache_dir, config.on_bad_image)
        table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
        split = Split(**{name: tuple(ids) for name, ids in checkpoint["split"].items()})
        unseen = drop_seen(_match_classes(table, tuple(checkpoint["classes"])), split)
        if is_same:  # what was in no split is not of the test either
            unseen = unseen[unseen.image_id.isin(split.test)].reset_index(drop=True)
        left_out = len(table) - len(unseen)
        print(f"model    {config.model}: {checkpoint['arch']}, epoch {checkpoint['epoch']}")
        reason = "which are not of its test split" if is_same else "whose lesions it learnt from"
        print(f"data     {data}: {len(unseen)} images; {left_out} left out, {reason}")
        if store.skipped:
            print(f"skipped  {len(store.skipped)} that cannot be read")
            mlflow_run.set_tags({"skipped_images": len(store.skipped)})
            mlflow_run.log_text(json.dumps(store.skipped), "data/skipped_images.json")
        pages = []
        if set(split.test) & set(unseen.image_id):
            pages.append(record_opening(split.hash, of=checkpoint["run_id"]))
        pages.append(assess_and_log(checkpoint, unseen, store, config, "test"))
        note = "\n\n".join(filter(None, pages))
        mlflow_run.log_note(note)
        print(f"\n{note}")
    print(f"\n{mlflow_run.describe_location(run_id)}")


def read_finished(model: str) -> dict[str, Any]:
    """Read the checkpoint that a name stands for, and make sure that a network can be tested with it.

    Raises:
        UserError: There is none, it is not of a finished training, or its parts do not fit each other.
    """
    checkpoint = read_checkpoint(find_checkpoint(model))
    if "calibration" not in checkpoint:
        raise UserError(f"model must be a finished training, but {model!r} is none; let it end, or resume.")
    try:
        TrainConfig.model_validate(checkpoint["config"])
        Calibration.from_dict(checkpoint["calibration"])
        Split(**{name: tuple(ids) for name, ids in checkpoint["split"].items()}).to_frame()
        build_network(checkpoint)
        parts = ("image_size", "epoch", "leaks", "run_id")
        missing = [name for name in parts if name not in checkpoint]
        if missing or checkpoint["baseline_class"] not in checkpoint["classes"]:
            raise KeyError(missing[0] if missing else "baseline_class")
    # Nothing is known of what another version, or a hand, has written.
    except Exception as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else (str(error).splitlines() or [""])[0]
        raise UserError(
            f"model must be a training of this version, but what {model!r} holds does not fit: {reason}; "
            "train again, or use the version that it was trained with."
        ) from None
    return checkpoint


def find_checkpoint(model: str) -> Path:
    """Find the checkpoint that a name stands for: a file, a run id, or a logged or registered model's URI.

    Raises:
        UserError: There is none.
    """
    path = Path(model).expanduser()
    if path.suffix in {".pt", ".pth", ".safetensors"} or path.is_file():
        return path
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


def predict_checkpoint(
    checkpoint: dict[str, Any], table: pd.DataFrame, store: ImageStore, config: TrainConfig | EvaluateConfig
) -> Predictions:
    """Predict the images of a table with a checkpoint's network, before temperature.

    Args:
        checkpoint: From `read_checkpoint`.
        table: Rows to predict, with targets in the checkpoint's class order.
        store: Their pixels.
        config: Device, precision and batch size; how many views, for an evaluation.

    Raises:
        UserError: There is no image.
    """
    if table.empty:
        raise UserError(
            "a test needs images the model has not learnt from, but there are none; give other data."
        )
    fabric = build_fabric(config.device, config.precision, devices=1)
    loader = Loader(
        source=place_pixels(store, fabric.device),
        rows=store.find_rows(tuple(table.image_id)),
        targets=torch.tensor(table.target.to_numpy()),
        batch_size=config.batch_size,
    )
    network = build_network(checkpoint).to(fabric.device)
    return Predictions(
        probabilities=predict(network, loader, fabric, get_views(config)),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
    )


def get_views(config: TrainConfig | EvaluateConfig) -> int:
    """Give how many views of an image are averaged."""
    return config.tta if isinstance(config, EvaluateConfig) else 1


def build_network(checkpoint: dict[str, Any]) -> ResNet:
    """Build the network of a checkpoint, ready to predict."""
    with torch.device("meta"):  # drawing random weights takes longer than all else here
        network = build_resnet(checkpoint["arch"], len(checkpoint["classes"]))
    network.load_state_dict(checkpoint["network"], assign=True)
    return network.to(memory_format=torch.channels_last).eval()


def assess_and_log(
    checkpoint: dict[str, Any],
    table: pd.DataFrame,
    store: ImageStore,
    config: TrainConfig | EvaluateConfig,
    split: str,
) -> str:
    """Assess a checkpoint's network on a table's images, log all of it on the open run, and give the page.

    Raises:
        UserError: There is no image, or the network's answers are not finite.
    """
    raw = predict_checkpoint(checkpoint, table, store, config)
    calibration = Calibration.from_dict(checkpoint["calibration"])
    assessment = replace(
        assess(raw, table, tuple(checkpoint["classes"]), checkpoint["baseline_class"], calibration),
        leaks=checkpoint["leaks"],
        views=get_views(config),
    )
    page = format_assessment(assessment, split)
    title = f"{split.capitalize()}, {checkpoint['arch']} epoch {checkpoint['epoch']}"
    if split == "test":
        mlflow_run.log_metrics(assessment.to_dict(split), step=checkpoint["epoch"])
        log_assessment.log_examples(assessment, store, _explain(checkpoint, assessment, store), title)
    log_assessment.log_assessment(assessment, page, title, split)
    return page


def _explain(
    checkpoint: dict[str, Any], assessment: Assessment, store: ImageStore
) -> log_assessment.Examples:
    """Compute Grad-CAM for a few images of each class, a fixed choice; on the CPU, since they are few."""
    predictions = assessment.scores.predictions
    rows = choose_examples(predictions)
    pixels = store.pixels[store.find_rows(tuple(np.array(predictions.image_ids)[rows]))]
    images = normalize(to_float(torch.from_numpy(np.array(pixels))))
    heats = compute_gradcam(build_network(checkpoint), images, torch.from_numpy(predictions.predicted[rows]))
    return log_assessment.Examples(rows=rows, pixels=pixels, heats=heats)
