"""What a test reports: the figures with their intervals, beside the baseline, readable and complete."""

import numpy as np
import pytest

from skin_resnet.evaluation.scores import Scores, compute_scores, format_scores, tabulate_predictions
from tests.test_metrics import predict_randomly

CLASSES = tuple("abcdefg")


@pytest.fixture
def scores() -> Scores:
    lesions = np.array([f"L{i // 2}" for i in range(200)])
    return compute_scores(predict_randomly(), lesions, CLASSES, baseline_class="g")


def test_every_headline_figure_has_an_interval_and_a_baseline(scores: Scores) -> None:
    figures = scores.to_dict("test")
    for name in ("balanced_accuracy", "accuracy", "macro_auc"):
        low, value, high = (figures[f"test/{name}{end}"] for end in ("_low", "", "_high"))
        assert low < value < high
    assert figures["test/baseline_balanced_accuracy"] == pytest.approx(1 / 7)
    assert figures["test/baseline_accuracy"] == (scores.predictions.targets == 6).mean()
    assert (figures["test/images"], figures["test/lesions"]) == (200, 100)


def test_the_page_is_a_table_whose_columns_line_up(scores: Scores) -> None:
    page = format_scores(scores, "test")
    assert "### Test: 200 images of 100 lesions" in page
    assert "always g" in page
    rows = [line for line in page.splitlines()[2:] if line.startswith("|")][:6]
    assert len({tuple(i for i, character in enumerate(row) if character == "|") for row in rows}) == 1


def test_predictions_are_a_row_an_image(scores: Scores) -> None:
    table = tabulate_predictions(scores)
    assert table.columns.tolist() == ["image_id", "lesion_id", "dx", "prediction", *CLASSES]
    assert table[list(CLASSES)].sum(axis=1).to_numpy() == pytest.approx(np.ones(200))
    assert (table.dx == table.prediction).mean() == scores.metrics.accuracy
