"""Every option of a training, stated once: type, default, bounds, help and group.

The command line, `MLproject`, MLflow params and the search space are derived from these classes.
"""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from skin_resnet.errors import UserError
from skin_resnet.options import FolderPath, FrozenConfig, MustExist, Text

Arch = Literal["resnet50", "resnet101", "resnet152"]
AugmentRecipe = Literal["none", "flips", "crops", "colors", "light", "standard", "strong"]
BestMetric = Literal["balanced_accuracy", "loss", "macro_auc"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16"]
OnBadImage = Literal["stop", "skip"]
Fraction = Annotated[float, Field(gt=0, lt=0.5)]


class DataOptions(FrozenConfig):
    """Which images, and how they are split."""

    data: Annotated[Text, MustExist(("demo", "kaggle"))] = Field(
        "demo",
        description="demo (synthetic), kaggle (downloads HAM10000), a folder (HAM10000 as distributed by "
        "Kaggle, Dataverse or ISIC, or one subfolder per class), or a CSV of path,dx[,lesion_id].",
    )
    image_size: Annotated[int, Field(ge=32, le=1024)] | Literal["auto"] = Field(
        "auto",
        description="Side of the square network input in pixels; auto: 224, or less for smaller images.",
    )
    val_fraction: Fraction = Field(0.15, description="Fraction of the images in val, whole lesions only.")
    test_fraction: Fraction = Field(0.15, description="Fraction of the images in test, whole lesions only.")
    train_fraction: float = Field(
        1.0, gt=0, le=1, description="Fraction of the training lesions to use, stratified by class."
    )
    split: Annotated[Text, MustExist(("own",))] = Field(
        "own", description="own (by lesion, stratified by class), or a CSV of image_id,split."
    )
    split_seed: int = Field(
        0, ge=0, lt=2**32, description="Seed of the split; independent of seed, so that test stays the same."
    )
    allow_leaks: Literal["false", "true"] = Field(
        "false", description="Train even if the split leaks; the run and its reports are marked."
    )
    on_bad_image: OnBadImage = Field(
        "stop", description="Stop at an unreadable image, or skip, count and list it."
    )


class ModelOptions(FrozenConfig):
    """Which network."""

    arch: Arch = Field("resnet50", description="Network architecture.")
    weights: Annotated[Text, MustExist(("auto", "none", "imagenet", "imagenet_v1"))] = Field(
        "auto",
        description="Initial weights: none (random), imagenet (torchvision's latest, V2), imagenet_v1, or a "
        ".pth or .safetensors file, also of a shallower ResNet; auto: imagenet, for the demo none.",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout probability before the classifier.")
    stochastic_depth: float = Field(
        0.0, ge=0, lt=1, description="Drop probability of the last block; rises linearly from 0 at the first."
    )


class TrainingOptions(FrozenConfig):
    """How it is trained."""

    epochs: int = Field(10, ge=1, le=10_000, description="Number of epochs.")
    batch_size: int = Field(
        64, ge=2, le=65_536, description="Images per optimizer step, summed over all devices."
    )
    optimizer: Literal["adam", "adamw", "sgd"] = Field(
        "adamw", description="Optimizer; sgd uses Nesterov momentum 0.9."
    )
    lr: float = Field(5e-4, gt=0, le=100, description="Peak learning rate.")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Learning rate of each stage as a fraction of the next one's, up to the head's; 1: all "
        "learn alike, as they do in any case from random weights.",
    )
    lr_schedule: Literal["constant", "cosine", "onecycle", "plateau"] = Field(
        "onecycle", description="Learning-rate schedule; onecycle includes its own warm-up."
    )
    warmup_epochs: float = Field(0.0, ge=0, le=10_000, description="Epochs of linear warm-up.")
    weight_decay: float = Field(
        0.05, ge=0, le=10, description="Weight decay; biases and BatchNorm are exempt."
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="Label smoothing: fraction of the target spread over all classes."
    )
    class_weighting: Literal["none", "sqrt", "balanced"] = Field(
        "none", description="Loss weight of a class of n images: equal, 1/sqrt(n) or 1/n, normalized."
    )
    grad_clip: float = Field(1.0, ge=0, description="Maximum gradient norm; 0: no clipping.")
    ema_decay: float = Field(
        0.99, ge=0, lt=1, description="Decay of the weight EMA, which is then evaluated and saved; 0: off."
    )
    augment: AugmentRecipe = Field("crops", description="Augmentation recipe.")
    mixup: float = Field(0.0, ge=0, le=10, description="Alpha of MixUp's Beta distribution; 0: off.")
    cutmix: float = Field(0.0, ge=0, le=10, description="Alpha of CutMix's Beta distribution; 0: off.")
    start_size: int = Field(
        0,
        ge=0,
        le=1024,
        description="Progressive resizing: side in pixels at which training starts; it reaches image_size "
        "in the last epoch. 0: off.",
    )
    best_by: BestMetric = Field("loss", description="Val metric that selects the best epoch.")
    patience: int = Field(0, ge=0, description="Stop after this many epochs without improvement; 0: never.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of initial weights, batch order and augmentation.")


class EvaluationOptions(FrozenConfig):
    """How it is evaluated."""

    coverage: float = Field(
        0.9,
        ge=0.5,
        le=0.999,
        description="Target coverage of the conformal sets: how often they contain the true class.",
    )
    test: Literal["at_end", "never"] = Field(
        "at_end", description="Evaluate the best epoch on test once, at the end, or never."
    )


class RuntimeOptions(FrozenConfig):
    """Hardware, precision, checkpoints, and what is done with the result."""

    device: Device = Field("auto", description="Device type; auto: a GPU if there is one.")
    devices: int = Field(1, ge=1, le=64, description="Number of devices (DDP, one process each).")
    precision: Precision = Field(
        "auto", description="Numeric precision; auto: bf16 where the GPU or CPU has units for it."
    )
    cache_dir: FolderPath = Field(
        Path("auto"), description="Folder for decoded images and demo data; auto: ~/.cache/skin-resnet."
    )
    checkpoint_dir: FolderPath = Field(
        Path("checkpoints"), description="Folder for checkpoints of unfinished runs, by run id."
    )
    checkpoint_minutes: float = Field(
        10.0,
        gt=0,
        le=10_000,
        description="Minutes between checkpoints within an epoch; the end of an epoch always saves one.",
    )
    resume: Text = Field(
        "none",
        description="Continue an interrupted run: its run id, or auto (the latest with the same options, "
        "else a new run).",
    )
    register_as: Text = Field(
        "none",
        description="Registered model to add the model, or a search's winner, to; none: not registered.",
    )
    print_report: Literal["false", "true"] = Field(
        "false", description="Print the whole report at the end; it is logged in any case."
    )


# How `--help` groups the options; the order is that of TrainConfig's fields.
GROUPS: dict[str, type[FrozenConfig]] = {
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
    "evaluation": EvaluationOptions,
    "runtime": RuntimeOptions,
}


# pydantic lists the fields of the last base class first.
class TrainConfig(RuntimeOptions, EvaluationOptions, TrainingOptions, ModelOptions, DataOptions):
    """Train a ResNet on dermoscopy images, tracked in MLflow."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.val_fraction + self.test_fraction >= 0.9:
            raise UserError(
                f"val_fraction={self.val_fraction} and test_fraction={self.test_fraction} leave less than a "
                "tenth of the images for training"
            )
        if self.warmup_epochs > self.epochs:
            raise UserError(f"warmup_epochs={self.warmup_epochs} exceeds epochs={self.epochs}")
        # MLflow would refuse the name only after everything has been trained and tested.
        if re.search("[/:]", self.register_as):
            raise UserError(f"register_as: {self.register_as[:60]!r} is no model's name; leave out / and :")
        if 0 < self.start_size < 32:
            raise UserError(f"start_size={self.start_size} is below 32, the least image_size; 0 is off")
        if self.image_size != "auto" and self.start_size >= self.image_size:
            raise UserError(f"start_size={self.start_size} is not below image_size={self.image_size}")
        if self.start_size and self.patience:
            raise UserError(
                f"patience={self.patience} may end a training before its last epoch, the only one at full "
                f"size with start_size={self.start_size}; set one of them to 0"
            )
        if self.batch_size < 2 * self.devices:
            raise UserError(f"batch_size={self.batch_size} is less than 2 for each of devices={self.devices}")
        return self

    @property
    def initial_weights(self) -> str:
        """The option `weights` with `auto` resolved: images as simple as the demo's need no download."""
        automatic = "none" if self.data == "demo" else "imagenet"
        return automatic if self.weights == "auto" else self.weights
