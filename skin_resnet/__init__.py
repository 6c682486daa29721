"""Train ResNets on dermoscopy images, track every run in MLflow, and trust the numbers."""
