"""Logs the model that serves a checkpoint, with its code and requirements."""

import importlib.metadata
import tempfile
from pathlib import Path

import mlflow

import skin_resnet
from skin_resnet.tracking import serving


def log_model(checkpoint: Path, classes: tuple[str, ...]) -> str:
    """Log a checkpoint and the code that serves it as a model of the active run, and return its URI."""
    package = Path(skin_resnet.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        # A copy without caches: MLflow takes along whatever lies in the folder.
        code = Path(folder) / package.name
        for file in package.rglob("*"):
            if file.suffix in {".py", ".csv"}:
                copy = code / file.relative_to(package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=serving.__file__,
            code_paths=[str(code)],
            artifacts={"checkpoint": str(checkpoint)},
            signature=serving.build_signature(classes),
            input_example=serving.draw_example(),
            pip_requirements=[
                f"{name}=={importlib.metadata.version(name).split('+')[0]}" for name in serving.REQUIREMENTS
            ],
        )
    return str(info.model_uri)
