"""The three steps of the ETL in a row: what every command that sees images begins with."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric

from skin_resnet.config import TrainConfig
from skin_resnet.data.extract import extract, get_class_names
from skin_resnet.data.leakage import LeakPassport, audit_split, read_split
from skin_resnet.data.loader import Loader, PixelSource, place_pixels
from skin_resnet.data.split import SPLITS, Split, split_lesions, thin_train
from skin_resnet.data.store import ImageStore, open_store
from skin_resnet.errors import UserError

SEALED = -1  # the target of a test image, until the test is opened


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A data set, ready to be trained on, its test sealed.

    Attributes:
        table: Rows from `extract`, without the images that could not be read; of test images, dx is missing
            and target is `SEALED`.
        split: Which of them train, choose the best epoch, and test.
        store: Their pixels, in the table's order.
        passport: What the splits share.
    """

    table: pd.DataFrame
    split: Split
    store: ImageStore
    passport: LeakPassport

    @property
    def classes(self) -> tuple[str, ...]:
        """The class order, which is the order of a model's outputs."""
        return get_class_names(self.table)

    def select(self, image_ids: tuple[str, ...]) -> pd.DataFrame:
        """Give the table's rows of some images, in the order of `image_ids`."""
        return self.table.iloc[self.store.find_rows(image_ids)].reset_index(drop=True)

    def build_loader(
        self, image_ids: tuple[str, ...], source: PixelSource, fabric: Fabric, batch_size: int
    ) -> Loader:
        """Build the loader of some images, for this process's share of each batch."""
        rows = self.store.find_rows(image_ids)
        return Loader(
            source=source,
            rows=rows,
            targets=torch.tensor(self.table.target.to_numpy()[rows]),
            batch_size=batch_size,
            rank=fabric.global_rank,
            world_size=fabric.world_size,
        )

    def place(self, fabric: Fabric) -> PixelSource:
        """Put the pixels where batches are gathered."""
        return place_pixels(self.store, fabric.device)


def prepare_data(config: TrainConfig) -> PreparedData:
    """Extract, transform and split the data set of a config, and seal its test.

    Raises:
        UserError: The data cannot be used, or the split given leaks; the message says what to do.
    """
    table, store = read_images(config)
    if config.split == "own":
        split = split_lesions(
            table,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction,
            seed=config.split_seed,
        )
    else:
        split = read_split(Path(config.split).expanduser(), [*table.image_id, *store.skipped])
        split = split.without(set(store.skipped))
        for name in SPLITS:
            if not getattr(split, name):
                raise UserError(
                    f"train, val and test each need an image that can be read, but {config.split} has none "
                    f"in {name}; add some."
                )
    if config.train_fraction < 1:
        split = thin_train(table, split, config.train_fraction, config.split_seed)
    passport = audit_split(table, split, store.pixels)
    if passport.leaks and config.allow_leaks == "false":
        shared = passport.pairs.iloc[0]
        raise UserError(
            f"no split may share a lesion with another, but in {config.split} {shared.image_id} "
            f"({shared.split}) and {shared.seen_id} ({shared.seen_split}) show one; run audit, or pass "
            "allow_leaks=true to train all the same."
        )
    is_test = table.image_id.isin(split.test)
    sealed = table.assign(dx=table.dx.mask(is_test), target=table.target.mask(is_test, SEALED))
    return PreparedData(table=sealed, split=split, store=store, passport=passport)


def read_images(config: TrainConfig) -> tuple[pd.DataFrame, ImageStore]:
    """Extract and transform: give the table of a config's images that can be read, and their pixels."""
    table = extract(config.data, config.cache_dir)
    store = open_store(table, config.image_size, config.cache_dir, config.on_bad_image)
    return table[table.image_id.isin(store.image_ids)].reset_index(drop=True), store


def open_test(config: TrainConfig, data: PreparedData) -> pd.DataFrame:
    """Break the seal: give the rows of the test images with their diagnoses. Only a test may call this."""
    table, _ = read_images(config)
    return table.iloc[data.store.find_rows(data.split.test)].reset_index(drop=True)
