"""The logged model: image bytes in, probabilities out; preprocessing, classes and calibration are included.

MLflow runs this file as the model's code ("models from code"): nothing is pickled, and a copy of the package
is logged with it (`code_paths`), so that the model loads where the package is not installed.
"""

import importlib.metadata
import io
import tempfile
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from PIL import Image

import skin_resnet
from skin_resnet.data.decode import BadImageError, decode_image
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.checkpoint import read_checkpoint

# What loading and predicting needs, besides the package itself.
REQUIREMENTS = ("torch", "torchvision", "numpy", "pandas", "pillow")
BATCH_SIZE = 64


def log_model(checkpoint: Path, classes: tuple[str, ...]) -> str:
    """Log a checkpoint and the code that serves it as a model of the active run, and return its URI."""
    inputs = Schema([ColSpec(DataType.binary, "image")])
    columns = {"prediction": DataType.string, **dict.fromkeys(classes, DataType.double)}
    outputs = Schema([ColSpec(kind, name) for name, kind in columns.items()])
    example = io.BytesIO()
    Image.new("RGB", (64, 48), (222, 178, 154)).save(example, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=__file__,
            code_paths=[str(_copy_package(Path(folder)))],
            artifacts={"checkpoint": str(checkpoint)},
            signature=ModelSignature(inputs, outputs),
            input_example=pd.DataFrame({"image": [example.getvalue()]}),
            pip_requirements=[
                f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in REQUIREMENTS
            ],
        )
    return str(info.model_uri)


def _copy_package(folder: Path) -> Path:
    # Without caches: MLflow takes along whatever lies in the folder.
    package = Path(skin_resnet.__file__).parent
    for file in package.rglob("*"):
        if file.suffix in {".py", ".csv"}:
            copy = folder / file.relative_to(package.parent)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
    return folder / package.name


class LesionClassifier(PythonModel):
    """Classifies images of skin lesions, given as the bytes of their files (JPEG, PNG, ...)."""

    def load_context(self, context: Any) -> None:
        """Build the network from the checkpoint among the model's artifacts."""
        checkpoint = read_checkpoint(Path(context.artifacts["checkpoint"]))
        self._classes = tuple(checkpoint["classes"])
        self._temperature = float(checkpoint["calibration"]["temperature"])
        self._decision_weights = checkpoint["calibration"]["decision_weights"]
        self._image_size = int(checkpoint["image_size"])
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = build_resnet(checkpoint["arch"], len(self._classes))
        network.load_state_dict(checkpoint["network"])
        self._network = network.to(self._device).eval()

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return a row per image file in the column `image`: the predicted class, and all probabilities.

        As in the evaluation, the class is the one with the highest p / prior**tau.

        Raises:
            BadImageError: An image cannot be decoded; the message names its row.
        """
        images = list(model_input["image"])
        batches = [
            self._classify(images[start : start + BATCH_SIZE], start)
            for start in range(0, len(images), BATCH_SIZE)
        ]
        probabilities = pd.DataFrame(
            torch.cat(batches).numpy() if batches else [],
            columns=list(self._classes),
            index=model_input.index,
        )
        scores = probabilities * self._decision_weights
        prediction = pd.Series(scores.idxmax(axis=1) if batches else [], dtype=str, name="prediction")
        return pd.concat([prediction, probabilities], axis=1)

    @torch.no_grad()
    def _classify(self, images: list[bytes], first_row: int) -> torch.Tensor:
        pixels = torch.stack(
            [torch.from_numpy(self._decode(image, first_row + i)) for i, image in enumerate(images)]
        )
        logits: torch.Tensor = self._network(normalize(to_float(pixels.to(self._device))))
        return (logits / self._temperature).softmax(dim=1).double().cpu()

    def _decode(self, image: bytes, row: int) -> Any:
        try:
            return decode_image(io.BytesIO(image), self._image_size)
        except BadImageError as error:
            raise BadImageError(f"row {row} of the column image: {error}") from None


mlflow.models.set_model(LesionClassifier())
