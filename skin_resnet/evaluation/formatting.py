"""Formatting of metrics, intervals, and tables that read well both rendered and on a terminal."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

_ACRONYMS = {"auc", "ppv", "npv", "f1", "ap"}
_MISSING = "–"  # noqa: RUF001 (an en dash marks an empty cell)


def spell_metric(name: str) -> str:
    """Write a metric's name in words: `balanced accuracy`, `macro AUC`."""
    return " ".join(word.upper() if word in _ACRONYMS else word for word in name.split("_"))


def format_score(value: float, interval: tuple[float, float] | None = None) -> str:
    """Write a score as `0.613`, or with its interval as `0.613 [0.52, 0.70]`; an en dash if it is NaN."""
    if np.isnan(value):
        return _MISSING
    return f"{value:.3f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def format_class_table(table: pd.DataFrame) -> str:
    """Write the table of `compute_class_table` as GitHub markdown that is aligned in a terminal, too."""
    rows = [[_format_cell(value) for value in row] for row in table.itertuples(index=False)]
    return format_table([spell_metric(str(name)) for name in table.columns], rows)


def _format_cell(value: object) -> str:
    return format_score(value) if isinstance(value, float) else str(value).replace("|", "\\|")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a markdown table: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    template = f"| {{:<{widths[0]}}} | " + " | ".join(f"{{:>{width}}}" for width in widths[1:]) + " |"
    return "\n".join(template.format(*row) for row in (header, rule, *rows))
