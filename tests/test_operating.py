"""Thresholds against scikit-learn's ROC, referral against counting by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.operating import (
    apply_threshold,
    choose_threshold,
    compute_referral,
    find_positives,
    score_positives,
    tabulate_missed,
)
from skin_resnet.evaluation.plots.assessment import plot_gallery
from skin_resnet.labels import HAM10000_CLASSES
from tests.test_metrics import predict_randomly

MALIGNANT = frozenset({0, 1, 4})


def measure(predictions: Predictions, positives: set[int], threshold: float) -> dict[str, tuple[float, ...]]:
    lesions = np.array(predictions.image_ids)
    return {name: row for name, *row in apply_threshold(predictions, positives, threshold, lesions)}


def test_melanoma_and_malignant_are_known_for_the_seven_diagnoses_only() -> None:
    assert find_positives(HAM10000_CLASSES) == {"melanoma": {4}, "malignant": MALIGNANT}
    assert find_positives(("mel", "nv", "scar")) == {}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("positives", [{4}, MALIGNANT])
def test_thresholds_and_what_they_reach_are_those_of_scikit_learns_roc(
    positives: set[int], ties: bool
) -> None:
    predictions = predict_randomly(400, ties=ties)
    positive = np.isin(predictions.targets, list(positives))
    falls, rises, thresholds = sk.roc_curve(
        positive, score_positives(predictions, positives), drop_intermediate=False
    )
    for goal in (0.07, 0.5, 0.9, 0.95, 1):
        first = int(np.argmax(rises >= goal - 1e-9))  # thresholds descend, so it is the highest
        threshold = choose_threshold(predictions, positives, goal)
        assert threshold == thresholds[first]
        result = measure(predictions, positives, threshold)
        for name, expected, images in (
            ("sensitivity", rises[first], positive.sum()),
            ("specificity", 1 - falls[first], (~positive).sum()),
        ):
            value, low, high, n = result[name]
            assert value == pytest.approx(expected)
            assert low <= value <= high
            assert n == images


def test_a_goal_that_is_a_whole_number_of_images_asks_for_no_more() -> None:
    melanoma = np.arange(100) / 100
    probabilities = np.stack([1 - melanoma, melanoma], axis=1)
    val = Predictions(probabilities=probabilities, targets=np.ones(100, np.int64), image_ids=())
    assert 0.07 * 100 > 7  # as floats are
    assert choose_threshold(val, {1}, 0.07) == 0.93


@pytest.mark.parametrize(("kept", "unknown"), [(True, "specificity"), (False, "sensitivity")])
def test_images_of_one_kind_have_only_the_metric_of_that_kind(kept: bool, unknown: str) -> None:
    predictions = predict_randomly(400)
    result = measure(predictions.select((predictions.targets == 4) == kept), {4}, 0.3)
    assert [name for name, row in result.items() if np.isnan(row[:3]).all()] == [unknown]
    assert result[unknown][3] == 0


def test_referral_is_what_dropping_the_least_certain_images_gives() -> None:
    predictions = predict_randomly(120)
    referral = compute_referral(predictions)
    order = np.argsort(predictions.probabilities.max(axis=1))
    for dropped in range(120):
        rest = predictions.select(order[dropped:])
        assert referral.referred_fraction[dropped] == dropped / 120
        assert referral.accuracy[dropped] == pytest.approx((rest.predicted == rest.targets).mean())


def test_the_order_of_equally_certain_images_does_not_matter() -> None:
    predictions = predict_randomly(200, ties=True)
    shuffled = predictions.select(np.random.default_rng(0).permutation(200))
    np.testing.assert_allclose(compute_referral(predictions), compute_referral(shuffled))
    same = Predictions(
        probabilities=np.full((4, 2), (0.6, 0.4)), targets=np.array([0, 1, 0, 0]), image_ids=()
    )
    np.testing.assert_allclose(compute_referral(same).accuracy, 0.75)


def test_missed_melanomas_are_listed_the_most_confidently_missed_first() -> None:
    predictions = predict_randomly(400)
    missed = tabulate_missed(predictions, {4}, HAM10000_CLASSES)
    wrong = (predictions.targets == 4) & (predictions.predicted != 4)
    assert set(missed.image_id) == set(np.array(predictions.image_ids)[wrong])
    assert missed.score.is_monotonic_increasing
    first = predictions.image_ids.index(missed.image_id[0])
    assert missed.score[0] == predictions.probabilities[first, 4]
    assert missed.prediction[0] == HAM10000_CLASSES[predictions.predicted[first]]
    assert missed.confidence[0] == predictions.probabilities[first].max()
    # A melanoma predicted as another malignant lesion is not predicted as benign.
    malignant = tabulate_missed(predictions, MALIGNANT, HAM10000_CLASSES)
    assert not set(malignant.prediction) & {"akiec", "bcc", "mel"}
    assert set(malignant.dx) == {"akiec", "bcc", "mel"}


@pytest.mark.parametrize("shown", [1, 7, 24])
def test_a_gallery_shows_each_image_under_its_caption(shown: int) -> None:
    captions = [f"ISIC_{row:07}\nan overlong caption {row}" for row in range(shown)]
    figure = plot_gallery(np.zeros((shown, 8, 8, 3), np.uint8), captions, "Missed melanomas")
    figure.draw_without_rendering()
    texts = [axes.get_title() for axes in figure.axes if axes.images]
    assert texts == [f"ISIC_{row:07}\nan overlong captio…" for row in range(shown)]
