"""How figures are written."""

import numpy as np
import pandas as pd

from skin_resnet.evaluation.metrics import Predictions, compute_class_table
from skin_resnet.evaluation.page import format_frame, format_score


def test_a_score_is_written_with_its_interval() -> None:
    assert format_score(0.6127, (0.5249, 0.6951)) == "0.613 [0.52, 0.70]"
    assert format_score(0.5) == "0.500"
    assert format_score(1 / 7, (1 / 7, 1 / 7)) == "0.143"  # of a constant
    assert format_score(0.5, (float("nan"), float("nan"))) == "0.500"
    assert format_score(float("nan"), (0.1, 0.2)) == "\N{EN DASH}"


def test_the_class_table_is_markdown_with_dashes_where_a_metric_is_undefined() -> None:
    predictions = Predictions(
        probabilities=np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1]]),
        targets=np.array([0, 1, 1]),
        image_ids=("a", "b", "c"),
    )
    text = format_frame(compute_class_table(predictions, ("bcc", "mel", "nv")))
    assert text.splitlines() == [
        "| dx  | images | sensitivity | specificity |   PPV |   NPV |    F1 |   AUC |    AP |",
        "| --- | -----: | ----------: | ----------: | ----: | ----: | ----: | ----: | ----: |",
        "| bcc |      1 |       1.000 |       0.500 | 0.500 | 1.000 | 0.667 | 1.000 | 1.000 |",
        "| mel |      2 |       0.500 |       1.000 | 1.000 | 0.500 | 0.667 | 1.000 | 1.000 |",
        "| nv  |      0 |           – |       1.000 |     – | 1.000 |     – |     – |     – |",  # noqa: RUF001
    ]


def test_a_bar_in_a_class_name_does_not_open_a_column() -> None:
    assert "| a\\|b |" in format_frame(pd.DataFrame({"dx": ["a|b"], "images": [3]}))
