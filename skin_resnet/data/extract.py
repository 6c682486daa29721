"""The E of the ETL: any source becomes one checked table, a row an image."""

from pathlib import Path

import numpy as np
import pandas as pd

from skin_resnet.data.sources import read_source
from skin_resnet.data.text_table import refuse_any
from skin_resnet.errors import UserError
from skin_resnet.labels import order_classes

OLDEST_AGE = 130  # tables write 999 for an age that nobody knows
# What a run's tables of predictions call their other columns.
_COLUMN_NAMES = ("image_id", "lesion_id", "dx", "prediction")


def extract(source: str, cache_dir: Path, fewest_classes: int = 2) -> pd.DataFrame:
    """Read a data set and check that it can be trained on.

    Args:
        source: `demo`, `kaggle`, a folder (HAM10000 as Kaggle or Dataverse lay it out, a part of ISIC 2018
            Task 3, or a folder per class), or a CSV of path,dx[,lesion_id][,image_id,age,sex,localization].
        cache_dir: Where the demo's images are kept.
        fewest_classes: How many there must be; a finished network can be tested on images of one.

    Returns:
        A table sorted by image_id with image_id, lesion_id (the image_id where the source knows no lesions),
        dx (a categorical whose categories are the class order), target (int64, dx's place in that order),
        path (absolute), age (years, NaN where unknown), sex and localization ("unknown" where missing).

    Raises:
        UserError: The source cannot be read, or breaks a rule that training relies on.
    """
    try:
        raw = read_source(source, cache_dir.expanduser())
    except OSError as error:
        raise UserError(
            f"data={source} must be readable, but: {error}; check it and its permissions."
        ) from error
    _check_identities(raw)
    _check_classes(raw["dx"], fewest_classes)
    dx = pd.Categorical(raw["dx"], categories=order_classes(set(raw["dx"])), ordered=True)
    table = pd.DataFrame(
        {
            "image_id": raw["image_id"],
            "lesion_id": raw.get("lesion_id", raw["image_id"]),
            "dx": dx,
            "target": dx.codes.astype(np.int64),
            "path": raw["path"],
            "age": _read_ages(raw),
            "sex": _fill_unknown(raw, "sex").str.lower(),
            "localization": _fill_unknown(raw, "localization"),
        }
    )
    return table.sort_values("image_id", ignore_index=True)


def get_class_names(table: pd.DataFrame) -> tuple[str, ...]:
    """Give the class order that an extracted table carries."""
    return tuple(table["dx"].cat.categories)


def has_lesion_ids(table: pd.DataFrame) -> bool:
    """Say whether the source of an extracted table tells which images show the same lesion."""
    return not table["lesion_id"].equals(table["image_id"])


def _check_identities(raw: pd.DataFrame) -> None:
    """Refuse what would let one image or lesion stand for two."""
    for column in ("image_id", "path"):
        refuse_any(
            raw[column][raw[column].duplicated()],
            rule=f"Every {column} must occur once",
            problem="more than one row has",
            remedy="give each image one row and an image_id of its own",
        )
    if "lesion_id" in raw:
        diagnoses = raw.groupby("lesion_id")["dx"].nunique()
        refuse_any(
            diagnoses.index[diagnoses > 1],
            rule="All images of a lesion must have the same dx",
            problem="they differ for lesion",
            remedy="correct dx or lesion_id",
        )


def _check_classes(dx: "pd.Series[str]", fewest: int) -> None:
    """Refuse too few classes, and names that would be taken for one another or for a column."""
    names = pd.Series(sorted(dx.unique()), dtype="str")
    if len(names) < fewest:
        raise UserError(f"data must have at least two classes, but every dx is {names[0]!r}; add another.")
    refuse_any(
        [name for name in names if not _can_name_metrics(name) or name in _COLUMN_NAMES],
        rule=f"dx must name its class in a printable word or a few, and not be {', '.join(_COLUMN_NAMES)}",
        problem="it is",
        remedy="rename the class",
    )
    # MLflow's names of metrics have letters, digits and these signs only.
    spellings = names.str.casefold().str.replace(r"[^\w./ -]", "_", regex=True)
    refuse_any(
        names[spellings.duplicated(keep=False)],
        rule="Classes must differ by more than capitals and signs",
        problem="another is spelt like",
        remedy="give the same class the same name, and others another",
    )


def _can_name_metrics(name: str) -> bool:
    return name.isprintable() and len(name) <= 100 and {"", ".", ".."}.isdisjoint(name.split("/"))


def _read_ages(raw: pd.DataFrame) -> "pd.Series[float]":
    if "age" not in raw:
        return pd.Series(np.nan, index=raw.index)
    ages = pd.to_numeric(raw["age"], errors="coerce").astype(float)
    refuse_any(
        raw["age"][raw["age"].notna() & ~ages.between(0, OLDEST_AGE)],
        rule=f"age must be a number of years up to {OLDEST_AGE} or empty",
        problem="it is",
        remedy="correct it",
    )
    return ages


def _fill_unknown(raw: pd.DataFrame, column: str) -> "pd.Series[str]":
    if column not in raw:
        return pd.Series("unknown", index=raw.index, dtype="str")
    return raw[column].fillna("unknown")
