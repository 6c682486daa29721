"""From a config to data ready to train on: table, split, image store and leakage report."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray

from skin_resnet.config import TrainConfig
from skin_resnet.data.extract import extract
from skin_resnet.data.leakage import LeakageReport, audit_split
from skin_resnet.data.loader import Loader, place_pixels
from skin_resnet.data.split import SPLITS, Split, read_split, split_lesions, thin_train
from skin_resnet.data.store import ImageStore, fingerprint_images, open_store
from skin_resnet.errors import UserError, expand

HIDDEN = -1  # the target of a test image, until the test evaluation


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A data set ready to be trained on, with the diagnoses of its test images hidden.

    `table` has the rows from `extract`, without the images that could not be read; of test images, dx is
    missing and target is `HIDDEN`.
    """

    table: pd.DataFrame
    split: Split
    store: ImageStore  # in the table's order
    leakage: LeakageReport
    split_fingerprints: Mapping[str, str]  # by split, from `fingerprint_images`

    @property
    def classes(self) -> tuple[str, ...]:
        """The class order, which is the order of a model's outputs."""
        return tuple(self.table.dx.cat.categories)

    @property
    def baseline_class(self) -> str:
        """The class with most training images."""
        return str(self.select(self.split.train).dx.mode()[0])

    @property
    def license(self) -> str:
        """The license of the images, as far as their ids tell."""
        if self.table.lesion_id.str.match("HAM_[0-9]{7}$").all():
            return "CC BY-NC 4.0 (HAM10000): no commercial use"
        return "unknown: that of the images' source"

    @property
    def class_counts(self) -> NDArray[np.int64]:
        """Training images of each class, int64 (K,)."""
        return np.bincount(self.select(self.split.train).target, minlength=len(self.classes))

    @property
    def fingerprint(self) -> str:
        """A text that changes with the split, with any diagnosis, and with any decoded pixel."""
        return "-".join(self.split_fingerprints[name] for name in SPLITS)

    def select(self, image_ids: tuple[str, ...]) -> pd.DataFrame:
        """Return the table's rows of some images, in the order of `image_ids`."""
        return self.table.iloc[self.store.find_rows(image_ids)].reset_index(drop=True)

    def build_loaders(self, fabric: Fabric, batch_size: int) -> tuple[Loader, Loader]:
        """Build the loaders of train and val, for this process's share of each batch."""
        pixels = place_pixels(self.store, fabric.device)

        def build(image_ids: tuple[str, ...]) -> Loader:
            rows = self.store.find_rows(image_ids)
            return Loader(
                pixels=pixels,
                rows=rows,
                targets=torch.tensor(self.table.target.to_numpy()[rows]),
                device=fabric.device,
                read_ahead=self.store.read_ahead,
                batch_size=batch_size,
                rank=fabric.global_rank,
                world_size=fabric.world_size,
            )

        return build(self.split.train), build(self.split.val)


def prepare_data(config: TrainConfig) -> PreparedData:
    """Read, decode, split and audit the data set of a config, and hide the diagnoses of its test images.

    Raises:
        UserError: The data cannot be used, the split is too small, or a given split leaks.
    """
    table, store = read_images(config)
    split = _choose_split(config, table, store)
    leakage = audit_split(table, split, store)
    if leakage.leaks and config.allow_leaks == "false":
        shared = leakage.pairs.iloc[0]
        raise UserError(
            f"the split leaks: {shared.split} image {shared.image_id} and {shared.seen_split} image "
            f"{shared.seen_id} share a lesion or pixels; run audit, or pass allow_leaks=true to train anyway."
        )
    is_test = table.image_id.isin(split.test)
    return PreparedData(
        table=table.assign(dx=table.dx.mask(is_test), target=table.target.mask(is_test, HIDDEN)),
        split=split,
        store=store,
        leakage=leakage,
        split_fingerprints={
            name: fingerprint_images(table[table.image_id.isin(getattr(split, name))], store)
            for name in SPLITS
        },
    )


def read_images(config: TrainConfig) -> tuple[pd.DataFrame, ImageStore]:
    """Return the table of a config's images that can be read, and their pixels."""
    table = extract(config.data, config.cache_dir)
    store = open_store(table, config.image_size, config.cache_dir, config.on_bad_image)
    return table[table.image_id.isin(store.image_ids)].reset_index(drop=True), store


def open_test(config: TrainConfig, data: PreparedData) -> pd.DataFrame:
    """Return the rows of the test images with their diagnoses. Only the test evaluation may call this."""
    table, _ = read_images(config)
    return table.iloc[data.store.find_rows(data.split.test)].reset_index(drop=True)


def _choose_split(config: TrainConfig, table: pd.DataFrame, store: ImageStore) -> Split:
    if config.split == "own":
        split = split_lesions(
            table,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
        )
    else:
        frame = read_split(expand(config.split), [*table.image_id, *store.skipped]).to_frame()
        split = Split.from_frame(frame[frame.image_id.isin(store.image_ids)])
    if config.train_fraction < 1:
        split = thin_train(table, split, config.train_fraction, config.split_seed)
    # BatchNorm cannot train on a single image.
    for name, fewest in (("train", 2 * config.devices), ("val", 1), ("test", 1)):
        if (count := len(getattr(split, name))) < fewest:
            raise UserError(
                f"{name} needs {fewest} readable images or more, but has {count}; add images, or change the "
                "split's options."
            )
    return split
