"""Images a second, not decoded yet: `predict` beside decoding first, and requests to a served model.

`python -m benchmarks.predict [FOLDER]`; without a folder of images it draws some as large as HAM10000's.
`predict` decodes the next batch meanwhile. Decoding first is what `evaluate` does, which then shares the
decoded images with later runs. The served model is that of `mlflow models serve`, with one client at a time.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import numpy as np
import pandas as pd
import torch

from benchmarks.results import keep
from benchmarks.serving import Request, send, serve, split, to_text
from benchmarks.store import draw_images
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.sources import list_images
from skin_resnet.data.store import open_store
from skin_resnet.evaluation.page import format_table
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.model.classifier import Classifier, build_classifier
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking.run import TrackedRun
from skin_resnet.training.checkpoint import save_checkpoint
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import predict

SIZES = (64, 224)
BATCH_SIZE = 64
ROUNDS = 3
IMAGES = 256
REQUEST_S = 20  # how long requests of one size are sent


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


@contextmanager
def serve_checkpoint(checkpoint: dict[str, object]) -> Iterator[Callable[[list[bytes]], object]]:
    """Serve a checkpoint's model; yield what sends it images."""
    with TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "best.pt", checkpoint)
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        experiment = mlflow.create_experiment("served", artifact_location=Path(folder, "artifacts").as_uri())
        with mlflow.start_run(experiment_id=experiment) as run:
            uri = TrackedRun(run.info.run_id).log_model(Path(folder) / "best.pt")
        with serve(mlflow.artifacts.download_artifacts(uri), Path(folder)) as (url, _):

            def ask(images: list[bytes]) -> None:
                body = split([to_text(each) for each in images])
                assert send(url, Request(kind="good", body=body)).status == 200

            yield ask


def time_requests(ask: Callable[[list[bytes]], object], images: list[bytes]) -> list[str]:
    """Return images a second, the latency (median and 99th percentile, in ms), and how often it was asked."""
    ask(images)  # what is slow the first time
    seconds: list[float] = []
    while sum(seconds) < REQUEST_S:
        start = time.perf_counter()
        ask(images)
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return [f"{len(images) * len(seconds) / sum(seconds):.1f}", f"{p50:.0f}", f"{p99:.0f}", f"{len(seconds)}"]


def compare_requests(size: int, classifier: Classifier, paths: list[Path]) -> Iterator[list[str]]:
    """Yield a row for each way to ask and number of images."""
    files = [path.read_bytes() for path in paths[:64]]
    with serve_checkpoint(build_checkpoint(size)) as ask:
        for name, way in (("Classifier.predict", classifier.predict), ("served", ask)):
            for count in (1, 8, 64):
                yield [f"{size} px", name, f"{count}", *time_requests(way, files[:count])]


def main() -> None:
    """Measure on the folder of the command line, or on drawn images, and keep the tables."""
    batches, requests = [], []
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
            batches.append([f"{size} px", f"{ours:.0f}", f"{theirs:.0f}", f"{ours / theirs:.2f}x"])
            requests.extend(compare_requests(size, classifier, paths))
    first = format_table(["", "predict [img/s]", "decoding first [img/s]", ""], batches)
    second = format_table(["", "asked by", "images", "img/s", "p50 [ms]", "p99 [ms]", "requests"], requests)
    keep("predict", f"{first}\n\n{second}", data=sys.argv[1] if len(sys.argv) > 1 else "drawn")


if __name__ == "__main__":
    main()
