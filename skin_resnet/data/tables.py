"""Delimited text files as tables of checked text columns."""

import io
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import pandas as pd

from skin_resnet.errors import UserError

# How published tables and spreadsheets write an unknown value.
_MISSING = ("", "na", "n/a", "nan", "none", "null")
_DELIMITERS = ",;\t"


def reject(offenders: Iterable[object], problem: str, fix: str) -> None:
    """Raise a UserError that names the first offender and counts the others; do nothing if there are none."""
    rejected = list(offenders)
    if rejected:
        first = repr(rejected[0])
        shown = first if len(first) <= 200 else f"{first[:200]}..."
        more = f" (and {len(rejected) - 1} more)" if len(rejected) > 1 else ""
        raise UserError(f"{problem}: {shown}{more}; {fix}.")


def read_table(file: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """Read a comma, semicolon or tab separated file in UTF-8.

    Every column is stripped text, NaN where the value is unknown. The index is the line number in the file.
    The required columns, and image_id and lesion_id where present, have a value in every row; no image is
    in two rows.

    Raises:
        UserError: The file cannot be read, is no such table, or breaks one of these rules.
    """
    cells = _read_cells(file)
    header = cells.iloc[0].tolist()
    columns = shorten(", ".join(header), 200)
    missing = [name for name in required if name not in header]
    reject(missing, f"{file.name} has the columns {columns}, but lacks", "add it, or pass the right file")
    repeated = [name for place, name in enumerate(header) if name in header[:place]]
    reject(repeated, f"{file.name} has a column twice", "remove one of the two")
    table = cells.iloc[1:].set_axis(header, axis=1)
    table = table.mask(table.apply(lambda column: column.str.lower().isin(_MISSING)))
    for column in dict.fromkeys((*required, "image_id", "lesion_id")):
        if column in table:
            lines = table.index[table[column].isna()].tolist()
            reject(lines, f"{file.name} has no {column} in line", "add the value or remove the row")
    for column in table.columns.intersection(["image", "image_id"]):
        twice = table[column][table[column].duplicated()]
        reject(twice, f"{file.name} has an {column} twice", "remove a row, or use one for each image")
    return table


def _read_cells(file: Path) -> pd.DataFrame:
    """Read all lines that are not blank, the header first, indexed by line number."""
    try:
        if file.exists() and not file.is_file():  # a pipe could keep us waiting for ever
            raise UserError(f"{file} is not a regular file; pass a CSV file.")
        # Spreadsheets put a byte order mark in front, which would become part of the first column's name.
        text = file.read_text("utf-8-sig")
        delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
        cells = pd.read_csv(
            io.StringIO(text),
            sep=delimiter,
            engine="python",  # unlike the default, it distinguishes a missing cell from an empty one
            header=None,
            dtype=str,
            keep_default_na=False,
            skip_blank_lines=False,  # or the index would not be the line number
        )
    except OSError as error:
        raise UserError(
            f"cannot read {file}: {error.strerror}; check the path and its permissions."
        ) from None
    except pd.errors.EmptyDataError:
        cells = pd.DataFrame()
    except (UnicodeDecodeError, pd.errors.ParserError) as error:
        raise UserError(f"cannot read {file} as CSV in UTF-8: {error}; correct or convert it.") from None
    lines = [number for number, line in enumerate(text.split("\n"), 1) if "\0" in line]
    reject(lines, f"{file} has a null character in line", "save it as CSV in UTF-8")
    cells.index += 1
    cells = cells.apply(lambda column: column.str.strip())
    cells = cells[(cells.fillna("") != "").any(axis=1)]
    if len(cells) < 2:
        raise UserError(f"{file} has no rows; it needs a header and at least one row.")
    lines = cells.index[cells.isna().any(axis=1)].tolist()
    reject(lines, f"{file.name} has {cells.shape[1]} columns, but too few cells in line", "correct the row")
    return cells


def replace_nan(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table with None instead of NaN, which JSON does not have."""
    return table.astype(object).where(table.notna(), None)
