"""Images a second, not decoded yet: `predict`, which decodes the next batch meanwhile, beside decoding first.

`python -m benchmarks.predict [FOLDER]`; without a folder of images it draws some as large as HAM10000's.
Decoding first is what `evaluate` does, which then shares the decoded images with later runs.
"""

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import torch

from benchmarks.store import draw_images
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.sources import list_images
from skin_resnet.data.store import open_store
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.model.classifier import Classifier, build_classifier
from skin_resnet.model.resnet import build_resnet
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import predict

SIZES = (64, 224)
BATCH_SIZE = 64
ROUNDS = 3
IMAGES = 256


def build_checkpoint(image_size: int) -> dict[str, object]:
    """Return the checkpoint of a ResNet-50 that knows nothing."""
    calibration = {"temperature": 1.0, "decision_weights": [1.0] * 7, "least_probability": 0.5}
    return {
        "arch": "resnet50", "classes": HAM10000_CLASSES, "image_size": image_size, "epoch": 1, "run_id": "",
        "network": build_resnet("resnet50", 7).state_dict(), "calibration": calibration, "license": "",
        "familiarity": {"center": torch.zeros(256), "whitening": torch.eye(256)},
    }  # fmt: skip


def time_predict(classifier: Classifier, paths: list[Path]) -> float:
    """Return the seconds in which `predict` classifies images."""
    start = time.perf_counter()
    classifier.predict(paths, BATCH_SIZE)
    return time.perf_counter() - start


def time_evaluate(classifier: Classifier, paths: list[Path]) -> float:
    """Return the seconds in which `evaluate` decodes images into a store and predicts them."""
    start, fabric = time.perf_counter(), build_fabric("auto", "auto", devices=1)
    table = pd.DataFrame({"image_id": map(str, paths), "path": map(str, paths)})
    with TemporaryDirectory() as cache:
        store = open_store(table, classifier.facts["image_size"], Path(cache), "stop")
        loader = Loader(
            pixels=place_pixels(store, fabric.device),
            device=fabric.device,
            rows=np.arange(len(paths)),
            targets=torch.zeros(len(paths), dtype=torch.int64),
            batch_size=BATCH_SIZE,
        )
        predict(classifier.networks[0], loader, fabric)
    return time.perf_counter() - start


def main() -> None:
    """Compare on the folder of the command line, or on drawn images."""
    with TemporaryDirectory() as scratch:
        if len(sys.argv) == 1:
            draw_images(Path(scratch))
        paths = list_images(Path(sys.argv[1] if len(sys.argv) > 1 else scratch))[:IMAGES]
        fabric = build_fabric("auto", "auto", devices=1)
        for size in SIZES:
            classifier = build_classifier(build_checkpoint(size), fabric.device, fabric.autocast)
            time_predict(classifier, paths[:BATCH_SIZE])  # what is slow the first time
            # In turns, for the machine may be busy with something else.
            rounds = [
                (time_predict(classifier, paths), time_evaluate(classifier, paths)) for _ in range(ROUNDS)
            ]
            ours, theirs = (len(paths) / min(seconds) for seconds in zip(*rounds, strict=True))
            print(f"{size} px: predict {ours:.0f}, decoding first {theirs:.0f} img/s, x{ours / theirs:.2f}")


if __name__ == "__main__":
    main()
