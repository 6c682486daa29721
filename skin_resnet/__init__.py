"""Train ResNets on dermoscopy images, track every run in MLflow, and trust the numbers."""

__version__ = "0.2.0"
