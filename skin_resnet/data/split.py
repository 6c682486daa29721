"""Split into train, val and test by lesion: images of one lesion never end up in two splits."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import pandas as pd

from skin_resnet.data.tables import read_table, reject
from skin_resnet.errors import UserError

SPLITS = ("train", "val", "test")
_ALIASES = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}


@dataclass(frozen=True, kw_only=True)
class Split:
    """The image ids for training, for choosing the best epoch, and for the test; each sorted."""

    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return a table of image_id and split, sorted by image_id."""
        rows = [(image_id, name) for name in SPLITS for image_id in getattr(self, name)]
        return pd.DataFrame(sorted(rows), columns=["image_id", "split"])

    @classmethod
    def from_frame(cls, frame: pd.DataFrame) -> "Split":
        """Build a split from a table of image_id and split."""
        return cls(**{name: tuple(sorted(frame.image_id[frame.split == name])) for name in SPLITS})

    @property
    def hash(self) -> str:
        """Twelve hex digits, equal for two splits if and only if every image is in the same split."""
        return hashlib.sha256(self.to_frame().to_csv(index=False).encode()).hexdigest()[:12]


def split_lesions(table: pd.DataFrame, *, val_fraction: float, test_fraction: float, seed: int) -> Split:
    """Split the images by lesion, stratified by class.

    Lesions are ordered by a hash of `seed` and their id, so the split depends neither on the order of the
    rows nor on other classes. Each class fills test, then val, each up to its fraction of the
    images; a class with three or more lesions is in all three.

    Raises:
        UserError: A split would be empty.
    """
    lesions = pd.DataFrame({"group": join_lesions(table), "target": table.target, "image_id": table.image_id})
    split_of: dict[str, str] = {}
    for _, members in lesions.groupby("target"):
        sizes = members.groupby("group").size()
        split_of.update(_assign_lesions(sizes[_order(sizes.index, seed)], test_fraction, val_fraction))
    split = Split.from_frame(lesions.assign(split=lesions.group.map(split_of)))
    for name in SPLITS:
        if not getattr(split, name):
            raise UserError(
                f"{name} would be empty: the data has {lesions.group.nunique()} lesions in all; add "
                f"images, or raise {name}_fraction."
            )
    return split


def _order(lesions: Iterable[str], seed: int) -> list[str]:
    return sorted(lesions, key=lambda lesion: hashlib.sha256(f"{seed}:{lesion}".encode()).digest())


def _assign_lesions(sizes: "pd.Series[int]", test_fraction: float, val_fraction: float) -> dict[str, str]:
    """Fill test, then val, from the front of one class's lesions; the rest is train."""
    split_of = dict.fromkeys(sizes.index, "train")
    remaining = list(sizes.index)
    for name, fraction in (("test", test_fraction), ("val", val_fraction)):
        target = fraction * sizes.sum()
        filled = 0
        # At least one lesion, as long as the other splits can have one each.
        while len(remaining) > 2 - (name == "val") and (
            filled == 0 or filled + sizes[remaining[0]] / 2 <= target
        ):
            group = remaining.pop(0)
            split_of[group] = name
            filled += sizes[group]
    return split_of


def read_split(file: Path, image_ids: Iterable[str]) -> Split:
    """Read a table of image_id and split (train, val, test, or a usual synonym); val may be empty.

    Raises:
        UserError: The file is not such a table, has images that are not among these, or an empty split.
    """
    frame = read_table(file, ("image_id", "split"))
    frame["split"] = frame.split.str.lower().replace(_ALIASES)
    unknown = frame.image_id[~frame.image_id.isin(set(image_ids))]
    reject(unknown, f"{file.name} has an image_id that is not in the data", "pass the data that was split")
    others = frame.split[~frame.split.isin(SPLITS)]
    reject(others, f"{file.name} has a split other than {', '.join(SPLITS)}", "rename it or remove the row")
    empty = [name for name in ("train", "test") if name not in set(frame.split)]
    reject(empty, f"{file.name} has no image in", "check that the file is complete")
    return Split.from_frame(frame)


def thin_train(table: pd.DataFrame, split: Split, fraction: float, seed: int) -> Split:
    """Keep a fraction of each class's training lesions, at least one; val and test stay as they are.

    The lesions of a smaller fraction are among those of a larger one.
    """
    rows = table[table.image_id.isin(split.train)]
    lesions = join_lesions(rows)
    kept: set[str] = set()
    for _, groups in lesions.groupby(rows.target):
        order = _order(groups.unique(), seed)
        # From the end: val and test have taken the first.
        kept.update(order[-max(1, round(fraction * len(order))) :])
    return replace(split, train=tuple(sorted(rows.image_id[lesions.isin(kept)])))


def join_lesions(table: pd.DataFrame) -> "pd.Series[str]":
    """Return each image's lesion id, with lesions joined that are published as the same one.

    HAM10000 lists 18 pairs of images of one lesion under two lesion ids.
    Source: Abhishek, Jain, Hamarneh, Scientific Data 12:196 (2025).
    """
    pairs = pd.read_csv(str(resources.files("skin_resnet.data") / "same_lesion_pairs.csv"))
    lesions = table.set_index("image_id").lesion_id
    for first, second in zip(pairs.image_id_1, pairs.image_id_2, strict=True):
        if first in lesions and second in lesions:
            kept, other = sorted((lesions[first], lesions[second]))
            lesions = lesions.where(lesions != other, kept)
    return lesions.set_axis(table.index)


def drop_seen(table: pd.DataFrame, split: Split) -> pd.DataFrame:
    """Return the rows without the images in train and val, and without other images of their lesions."""
    lesions = join_lesions(table)
    seen = lesions[table.image_id.isin({*split.train, *split.val})]
    return table[~lesions.isin(set(seen))].reset_index(drop=True)
