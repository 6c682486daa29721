"""Train ResNets on dermoscopy images, track every run in MLflow, and trust the numbers."""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"
_PLACES = {"TrainConfig": "config", "load_model": "tracking.models", "run_training": "training.run"}


def __getattr__(name: str) -> Any:  # so that `import skin_resnet` waits for nothing
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"skin_resnet.{_PLACES[name]}"), name)
