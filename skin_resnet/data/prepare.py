"""The three steps of the ETL in a row: what every command that sees images begins with."""

from dataclasses import dataclass

import pandas as pd
import torch
from lightning_fabric import Fabric

from skin_resnet.config import TrainConfig
from skin_resnet.data.extract import extract, get_class_names
from skin_resnet.data.load import Loader, PixelSource, place_pixels
from skin_resnet.data.split import Split, split_lesions
from skin_resnet.data.transform import ImageStore, open_store


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A data set, ready to be trained on.

    Attributes:
        table: Rows from `extract`, without the images that could not be read.
        split: Which of them train, choose the best epoch, and test.
        store: Their pixels, in the table's order.
    """

    table: pd.DataFrame
    split: Split
    store: ImageStore

    @property
    def classes(self) -> tuple[str, ...]:
        """The class order, which is the order of a model's outputs."""
        return get_class_names(self.table)

    def select(self, image_ids: tuple[str, ...]) -> pd.DataFrame:
        """Give the table's rows of some images, in the order of `image_ids`."""
        return self.table.iloc[self.store.find_rows(image_ids)]

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
    """Extract, transform and split the data set of a config.

    Raises:
        UserError: The data cannot be used; the message says what to do.
    """
    table = extract(config.data, config.cache_dir)
    store = open_store(table, config.image_size, config.cache_dir, config.on_bad_image)
    table = table[table.image_id.isin(store.image_ids)].reset_index(drop=True)
    split = split_lesions(
        table,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
    return PreparedData(table=table, split=split, store=store)
