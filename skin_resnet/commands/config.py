"""The options of all commands but `train` and `search`, which are in modules of their own."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from skin_resnet.config import Device, Fraction, OnBadImage, Precision, TrainConfig
from skin_resnet.options import FolderPath, FrozenConfig, MustExist, Text, Words


def _like_train(name: str) -> Any:
    """Return the training option of the same name, for its default, bounds and description."""
    return TrainConfig.model_fields[name]


class EvaluateConfig(FrozenConfig):
    """Evaluate a trained network on images it has not been trained on."""

    model: Text = Field(
        description="A run id, models:/NAME@ALIAS (or /VERSION), or a checkpoint file; several, "
        "comma-separated, are averaged (an ensemble)."
    )
    data: Annotated[Text, MustExist(("same", "demo", "kaggle"))] = Field(
        "same", description="same (the test split it was trained with), or other data as for train."
    )
    tta: Annotated[Literal[1, 8], BeforeValidator(lambda views: {"1": 1, "8": 8}.get(views, views))] = Field(
        1, description="Test-time augmentation: 1, or 8 flips and rotations."
    )
    on_bad_image: Literal["same", "stop", "skip"] = Field(
        "same", description="Unreadable images: same (as in the training), stop the run, or skip and count."
    )
    cache_dir: FolderPath = _like_train("cache_dir")
    batch_size: int = Field(32, ge=2, le=65_536, description="Images per batch.")
    device: Device = _like_train("device")
    precision: Precision = _like_train("precision")


class PredictConfig(FrozenConfig):
    """Classify images of skin lesions with a trained network."""

    model: Text = Field(description="Run id, models:/NAME@ALIAS, checkpoint (several: a,b) or exported file.")
    images: Words = Field(
        description="Images, folders with all below them, patterns ('*.jpg'), CSV files with a column path; "
        "several as words or comma-separated."
    )
    output: Text = Field("none", description="FILE.csv or FILE.jsonl to write; none: print a table.")
    explain: Text = Field("none", description="Folder for each image beside its Grad-CAM.")
    batch_size: int = Field(64, ge=1, le=65_536, description="Images per batch.")
    device: Device = _like_train("device")
    precision: Precision = _like_train("precision")


class ExportConfig(FrozenConfig):
    """Export a model to one file that runs without this package."""

    model: Text = Field(description="A run id, models:/NAME@ALIAS or a checkpoint; or several, with commas.")
    format: Literal["auto", "onnx", "pt2"] = Field("auto", description="auto: as output ends, else onnx.")
    output: Text = Field("auto", description="FILE.onnx or FILE.pt2; auto: named after the model.")


class CompareConfig(FrozenConfig):
    """Compare finished runs on the same images."""

    runs: str = Field(
        min_length=1,
        description="Run ids separated by commas, or best (the best run of each architecture in the "
        "experiment, by val).",
    )
    split: Literal["val", "test"] = Field("test", description="Split whose stored predictions are compared.")


class PromoteConfig(FrozenConfig):
    """Promote a registered model's challenger if it is better on val; exit code 1 if not."""

    name: Text = Field(description="Registered model, as given to register_as.")
    challenger: Text = Field("challenger", description="Version to judge: its number, or an alias.")


class AuditConfig(FrozenConfig):
    """Check a data set and its split for leaks; exit code 1 if there are any."""

    data: Text = _like_train("data")
    split: Text = _like_train("split")
    report: Text = Field("none", description="JSON file to write the full leakage report to, or none.")
    val_fraction: Fraction = _like_train("val_fraction")
    test_fraction: Fraction = _like_train("test_fraction")
    split_seed: int = _like_train("split_seed")
    on_bad_image: OnBadImage = _like_train("on_bad_image")
    cache_dir: FolderPath = _like_train("cache_dir")


class ReproduceConfig(FrozenConfig):
    """Repeat a run and compare every metric bit by bit; exit code 1 if any differs."""

    run: Text = Field(description="Run id.")
    cache_dir: FolderPath = _like_train("cache_dir")
    checkpoint_dir: FolderPath = _like_train("checkpoint_dir")


class AppConfig(FrozenConfig):
    """Open a page that classifies images with a trained model; others can call it by HTTP."""

    model: Text = PredictConfig.model_fields["model"]  # type: ignore[assignment]
    host: Text = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: for other machines, too.")
    port: int = Field(8000, ge=0, le=65_535, description="Port to listen on; 0: any free one.")
    device: Device = _like_train("device")
    precision: Precision = _like_train("precision")


class DoctorConfig(FrozenConfig):
    """Check that everything a training needs works here; exit code 1 if not."""

    cache_dir: FolderPath = _like_train("cache_dir")
    checkpoint_dir: FolderPath = _like_train("checkpoint_dir")


class CleanConfig(FrozenConfig):
    """List the decoded images and checkpoints that no run needs; remove them if told to."""

    remove: Literal["false", "true"] = Field("false", description="Remove what is listed as not needed.")
    days: float = Field(30.0, ge=0, le=3_650, description="Days without use after which images may go.")
    cache_dir: FolderPath = _like_train("cache_dir")
    checkpoint_dir: FolderPath = _like_train("checkpoint_dir")
