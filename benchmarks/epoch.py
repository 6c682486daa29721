"""Where the time of an epoch goes: `python -m benchmarks.epoch`.

Trains a ResNet-50 on the demo data at 64 px, then times the same epoch's batches without the network, and the
tracking calls an epoch makes, all in one run.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlflow

from skin_resnet.config import TrainConfig
from skin_resnet.data.augment import RECIPES, augment, mix
from skin_resnet.data.prepare import prepare_data
from skin_resnet.model.preprocess import normalize, to_float
from skin_resnet.model.resnet import build_resnet
from skin_resnet.tracking import run as mlflow_run
from skin_resnet.tracking.records import EpochLog
from skin_resnet.training.checkpoint import save_checkpoint
from skin_resnet.training.device import build_fabric
from skin_resnet.training.engine import fit, seed_step
from skin_resnet.training.state import build_state

EPOCHS = 3


def measure(action: Callable[[], object], times: int = 5) -> float:
    """Return the median duration of an action in seconds."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    """Measure and print."""
    config = TrainConfig(image_size=64, epochs=EPOCHS)
    data = prepare_data(config)
    fabric = build_fabric(config.device, config.precision, config.devices)
    train, val = data.build_loaders(fabric, config.batch_size)
    state = build_state(config, fabric, build_resnet(config.arch), train, len(data.classes))
    results = list(fit(state, train, val))
    epoch_s = statistics.median(result.seconds for result in results)

    def feed() -> None:
        for step, batch in enumerate(train.shuffled(config.seed, 0)):
            generator = seed_step(config.seed, 0, step, 0)
            images = augment(to_float(batch.pixels), RECIPES[config.augment], generator)
            images, _ = mix(images, batch.targets, len(data.classes), config.mixup, config.cutmix, generator)
            normalize(images)

    feeding_s = measure(feed)
    with tempfile.TemporaryDirectory() as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        with mlflow_run.open_run("benchmark") as run:
            tracking_s = measure(lambda: EpochLog(run.run_id).write(results[-1]), times=20)
        saving_s = measure(
            lambda: save_checkpoint(Path(folder) / "best.pt", {"n": state.network.state_dict()})
        )
    print(
        f"epoch of {len(train.rows)} images at 64 px on {fabric.device.type}: {epoch_s:.2f} s, val included"
    )
    for name, seconds in (
        ("load + augment", feeding_s),
        ("tracking", tracking_s),
        ("a better epoch's checkpoint", saving_s),
    ):
        print(f"  {name:28} {seconds * 1000:7.1f} ms   {seconds / epoch_s:6.2%} of the epoch")


if __name__ == "__main__":
    main()
