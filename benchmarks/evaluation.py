"""How long an evaluation takes, by number of classes: metrics, page, tables and figures.

`python -m benchmarks.evaluation [CLASSES IMAGES]...`
"""

import io
import sys
import time

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from skin_resnet.evaluation.artifacts import list_artifacts
from skin_resnet.evaluation.assess import assess
from skin_resnet.evaluation.calibration import fit_calibration
from skin_resnet.evaluation.metrics import Predictions


def simulate(classes: int, images: int) -> tuple[Predictions, pd.DataFrame, tuple[str, ...]]:
    """Return random predictions, their table, and class names."""
    rng = np.random.default_rng(0)
    targets = np.arange(images) % classes
    names = tuple(f"class {index}" for index in range(classes))
    ids = [f"image_{row}" for row in range(images)]
    lesions = [f"lesion_{row // 2}" for row in range(images)]
    table = pd.DataFrame(
        {"image_id": ids, "lesion_id": lesions, "target": targets, "age": 50.0, "sex": "male"}
    )
    table["localization"] = rng.choice(["back", "face", "trunk", "scalp"], images)
    table["dx"] = pd.Categorical.from_codes(targets, list(names), ordered=True)
    probabilities = rng.dirichlet(np.ones(classes), images)
    return Predictions(probabilities=probabilities, targets=targets, image_ids=tuple(ids)), table, names


def measure(classes: int, images: int) -> None:
    """Time the steps of an evaluation and print them."""
    predictions, table, names = simulate(classes, images)
    start = time.perf_counter()
    calibration = fit_calibration(predictions, names, 0.9, np.ones(len(names), np.int64))
    assessment = assess(predictions, table, names, names[0], calibration)
    assessed = time.perf_counter()
    files = list_artifacts(assessment, "test", "Test")
    for content in files.values():
        if isinstance(content, Figure):
            content.savefig(io.BytesIO(), format="png")
    print(
        f"{classes} classes, {images} images: metrics {assessed - start:.1f} s, "
        f"{len(files)} files {time.perf_counter() - assessed:.1f} s"
    )


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:]] or [2, 90, 200, 200, 7, 1500]
    for classes, images in zip(numbers[::2], numbers[1::2], strict=True):
        measure(classes, images)
