"""What a training prints: a header, a bar while an epoch runs, a line when it is done."""

import os
import sys
from collections.abc import Iterable, Iterator

from lightning_fabric import Fabric
from tqdm import tqdm

from skin_resnet.config import TrainConfig
from skin_resnet.data.loader import Batch, Loader
from skin_resnet.data.prepare import PreparedData
from skin_resnet.data.split import SPLITS
from skin_resnet.training.engine import EpochResult, Progress
from skin_resnet.training.state import TrainingState


def describe_start(config: TrainConfig, data: PreparedData, fabric: Fabric, weights: str) -> str:
    """Return what is about to be trained, on what data."""
    sizes = ", ".join(f"{len(getattr(data.split, name))} {name}" for name in SPLITS)
    skipped = f", {len(data.store.skipped)} skipped" if data.store.skipped else ""
    precision = {"32-true": "fp32"}.get(fabric.strategy.precision.precision, "bf16")
    known = data.leakage.knows_lesions
    lesions = f"{data.table.lesion_id.nunique()} lesions" if known else "no lesion ids"
    return (
        f"data      {config.data}: {len(data.table)} images, {lesions}{skipped}, {data.store.image_size} px\n"
        f"split     {sizes} ({data.split.hash})\n"
        f"model     {config.arch}, {weights}\n"
        f"training  {config.epochs} epochs on {fabric.world_size} x {fabric.device.type} ({precision}), "
        f"{config.optimizer} lr {config.lr:g}, augment {config.augment}\n"
        "\nloss and balanced accuracy (bacc) are train/val, AUC is val's; *: best so far\n"
    )


def describe_epoch(result: EpochResult, config: TrainConfig, *, is_best: bool) -> str:
    """Return an epoch in one line of up to 80 columns that begins with `epoch N/M`."""
    train, val = result.train, result.val
    return (
        f"epoch {result.epoch}/{config.epochs}  loss {train.loss:.3f}/{val.loss:.3f}  "
        f"bacc {train.balanced_accuracy:.3f}/{val.balanced_accuracy:.3f}  AUC {val.macro_auc:.3f}  "
        f"{result.images_per_s:.0f} img/s  {result.seconds:.0f} s{' *' if is_best else ''}"
    )


def show_progress(state: TrainingState, loader: Loader) -> Progress:
    """Return what shows a bar, with images per second and remaining time, on a terminal only."""
    is_shown = state.fabric.is_global_zero and sys.stderr.isatty() and "TQDM_DISABLE" not in os.environ

    def show(batches: Iterable[Batch], epoch: int) -> Iterator[Batch]:
        with tqdm(
            desc=f"epoch {epoch}/{state.config.epochs}",
            total=len(loader.rows),
            initial=len(loader.rows) * state.step // len(loader),
            unit=" img",
            leave=False,
            disable=not is_shown,
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.targets))

    return show
