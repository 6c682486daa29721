"""Figures against the official scorer of the ISIC challenges."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from isic_challenge_scoring import metrics as isic

from skin_resnet.evaluation.metrics import Predictions, compute_class_table, compute_metrics
from skin_resnet.labels import HAM10000_CLASSES
from tests.test_metrics import predict_randomly


def score(predictions: Predictions) -> tuple[float, list[float], list[float]]:
    """The official balanced accuracy, and each class's AUC and average precision."""
    columns, index = list(HAM10000_CLASSES), [f"I{i}" for i in range(len(predictions.targets))]
    truth = pd.DataFrame(np.eye(7)[predictions.targets], columns=columns, index=index)
    said = pd.DataFrame(predictions.probabilities, columns=columns, index=index)
    weights = pd.Series(1.0, index=index)
    known = [name for name in columns if 0 < truth[name].sum() < len(truth)]
    aucs, precisions = (
        [metric(truth[name], said[name], weights) if name in known else np.nan for name in columns]
        for metric in (isic.auc, isic.average_precision)
    )
    return isic.balanced_multiclass_accuracy(truth, said, weights), aucs, precisions


ALL = predict_randomly()
UNDECIDED = replace(ALL, probabilities=np.full_like(ALL.probabilities, 1 / 7))
CASES = {
    **{f"random {seed}": predict_randomly(seed=seed) for seed in range(3)},
    **{f"tied {seed}": predict_randomly(seed=seed, ties=True) for seed in range(3)},
    "a class absent": ALL.select(ALL.targets != 1),
    "two classes only": ALL.select(np.isin(ALL.targets, [4, 5])),
    "one class only": ALL.select(ALL.targets == 5),
    "undecided everywhere": UNDECIDED,
}


@pytest.mark.parametrize("name", CASES)
def test_metrics_are_those_of_the_official_scorer(name: str) -> None:
    predictions = CASES[name]
    balanced_accuracy, aucs, precisions = score(predictions)
    metrics, table = compute_metrics(predictions), compute_class_table(predictions, HAM10000_CLASSES)
    assert metrics.balanced_accuracy == pytest.approx(balanced_accuracy, abs=1e-9)
    assert table.auc.to_numpy() == pytest.approx(aucs, abs=1e-9, nan_ok=True)
    assert table.ap.to_numpy() == pytest.approx(precisions, abs=1e-9, nan_ok=True)
    if not np.isnan(metrics.macro_auc):
        assert metrics.macro_auc == pytest.approx(np.nanmean(aucs), abs=1e-9)


def test_a_network_that_says_the_same_of_everything_scores_nothing() -> None:
    assert compute_metrics(UNDECIDED).balanced_accuracy == 0
