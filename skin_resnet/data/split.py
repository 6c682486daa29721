"""Train, val and test by lesion: two photos of one lesion never end up on two sides."""

import hashlib
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
import pandas as pd

from skin_resnet.errors import UserError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which images train the network, choose its best epoch, and test it; image ids, each sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Give the split as a table of image_id and split, sorted by image_id."""
        rows = [(image_id, name) for name in SPLITS for image_id in getattr(self, name)]
        return pd.DataFrame(sorted(rows), columns=["image_id", "split"])

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> "Split":
        """Read a table of image_id and split back."""
        return cls(**{name: tuple(sorted(frame.image_id[frame.split == name])) for name in SPLITS})

    def without(self, image_ids: set[str]) -> "Split":
        """Leave images out."""
        frame = self.to_frame()
        return Split.from_frame(frame[~frame.image_id.isin(image_ids)])

    @property
    def hash(self) -> str:
        """Twelve hex digits that name this split: equal if and only if every image is on the same side."""
        return hashlib.sha256(self.to_frame().to_csv(index=False).encode()).hexdigest()[:12]


def split_lesions(table: pd.DataFrame, *, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Split the images by lesion, stratified by class.

    Lesions are put in an order drawn from `seed` and their own name, so the split depends neither on the
    order of the rows nor on other classes. Each class fills test, then val, each up to its fraction of the
    images; a class with three lesions or more is in all three.

    Args:
        table: Rows from `extract`.
        val_fraction: Share of each class's images for val.
        test_fraction: Share of each class's images for test.
        seed: Which of the possible splits.

    Raises:
        UserError: A part would be empty.
    """
    lesions = pd.DataFrame({"group": join_lesions(table), "target": table.target, "image_id": table.image_id})
    sides: dict[str, str] = {}
    for _, members in lesions.groupby("target"):
        sizes = members.groupby("group").size()
        order = sorted(sizes.index, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
        sides.update(_fill_sides(sizes[order], test_fraction, val_fraction))
    side = lesions.group.map(sides)
    split = Split.from_frame(pd.DataFrame({"image_id": table.image_id, "split": side}))
    for name in SPLITS:
        if not getattr(split, name):
            raise UserError(
                f"train, val and test each need a lesion, but {name} would be empty with "
                f"{lesions.group.nunique()} lesions in all; add images or raise {name}_fraction."
            )
    return split


def _fill_sides(sizes: "pd.Series[int]", test_fraction: float, val_fraction: float) -> dict[str, str]:
    sides = dict.fromkeys(sizes.index, "train")
    remaining = list(sizes.index)
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        target = fraction * sizes.sum()
        filled = 0
        # One lesion at least, while two are left for the other parts.
        while len(remaining) > 2 - (name == "val") and (
            filled == 0 or filled + sizes[remaining[0]] / 2 <= target
        ):
            group = remaining.pop(0)
            sides[group] = name
            filled += sizes[group]
    return sides


def thin_train(table: pd.DataFrame, split: Split, fraction: float, seed: int) -> Split:
    """Keep a share of the training lesions of each class, one at least; val and test stay as they are.

    The lesions of a smaller share are among those of a larger one.
    """
    rows = table[table.image_id.isin(split.train)]
    lesions = join_lesions(rows)
    kept: set[str] = set()
    for _, groups in lesions.groupby(rows.target):
        order = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
        # From the other end than val and test were filled, which have taken the first.
        kept.update(order[-max(1, round(fraction * len(order))) :])
    return replace(split, train=tuple(sorted(rows.image_id[lesions.isin(kept)])))


def join_lesions(table: pd.DataFrame) -> "pd.Series[str]":
    """Name each image's lesion, with lesions joined that are published as one.

    HAM10000 lists 18 pairs of photos of one lesion under two lesion ids.
    Source: Abhishek, Jain, Hamarneh, Scientific Data 12:196 (2025).
    """
    pairs = pd.read_csv(str(resources.files("skin_resnet.data") / "same_lesion_pairs.csv"))
    lesion_of = dict(zip(table.image_id, table.lesion_id, strict=True))
    first_name: dict[str, str] = {}

    def find(lesion: str) -> str:
        while lesion in first_name:
            lesion = first_name[lesion]
        return lesion

    for image_1, image_2 in zip(pairs.image_id_1, pairs.image_id_2, strict=True):
        if image_1 in lesion_of and image_2 in lesion_of:
            one, other = sorted((find(lesion_of[image_1]), find(lesion_of[image_2])))
            if one != other:
                first_name[other] = one
    return table.lesion_id.map(find)


def drop_seen(table: pd.DataFrame, split: Split) -> pd.DataFrame:
    """Leave out the images that were in train or val, and every other photo of their lesions."""
    lesions = join_lesions(table)
    learnt = lesions[table.image_id.isin({*split.train, *split.val})]
    return table[~lesions.isin(set(learnt))].reset_index(drop=True)


def count_classes(table: pd.DataFrame, split: Split) -> pd.DataFrame:
    """Count each class's images in each part: rows are classes, columns train, val and test."""
    side = table.image_id.map(dict(split.to_frame().to_numpy()))
    counts = pd.crosstab(table.dx, side, dropna=False)
    return counts.reindex(index=table.dx.cat.categories, columns=list(SPLITS), fill_value=0).astype(np.int64)
