"""Every option, once: the command line, `MLproject`, MLflow params and the search space come from here."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from skin_resnet.errors import UserError

Arch = Literal["resnet50", "resnet101", "resnet152"]
AugmentRecipe = Literal["none", "light", "standard", "strong"]
BestMetric = Literal["balanced_accuracy", "loss", "macro_auc"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
OnBadImage = Literal["stop", "skip"]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]


class FrozenConfig(BaseModel):
    """What all commands' options share: unknown names are refused, values are fixed once checked."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _tell_in_one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # UserError is no ValueError, so neither pydantic nor tyro turns it into a report of many lines.
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors()[0]
            rule = re.sub("^(Input|String) should", "must", first["msg"]).partition(", unable")[0]
            name = first["loc"][0] if first["loc"] else "options"
            raise UserError(f"{name}: {rule}, but got {first['input']!r}.") from None

    def with_changes(self, **changes: Any) -> Self:
        """Copy the config with some fields changed, all of it checked again."""
        return self.model_validate({**self.model_dump(), **changes})

    def to_params(self) -> dict[str, str]:
        """Give every field as the text that `mlflow run` would log for it."""
        return {name: format_value(value) for name, value in self.model_dump().items()}


class TrainConfig(FrozenConfig):
    """Train a ResNet on dermoscopy images and track the run in MLflow."""

    # What it learns from
    data: str = Field(
        "demo",
        min_length=1,
        description="demo (drawn on the spot), kaggle (downloads HAM10000), a folder (HAM10000 as Kaggle, "
        "Dataverse or ISIC lay it out, or a folder per class), or a CSV of path,dx[,lesion_id].",
    )
    image_size: int | Literal["auto"] = Field(
        "auto",
        description="Side of the square input in pixels; auto: 224, but never more than the pictures have.",
    )
    val_fraction: Fraction = Field(
        0.15, description="Share of the images whose lesions choose the best epoch."
    )
    test_fraction: Fraction = Field(
        0.15, description="Share of the images whose lesions give the final test."
    )
    train_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the training lesions to learn from, of each class; val and test stay whole.",
    )
    split: str = Field(
        "own",
        min_length=1,
        description="own: by lesion, stratified; or a CSV of image_id,split (train, val, test).",
    )
    split_seed: int = Field(
        0, ge=0, lt=2**32, description="Which train/val/test split; leave it when changing seed."
    )
    allow_leaks: Literal["false", "true"] = Field(
        "false",
        description="Train on a split given by file though it leaks; the run and its reports then say so.",
    )
    on_bad_image: OnBadImage = Field(
        "stop", description="An unreadable image stops the run, or is skipped and counted."
    )
    cache_dir: Path = Field(
        Path("~/.cache/skin-resnet"), description="Where decoded images and demo data are kept between runs."
    )
    # The network
    arch: Arch = Field("resnet50", description="Which network.")
    weights: str = Field(
        "none",
        min_length=1,
        description="Where it starts: none (random), imagenet, or a .pth/.safetensors FILE.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability before the classification head.")
    stochastic_depth: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Probability of skipping the last block, rising linearly from 0 at the first.",
    )
    # How it learns
    epochs: int = Field(16, ge=1, le=10_000, description="Passes over the training images.")
    batch_size: int = Field(
        32, ge=2, le=65_536, description="Images per optimizer step, over all devices together."
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adamw", description="Which optimizer (sgd: Nesterov, 0.9)."
    )
    lr: float = Field(5e-4, gt=0, le=100, description="Peak learning rate.")
    lr_schedule: Literal["constant", "cosine", "onecycle", "plateau"] = Field(
        "cosine", description="Course of the learning rate; onecycle brings its own warm-up."
    )
    warmup_epochs: float = Field(1.0, ge=0, le=10_000, description="Epochs of linear rise to lr.")
    weight_decay: float = Field(
        0.05, ge=0, le=10, description="Decay of weights (not of biases and BatchNorm)."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Share of the target spread over all classes."
    )
    class_weighting: Literal["none", "sqrt", "balanced"] = Field(
        "sqrt",
        description="Loss weight of a class: 1, 1/sqrt(its images), or 1/its images; mean 1 over images.",
    )
    grad_clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 turns clipping off.")
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Decay of the moving average of the weights that val and test see; 0: off.",
    )
    augment: AugmentRecipe = Field("standard", description="Recipe of random changes to the training images.")
    mixup: float = Field(0.0, ge=0, le=10, description="Alpha of MixUp's Beta distribution; 0: off.")
    cutmix: float = Field(0.0, ge=0, le=10, description="Alpha of CutMix's Beta distribution; 0: off.")
    # When it stops
    best_by: BestMetric = Field("balanced_accuracy", description="Val metric that chooses the best epoch.")
    patience: int = Field(0, ge=0, description="Stop after so many epochs without a better one; 0: never.")
    coverage: float = Field(
        0.9, gt=0, lt=1, description="Share of images whose set of possible classes should hold the true one."
    )
    test: Literal["at_end", "never"] = Field(
        "at_end", description="Score the best epoch on the test split, once."
    )
    # Where it runs
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, order and augmentation.")
    device: Device = Field("auto", description="auto: a GPU where there is one.")
    devices: int = Field(1, ge=1, le=64, description="How many of them, each in a process of its own.")
    precision: Precision = Field("auto", description="auto: bf16 where the GPU has it.")
    checkpoint_dir: Path = Field(
        Path("checkpoints"), description="Where runs keep their checkpoints, by run id."
    )
    checkpoint_minutes: float = Field(
        10.0,
        gt=0,
        le=10_000,
        description="Between checkpoints within an epoch; there is one at the end of each anyway.",
    )
    resume: str = Field(
        "none",
        min_length=1,
        description="Go on with a stopped run, in the same run: its id; or auto, the latest one stopped that "
        "was given these options, and a new run where there is none.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.image_size != "auto" and not 32 <= self.image_size <= 1024:
            raise UserError(f"image_size: must be auto or 32 to 1024, but got {self.image_size}.")
        if self.val_fraction + self.test_fraction >= 0.9:
            raise UserError(
                "val_fraction and test_fraction: must leave over a tenth to train on, "
                f"but got {self.val_fraction} and {self.test_fraction}."
            )
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"warmup_epochs: must not exceed epochs, but got {self.warmup_epochs} > {self.epochs}."
            )
        if self.batch_size < 2 * self.devices:
            raise UserError(
                f"batch_size: must be at least 2 a device, but got {self.batch_size} for {self.devices}."
            )
        return self


