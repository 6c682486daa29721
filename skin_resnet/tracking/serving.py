"""The logged model: image bytes in, a table of predictions out; it carries all that this needs.

MLflow runs this file as the model's code ("models from code"): nothing is pickled, and a copy of the package
is logged with it (`code_paths`), so that the model loads where the package is not installed.
"""

import io
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.models import ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array
from PIL import Image

import skin_resnet
from skin_resnet.data.tables import replace_nan
from skin_resnet.model.classifier import build_classifier
from skin_resnet.training.checkpoint import read_checkpoint

# What loading and predicting needs, besides the package itself.
REQUIREMENTS = ("torch", "torchvision", "numpy", "pandas", "pillow")
MOST_SERVED = 64  # images in a request to a server, which answers 504 after a minute
_KINDS: Any = {"string": DataType.string, "double": DataType.double, "strings": Array(DataType.string)}


def log_model(checkpoint: Path) -> str:
    """Log a checkpoint and the code that serves it as a model of the active run, and return its URI."""
    classifier = build_classifier(read_checkpoint(checkpoint), torch.device("cpu"))
    columns = classifier.columns.items()
    answer: list[Any] = [ColSpec(_KINDS[kind], name, required=name == "error") for name, kind in columns]
    example = io.BytesIO()
    Image.new("RGB", (64, 48), (222, 178, 154)).save(example, "PNG")
    with tempfile.TemporaryDirectory() as folder:
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=__file__,
            code_paths=[str(_copy_package(Path(folder)))],
            artifacts={"checkpoint": str(checkpoint)},
            signature=ModelSignature(Schema([ColSpec(DataType.binary, "image")]), Schema(answer)),
            input_example=pd.DataFrame({"image": [example.getvalue()]}),
            metadata={"data_license": classifier.facts["license"]},
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in REQUIREMENTS],
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
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._classifier = build_classifier(read_checkpoint(Path(context.artifacts["checkpoint"])), device)

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return a row per image file in the column `image`, as `Classifier.predict` does.

        A request to a server with more than `MOST_SERVED` images is an MlflowException.
        """
        is_served = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT" in os.environ
        if is_served and len(model_input) > MOST_SERVED:
            message = f"a request has at most {MOST_SERVED} images, not {len(model_input)}; send several"
            raise mlflow.MlflowException(message, INVALID_PARAMETER_VALUE)
        # Of CSV, MLflow hands over text, which must not be taken for a path on the server.
        files = [each if isinstance(each, bytes) else b"no bytes" for each in model_input["image"]]
        table = self._classifier.predict(files).set_axis(model_input.index)
        return replace_nan(table) if is_served else table  # a server answers in JSON


mlflow.models.set_model(LesionClassifier())
