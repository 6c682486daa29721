"""Delimited text files as tables of checked text columns."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import pandas as pd

from skin_resnet.errors import UserError

# How published tables and spreadsheets write a cell that nobody knows.
_MISSING = ("", "na", "n/a", "nan", "none", "null")
_DELIMITERS = ",;\t"


def refuse_any(offenders: Iterable[object], rule: str, problem: str, remedy: str) -> None:
    """Do nothing where there are no offenders.

    Raises:
        UserError: The rule, the problem with the first offender, how many there are, and the remedy.
    """
    refused = list(offenders)
    if refused:
        count = f" ({len(refused)} in all)" if len(refused) > 1 else ""
        raise UserError(f"{rule}, but {problem} {refused[0]!r}{count}; {remedy}.")


def read_text_table(file: Path, required: tuple[str, ...]) -> pd.DataFrame:
    """Read a comma, semicolon or tab separated table in UTF-8.

    Every column is stripped text, NaN where a cell is empty or says so. The index is the line number in the
    file. The required columns, and image_id and lesion_id where the file has them, are filled in every row.

    Raises:
        UserError: The file is no such table, lacks or doubles a column, has no rows, or leaves a cell empty
            that must be filled.
    """
    header, lines, rows = _read_rows(file)
    refuse_any(
        [name for name in required if name not in header],
        rule=f"{file.name} must have the columns {', '.join(required)}",
        problem=f"among its columns {shorten(', '.join(header), 200)} there is no",
        remedy="add it, or check that this is the right file",
    )
    refuse_any(
        [name for place, name in enumerate(header) if name in header[:place]],
        rule=f"{file.name} must have every column once",
        problem="it doubles",
        remedy="remove one of the two",
    )
    table = pd.DataFrame(rows, columns=header, index=lines, dtype="str")
    table = table.mask(table.apply(lambda column: column.str.lower().isin(_MISSING)))
    for column in dict.fromkeys((*required, "image_id", "lesion_id")):
        if column in table:
            refuse_any(
                table.index[table[column].isna()].tolist(),
                rule=f"{column} must be filled in every row of {file.name}",
                problem="it is empty in line",
                remedy="fill it or remove the row",
            )
    return table


def _read_rows(file: Path) -> tuple[list[str], list[int], list[list[str]]]:
    """Give the header, and every row that is not blank with its line number."""
    try:
        # Spreadsheets put a byte order mark in front, which would become part of the first column's name.
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} must be text in UTF-8, but {error.reason}; save it as CSV in UTF-8."
        ) from None
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    try:
        numbered = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise UserError(
            f"{file} must be readable as CSV, but line {reader.line_num}: {error}; correct it."
        ) from None
    refuse_any(
        [line for line, row in numbered if any("\0" in cell for cell in row)],
        rule=f"{file} must be text",
        problem="there is a null character in line",
        remedy="save it as CSV in UTF-8",
    )
    filled = [(line, row) for line, row in numbered if any(row)]
    if len(filled) < 2:
        raise UserError(f"{file.name} must have a header and rows, but {file} has none; use the whole file.")
    (_, header), *rest = filled
    refuse_any(
        [line for line, row in rest if len(row) != len(header)],
        rule=f"Every row of {file.name} must have the header's {len(header)} cells",
        problem="another number is in line",
        remedy="correct it",
    )
    return header, [line for line, _ in rest], [row for _, row in rest]
