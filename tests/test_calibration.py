"""Calibration against scikit-learn, and against simulations whose truth is known."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from skin_resnet.evaluation.calibration import (
    apply_temperature,
    compute_brier,
    compute_ece,
    compute_reliability,
    decide,
    fit_conformal,
    fit_tau,
    fit_temperature,
    predict_sets,
)
from skin_resnet.evaluation.metrics import Floats, Predictions, compute_metrics, compute_share


def make(probabilities: Floats, targets: object) -> Predictions:
    ids = tuple(f"image_{row}" for row in range(len(probabilities)))
    return Predictions(probabilities=probabilities, targets=np.asarray(targets, np.int64), image_ids=ids)


def simulate(size: int, *, classes: int = 7, temperature: float = 1, seed: int = 0) -> Predictions:
    """Draw targets from calibrated probabilities, then sharpen what is reported by `temperature`."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (size, classes))
    calibrated = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = (calibrated.cumsum(axis=1) < rng.random((size, 1))).sum(axis=1)
    reported = np.exp(logits * temperature)
    return make(reported / reported.sum(axis=1, keepdims=True), np.minimum(targets, classes - 1))


@pytest.mark.parametrize("temperature", [0.5, 1, 1.7, 4])
def test_a_known_temperature_is_found_and_undone(temperature: float) -> None:
    skewed, calibrated = simulate(20_000, temperature=temperature), simulate(20_000)
    found = fit_temperature(skewed)
    assert found == pytest.approx(temperature, rel=0.03)
    undone = apply_temperature(skewed, temperature).probabilities
    np.testing.assert_allclose(undone, calibrated.probabilities, rtol=1e-9)


@pytest.mark.parametrize("temperature", [0.05, 0.9, 3, 20])
def test_no_temperature_changes_a_prediction(temperature: float) -> None:
    predictions = simulate(2000)
    tied = make(np.round(predictions.probabilities, 1), predictions.targets)
    for before in (predictions, tied):
        after = apply_temperature(before, temperature)
        np.testing.assert_array_equal(after.predicted, before.predicted)
        np.testing.assert_allclose(after.probabilities.sum(axis=1), 1)


@pytest.mark.parametrize("seed", range(3))
def test_tau_is_1_where_probabilities_are_true_and_raises_balanced_accuracy_on_other_images(
    seed: int,
) -> None:
    def draw(seed: int) -> tuple[Predictions, Floats]:
        """Draw images from classes of very different sizes, with their true probabilities."""
        rng = np.random.default_rng(seed)
        prior = np.array([0.67, 0.2, 0.1, 0.03])
        targets = rng.choice(4, 20_000, p=prior)
        likelihood = np.exp(2 * (rng.normal(size=(20_000, 4)) + np.eye(4)[targets] * 2))
        joint = likelihood * prior
        return make(joint / joint.sum(axis=1, keepdims=True), targets), prior

    val, prior = draw(seed)
    counts = (1000 * prior).round().astype(np.int64)
    tau = fit_tau(val, counts)
    assert tau == pytest.approx(1, abs=0.25)
    test, _ = draw(seed + 100)
    adjusted = decide(test, prior**-tau)
    plain, found = compute_metrics(test), compute_metrics(adjusted)
    assert found.balanced_accuracy > plain.balanced_accuracy + 0.05
    assert found.accuracy < plain.accuracy
    assert (found.macro_auc, found.loss) == (plain.macro_auc, plain.loss)
    by_hand = (np.log(test.probabilities) - tau * np.log(prior)).argmax(axis=1)
    np.testing.assert_array_equal(adjusted.predicted, by_hand)
    assert adjusted.plain.predicted.tolist() == test.predicted.tolist()


