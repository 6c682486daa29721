"""Turn any source into one checked table with a row per image."""

from pathlib import Path

import numpy as np
import pandas as pd

from skin_resnet.data.sources import read_source
from skin_resnet.data.tables import reject
from skin_resnet.errors import UserError, expand_cache
from skin_resnet.labels import order_classes

_OLDEST_AGE = 130  # tables write 999 for an unknown age
# The other columns of tables of predictions.
_COLUMN_NAMES = (
    *("image_id", "lesion_id", "dx", "prediction", "name", "set", "p_malignant", "refer", "unfamiliarity"),
    *("model_version", "error", "image", "path", "file", "overlay"),
)


def extract(source: str, cache_dir: Path, fewest_classes: int = 2) -> pd.DataFrame:
    """Read a data set and check that it can be trained on.

    Args:
        source: `demo`, `kaggle`, a folder (HAM10000 as Kaggle or Dataverse lay it out, a part of ISIC 2018
            Task 3, or a folder per class), or a CSV of path,dx[,lesion_id][,image_id,age,sex,localization].
        cache_dir: Where the demo's images are kept.
        fewest_classes: How many there must be; a finished network can be tested on images of one.

    Returns:
        A table sorted by image_id with image_id, lesion_id (the image_id where the source has no lesion ids),
        dx (a categorical whose categories are the class order), target (int64, dx's place in that order),
        path (absolute), age (years, NaN where unknown), sex and localization ("unknown" where missing).

    Raises:
        UserError: The source cannot be read, or breaks a rule that training relies on.
    """
    try:
        raw = read_source(source, expand_cache(cache_dir))
    except OSError as error:
        raise UserError(f"cannot read data={source}: {error}; check the path and its permissions.") from error
    _check_identities(raw)
    _check_classes(raw["dx"], fewest_classes)
    unknown = pd.Series(np.nan, index=raw.index, dtype="str")
    dx = pd.Categorical(raw["dx"], categories=order_classes(set(raw["dx"])), ordered=True)
    table = pd.DataFrame(
        {
            "image_id": raw["image_id"],
            "lesion_id": raw.get("lesion_id", raw["image_id"]),
            "dx": dx,
            "target": dx.codes.astype(np.int64),
            "path": raw["path"],
            "age": _read_ages(raw.get("age", unknown)),
            "sex": raw.get("sex", unknown).fillna("unknown").str.lower(),
            "localization": raw.get("localization", unknown).fillna("unknown"),
        }
    )
    return table.sort_values("image_id", ignore_index=True)


def has_lesion_ids(table: pd.DataFrame) -> bool:
    """Return whether the source of an extracted table says which images show the same lesion."""
    return not table["lesion_id"].equals(table["image_id"])


def _check_identities(raw: pd.DataFrame) -> None:
    """Reject what would let one image or lesion stand for two."""
    for column in ("image_id", "path"):
        repeated = raw[column][raw[column].duplicated()]
        reject(repeated, f"two rows have the same {column}", "use one row and one image_id per image")
    diagnoses = raw["dx"].groupby(raw.get("lesion_id", raw["image_id"])).nunique()
    reject(
        diagnoses.index[diagnoses > 1],
        "images of one lesion have different dx, lesion_id",
        "correct dx or lesion_id",
    )


def _check_classes(dx: "pd.Series[str]", fewest: int) -> None:
    """Reject too few classes, and names that would be taken for one another or for a column."""
    names = pd.Series(sorted(dx.unique()), dtype="str")
    if len(names) < fewest:
        raise UserError(f"data has only one class ({names[0]!r}); at least {fewest} are required.")
    # A class is a column of the table of predictions, and often the name of a folder.
    fits = [
        name.isprintable() and len(name) <= 100 and not {"", ".", ".."} & {*name.split("/")} for name in names
    ]
    reject(
        names[~np.array(fits) | names.isin(_COLUMN_NAMES)],
        f"dx cannot name a class (not printable, over 100 characters, or one of {', '.join(_COLUMN_NAMES)})",
        "rename the class",
    )
    reject(
        names[names.str.casefold().duplicated(keep=False)],
        "two classes differ by case only, one is",
        "use one spelling, or two different names",
    )


def _read_ages(typed: "pd.Series[str]") -> "pd.Series[float]":
    ages = pd.to_numeric(typed, errors="coerce").astype(float)
    reject(
        typed[typed.notna() & ~ages.between(0, _OLDEST_AGE)],
        f"age is not a number of years from 0 to {_OLDEST_AGE}",
        "correct it, or leave it empty where unknown",
    )
    return ages