def _like_train(name: str) -> Any:
    """Take default, bounds and description from the training option of the same name."""
    return TrainConfig.model_fields[name]


class EvaluateConfig(FrozenConfig):
    """Score a trained network on images it has never seen."""

    model: str = Field(
        min_length=1,
        description="A run id, models:/NAME@ALIAS (or /VERSION), or a checkpoint file (best.pt).",
    )
    data: str = Field(
        "same",
        min_length=1,
        description="same: the test split of what it was trained on; or another source, as train takes it.",
    )
    tta: Literal[1, 8] = Field(
        1,
        description="Views to average over: 1, or the 8 an image has when turned and mirrored.",
    )
    on_bad_image: OnBadImage = _like_train("on_bad_image")
    cache_dir: Path = _like_train("cache_dir")
    batch_size: int = _like_train("batch_size")
    device: Device = _like_train("device")
    precision: Precision = _like_train("precision")


class CompareConfig(FrozenConfig):
    """Put several trainings side by side."""

    runs: str = Field(
        min_length=1,
        description="Run ids with commas between, or best: each arch's best run on val in this experiment.",
    )
    split: Literal["val", "test"] = Field(
        "test", description="Whose predictions to compare, as the runs left them; nothing is opened again."
    )


class AuditConfig(FrozenConfig):
    """Tell what the splits of a data set share, and what that costs; exit 1 when they leak."""

    data: str = _like_train("data")
    split: str = Field(
        "own", min_length=1, description="own: the split that train makes; or a CSV of image_id,split."
    )
    passport: str = Field(
        "none", min_length=1, description="A JSON file to write everything to, every pair included; or none."
    )
    val_fraction: Fraction = _like_train("val_fraction")
    test_fraction: Fraction = _like_train("test_fraction")
    split_seed: int = _like_train("split_seed")
    on_bad_image: OnBadImage = _like_train("on_bad_image")
    cache_dir: Path = _like_train("cache_dir")


class ReproduceConfig(FrozenConfig):
    """Train again what a run trained, and compare the two to the last bit; exit 1 where they differ."""

    run: str = Field(min_length=1, description="The run's id.")
    cache_dir: Path = _like_train("cache_dir")
    checkpoint_dir: Path = _like_train("checkpoint_dir")


class DoctorConfig(FrozenConfig):
    """Tell on one screen what a training would find here, and what is wrong; exit 1 when anything is."""

    cache_dir: Path = _like_train("cache_dir")
    checkpoint_dir: Path = _like_train("checkpoint_dir")


def format_value(value: object) -> str:
    """Write a value as one types it: what an MLflow param shows and what the command line reads back.

    Floats are written the short way (`0.0003`, `1e-05`), so that a run started by `mlflow run` and one
    started by `python -m` show the same text.
    """
    return repr(value) if isinstance(value, float) else str(value)