def test_tau_is_0_on_few_images_where_a_gain_is_luck_and_not_where_it_is_clear() -> None:
    """Networks that rank a little better than chance, and clearly, on as many images as demo and HAM10000."""
    counts = np.array([33, 51, 110, 12, 111, 670, 13])

    def fit(size: int, skill: float) -> list[float]:
        taus = []
        for seed in range(20):
            rng = np.random.default_rng(seed)
            targets = np.repeat(np.arange(7), np.maximum(1, size * counts // counts.sum()))
            logits = skill * (rng.normal(size=(len(targets), 7)) + skill * np.eye(7)[targets])
            joint = np.exp(logits) * counts
            taus.append(fit_tau(make(joint / joint.sum(axis=1, keepdims=True), targets), counts))
        return taus

    assert fit(74, 0.1).count(0) >= 18
    assert min(fit(1500, 1.5)) > 0.4


def test_tau_is_0_where_no_decision_is_better_than_the_most_probable_class() -> None:
    assert fit_tau(make(np.eye(3)[[0, 1, 2, 0]], [0, 1, 2, 0]), np.array([90, 9, 1])) == 0


def test_where_every_answer_is_right_probabilities_are_left_as_they_are() -> None:
    unsure = make(np.full((5, 2), (0.6, 0.4)), [0] * 5)
    assert fit_temperature(unsure) == fit_temperature(make(np.eye(3), [0, 1, 2])) == 1
    assert apply_temperature(unsure, 1) is unsure


def test_temperature_is_bounded_where_every_answer_is_wrong() -> None:
    for wrong in (make(np.eye(3), [1, 2, 0]), make(np.full((5, 2), (0.6, 0.4)), [1] * 5)):
        assert fit_temperature(wrong) == pytest.approx(20, rel=1e-3)


def test_reliability_is_that_of_scikit_learn_and_ece_follows_from_it() -> None:
    predictions = simulate(3000, temperature=2)
    confidence, right = predictions.probabilities.max(axis=1), predictions.predicted == predictions.targets
    table = compute_reliability(predictions)
    accuracies, confidences = calibration_curve(right, confidence, n_bins=15)
    filled = table[table.images > 0]
    np.testing.assert_allclose(filled.accuracy, accuracies)
    np.testing.assert_allclose(filled.confidence, confidences)
    assert table.images.sum() == 3000
    assert compute_ece(predictions) == pytest.approx(
        np.average(np.abs(accuracies - confidences), weights=filled.images)
    )


def test_brier_is_that_of_scikit_learn_from_0_to_2() -> None:
    predictions = simulate(300)
    expected = sk.brier_score_loss(
        predictions.targets, predictions.probabilities, labels=range(7), scale_by_half=False
    )
    assert compute_brier(predictions) == pytest.approx(expected)
    assert compute_brier(make(np.eye(2), [1, 0])) == 2


def test_sets_hold_the_truth_as_often_as_promised() -> None:
    coverages = []
    for seed in range(200):
        drawn = simulate(200, classes=3, seed=seed)
        val = make(drawn.probabilities[:99], drawn.targets[:99])
        test = make(drawn.probabilities[99:], drawn.targets[99:])
        sets = predict_sets(test, fit_conformal(val, 0.9))
        coverages.append(sets[np.arange(101), test.targets].mean())
    # With 99 images, rank 90 of 100: the promise is kept exactly, on average over draws.
    assert np.mean(coverages) == pytest.approx(0.9, abs=3 * np.std(coverages) / np.sqrt(200))


@pytest.mark.parametrize(
    ("images", "coverage", "rank"), [(9, 0.9, 9), (10, 0.9, 10), (19, 0.5, 10), (99, 0.07, 7), (9, 1e-300, 1)]
)
def test_the_threshold_is_the_finite_sample_quantile(images: int, coverage: float, rank: int) -> None:
    of_target = np.linspace(0.99, 0.01, images)  # so that the scores ascend
    predictions = make(np.stack([of_target, 1 - of_target], axis=1), np.zeros(images))
    assert fit_conformal(predictions, coverage) == of_target[rank - 1]


def test_too_few_images_promise_only_sets_of_all_classes() -> None:
    threshold = fit_conformal(simulate(8), 0.9)
    assert threshold == 0
    assert predict_sets(simulate(5), threshold).all()


def test_the_interval_of_a_share_is_the_binomial_one_and_counts_lesions() -> None:
    hits = np.arange(1000) < 800
    lesions = np.arange(1000).astype(str)
    exact = binomtest(800, 1000).proportion_ci()
    assert compute_share(hits, lesions) == pytest.approx((0.8, exact.low, exact.high), abs=0.005)
    tripled = compute_share(np.repeat(hits, 3), np.repeat(lesions, 3))
    assert tripled == pytest.approx(compute_share(hits, lesions), abs=1e-12)


@pytest.mark.parametrize("hit", [True, False])
def test_where_all_are_alike_the_interval_is_the_exact_one_over_lesions(hit: bool) -> None:
    exact = binomtest(6 * hit, 6).proportion_ci()
    share = compute_share(np.full(12, hit), np.repeat(list("abcdef"), 2))
    assert share == pytest.approx((float(hit), exact.low, exact.high))
