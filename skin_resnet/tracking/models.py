"""Trained models by name: a run id, a registered model or a file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from skin_resnet.config import TrainConfig
from skin_resnet.data.split import Split
from skin_resnet.errors import UserError, expand
from skin_resnet.evaluation.calibration import fit_calibration, get_val_predictions
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.model.classifier import Classifier, Scorer, build_classifier
from skin_resnet.model.export import read_exported
from skin_resnet.tracking.history import download_checkpoint
from skin_resnet.training.checkpoint import read_checkpoint
from skin_resnet.training.device import build_fabric


def load_model(model: str | Path, device: str = "auto", precision: str = "auto") -> Classifier:
    """Load a trained model to classify images with.

    Args:
        model: A run id, `models:/NAME@ALIAS`, or a checkpoint (the mean of a,b); or an exported file.
        device: `auto`, `cpu`, `cuda` or `mps`.
        precision: `auto`, `fp32` or `bf16`.

    Raises:
        UserError: There is no such model, or this machine has no such device.
    """
    if str(model).endswith((".onnx", ".pt2")):
        if device not in {"auto", "cpu"} or precision == "bf16":
            raise UserError(f"{model} runs on the CPU in fp32; leave out device={device}, {precision=!s}")
        return read_exported(expand(model))
    fabric = build_fabric(device, precision, devices=1)
    return build_classifier(combine(read_models(str(model))), fabric.device, fabric.autocast)


def read_models(models: str) -> list[dict[str, Any]]:
    """Read the checkpoints that names stand for, separated by commas; all must be of one split and size."""
    checkpoints = {name: read_finished(name) for each in models.split(",") if (name := each.strip())}
    if not checkpoints:
        raise UserError(f"model: {models!r} names no model; pass a run id, models:/NAME@ALIAS or a file")
    (first, expected), *others = checkpoints.items()
    for name, checkpoint in others:
        for key in ("classes", "split", "image_size"):
            if checkpoint[key] != expected[key]:
                raise UserError(
                    f"model: {name} and {first} differ in {key}; average models that were trained on one "
                    "split at one image size"
                )
    return list(checkpoints.values())


def combine(checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a checkpoint that stands for the mean probabilities of several, calibrated for that mean."""
    first = checkpoints[0]
    if len(checkpoints) == 1:
        return first
    members = [get_val_predictions(each) for each in checkpoints]
    val = replace(members[0], probabilities=np.mean([each.probabilities for each in members], axis=0))
    return recalibrate({**first, "members": checkpoints}, val)


def recalibrate(checkpoint: dict[str, Any], val: Predictions) -> dict[str, Any]:
    """Return a checkpoint with the calibration fitted anew, on predictions of val before temperature."""
    counts, coverage = np.array(checkpoint["class_counts"]), checkpoint["calibration"]["coverage"]
    return {**checkpoint, "calibration": fit_calibration(val, tuple(checkpoint["classes"]), coverage, counts)}


def read_finished(model: str) -> dict[str, Any]:
    """Read the checkpoint that a name stands for: a run id, a model's URI or a file.

    Raises:
        UserError: There is none, it is not of a finished training, or an incompatible version wrote it.
    """
    path = Path(model).expanduser()
    if path.suffix in {".onnx", ".pt2"}:
        raise UserError(f"{model} is an exported file, for predict and app; pass the run it was made of")
    is_file = path.suffix in {".pt", ".pth", ".safetensors"} or path.is_file()
    checkpoint = read_checkpoint(path if is_file else download_checkpoint(model))
    if "calibration" not in checkpoint:
        raise UserError(f"{model!r} is not a finished training; wait until it finishes, or resume it.")
    try:
        TrainConfig.model_validate(checkpoint["config"])
        get_split(checkpoint).to_frame()
        Scorer(checkpoint)
    except Exception as error:  # what another version, or a user, has written can raise any
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the checkpoint of {model!r} was written by an incompatible version ({reason}); train again, or "
            "use the version it was trained with."
        ) from None
    return checkpoint


def get_split(checkpoint: dict[str, Any]) -> Split:
    """Return the split that a checkpoint was trained on."""
    return Split(**{name: tuple(ids) for name, ids in checkpoint["split"].items()})
