"""Figures against scikit-learn's, also where classes are absent or scores are tied."""

from dataclasses import replace

import numpy as np
import pytest
from sklearn import metrics as sk

from skin_resnet.evaluation.metrics import (
    PLAIN,
    Predictions,
    compute_class_table,
    compute_metrics,
    compute_scores,
    compute_weighted,
    predict_always,
)


def predict_randomly(size: int = 200, classes: int = 7, *, seed: int = 0, ties: bool = False) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.choice(classes, size, p=np.arange(1, classes + 1) / np.arange(1, classes + 1).sum())
    probabilities = (
        rng.dirichlet(np.ones(classes), size) + np.eye(classes)[targets] * rng.random((size, 1)) * 0.5
    )
    if ties:
        probabilities = np.ceil(probabilities * 4)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(probabilities=probabilities, targets=targets, image_ids=tuple(map(str, range(size))))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_are_those_of_scikit_learn(seed: int, ties: bool) -> None:
    predictions = predict_randomly(seed=seed, ties=ties)
    targets, probabilities = predictions.targets, predictions.probabilities
    metrics = compute_metrics(predictions)
    predicted = predictions.predicted
    assert metrics.accuracy == sk.accuracy_score(targets, predicted)
    assert metrics.balanced_accuracy == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted), abs=1e-12
    )
    assert metrics.macro_auc == pytest.approx(
        sk.roc_auc_score(targets, probabilities, multi_class="ovr"), abs=1e-12
    )
    assert metrics.loss == pytest.approx(sk.log_loss(targets, probabilities, labels=range(7)), abs=1e-9)


def test_absent_classes_are_left_out_of_the_means() -> None:
    predictions = predict_randomly()
    part = predictions.select(predictions.targets < 3)
    recalls = sk.recall_score(part.targets, part.predicted, labels=[0, 1, 2], average=None)
    aucs = [sk.roc_auc_score(part.targets == k, part.probabilities[:, k]) for k in range(3)]
    assert compute_metrics(part).balanced_accuracy == pytest.approx(np.mean(recalls))
    assert compute_metrics(part).macro_auc == pytest.approx(np.mean(aucs))


def test_one_class_only_has_no_auc() -> None:
    predictions = predict_randomly()
    metrics = compute_metrics(predictions.select(predictions.targets == 6))
    assert metrics.accuracy == metrics.balanced_accuracy
    assert np.isnan(metrics.macro_auc)
    assert "val/macro_auc" not in metrics.to_dict("val")


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_metrics_equal_scikit_learns_on_repeated_images(ties: bool) -> None:
    predictions = predict_randomly(80, ties=ties)
    weights = np.random.default_rng(1).integers(0, 4, (20, 80))
    figures = compute_weighted(predictions, weights.astype(float))
    for row, counts in enumerate(weights):
        repeated = np.repeat(np.arange(80), counts)
        expected = compute_metrics(predictions.select(repeated))
        is_whole = len(set(predictions.targets[repeated])) == len(set(predictions.targets))
        for name in ("accuracy", "balanced_accuracy", "macro_auc"):
            if is_whole or name == "accuracy":
                assert figures[name][row] == pytest.approx(getattr(expected, name), abs=1e-12)
            else:
                assert np.isnan(figures[name][row])


def test_intervals_hold_the_metric_and_widen_when_photos_share_lesions() -> None:
    predictions = predict_randomly(300)
    # Three copies of each image, as three photos of one lesion, are no more evidence than one.
    copies = np.tile(np.arange(300), 3)
    tripled = predictions.select(copies)
    lesions = np.array([f"L{i}" for i in range(300)])
    single = compute_scores(predictions, lesions)
    by_lesion = compute_scores(tripled, lesions[copies])
    by_image = compute_scores(tripled, np.array([f"I{i}" for i in range(900)]))
    metrics = compute_metrics(predictions)
    for name, (value, low, high) in single.items():
        assert value == getattr(metrics, name.removeprefix("plain_"))
        assert low < value < high
        assert by_lesion[name] == pytest.approx((value, low, high), abs=1e-12)
        assert by_image[name][2] - by_image[name][1] < 0.75 * (high - low)


def test_one_bootstrap_of_both_decisions_gives_the_intervals_of_two() -> None:
    predictions, lesions = predict_randomly(300), np.arange(300) // 2
    decided = replace(
        predictions, decisions=(predictions.probabilities * [7, 6, 5, 4, 3, 2, 1]).argmax(axis=1)
    )
    both, plain = compute_scores(decided, lesions), compute_scores(predictions, lesions)
    assert both["accuracy"] != plain["accuracy"]
    assert both["macro_auc"] == plain["macro_auc"]
    assert [both[name] for name in PLAIN] == [plain[name.removeprefix("plain_")] for name in PLAIN]


def test_rare_classes_do_not_lift_the_interval_of_one_answer_for_all() -> None:
    targets = np.array([0] * 50 + [1] * 3 + [2] * 2 + [3])
    same = Predictions(probabilities=np.tile([0.7, 0.1, 0.1, 0.1], (56, 1)), targets=targets, image_ids=())
    scores = compute_scores(same, np.arange(56).astype(str))
    assert scores["balanced_accuracy"] == (0.25, 0.25, 0.25)
    assert scores["macro_auc"] == (0.5, 0.5, 0.5)


def test_the_class_table_is_that_of_scikit_learn() -> None:
    predictions = predict_randomly()
    table = compute_class_table(predictions, tuple("abcdefg"))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        predictions.targets, predictions.predicted
    )
    assert table.sensitivity.to_numpy() == pytest.approx(recall)
    assert table.ppv.to_numpy() == pytest.approx(precision)
    assert table.f1.to_numpy() == pytest.approx(f1)
    assert table.images.tolist() == support.tolist()
    specificity = sk.recall_score(predictions.targets != 2, predictions.predicted != 2)
    assert table.specificity[2] == pytest.approx(specificity)
    npv = sk.precision_score(predictions.targets != 2, predictions.predicted != 2)
    assert table.npv[2] == pytest.approx(npv)
    ap = sk.average_precision_score(predictions.targets == 2, predictions.probabilities[:, 2])
    assert table.ap[2] == pytest.approx(ap)


def test_always_one_class_scores_its_share_and_chance() -> None:
    predictions = predict_randomly()
    baseline = compute_metrics(predict_always(6, predictions))
    assert baseline.accuracy == (predictions.targets == 6).mean()
    assert baseline.balanced_accuracy == pytest.approx(1 / 7)
    assert baseline.macro_auc == 0.5
