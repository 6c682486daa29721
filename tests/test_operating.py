"""Thresholds against scikit-learn's ROC, referral against counting by hand."""

import numpy as np
import pytest
from sklearn import metrics as sk

from skin_resnet.errors import UserError
from skin_resnet.evaluation.metrics import Predictions, compute_metrics
from skin_resnet.evaluation.operating import (
    apply_threshold,
    choose_thresholds,
    compute_referral,
    find_positives,
    format_operating,
    score_positives,
    tabulate_missed,
)
from skin_resnet.evaluation.plots.operating import plot_gallery, plot_referral, plot_roc
from skin_resnet.labels import HAM10000_CLASSES

MALIGNANT = frozenset({0, 1, 4})


def predict_randomly(size: int = 400, *, ties: bool = False, seed: int = 0) -> Predictions:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 7, size)
    probabilities = rng.dirichlet(np.ones(7), size) + 0.3 * np.eye(7)[targets]
    if ties:
        probabilities = np.ceil(probabilities * 4)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(probabilities=probabilities, targets=targets, image_ids=tuple(map(str, range(size))))


def select(predictions: Predictions, rows: np.ndarray) -> Predictions:
    ids = tuple(np.array(predictions.image_ids)[rows])
    return Predictions(
        probabilities=predictions.probabilities[rows], targets=predictions.targets[rows], image_ids=ids
    )


def lesions_of(predictions: Predictions) -> np.ndarray:
    return np.array(predictions.image_ids)


def test_melanoma_and_malignant_are_known_for_the_seven_diagnoses_only() -> None:
    assert find_positives(HAM10000_CLASSES) == {"melanoma": {4}, "malignant": MALIGNANT}
    assert find_positives(("mel", "nv", "scar")) == {}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("positives", [{4}, MALIGNANT])
def test_thresholds_and_what_they_reach_are_those_of_scikit_learns_roc(
    positives: set[int], ties: bool
) -> None:
    predictions = predict_randomly(ties=ties)
    positive = np.isin(predictions.targets, list(positives))
    falls, rises, thresholds = sk.roc_curve(
        positive, score_positives(predictions, positives), drop_intermediate=False
    )
    goals = (0.07, 0.5, 0.9, 0.95, 1)
    points = choose_thresholds(predictions, positives, goals)
    for goal, point in zip(goals, points, strict=True):
        first = int(np.argmax(rises >= goal - 1e-9))  # thresholds descend, so it is the highest
        result = apply_threshold(predictions, point, lesions_of(predictions))
        assert point.threshold == thresholds[first]
        assert result.sensitivity == pytest.approx(rises[first])
        assert result.specificity == pytest.approx(1 - falls[first])
        assert result.sensitivity_interval[0] <= result.sensitivity <= result.sensitivity_interval[1]
        assert result.specificity_interval[0] <= result.specificity <= result.specificity_interval[1]


def test_a_goal_that_is_a_whole_number_of_images_asks_for_no_more() -> None:
    melanoma = np.arange(100) / 100
    probabilities = np.stack([1 - melanoma, melanoma], axis=1)
    val = Predictions(probabilities=probabilities, targets=np.ones(100, np.int64), image_ids=())
    assert 0.07 * 100 > 7  # as floats are
    assert choose_thresholds(val, {1}, (0.07,))[0].threshold == 0.93


def test_a_val_without_the_positive_class_gives_no_threshold_and_says_so() -> None:
    predictions = predict_randomly()
    without = select(predictions, predictions.targets != 4)
    assert choose_thresholds(without, {4}) == ()
    text = format_operating({"melanoma": ()})
    assert text == "No threshold for melanoma: val has no such image."


@pytest.mark.parametrize(("kept", "unknown"), [(True, "specificity"), (False, "sensitivity")])
def test_a_test_of_one_kind_has_only_the_figure_of_that_kind(kept: bool, unknown: str) -> None:
    predictions = predict_randomly()
    point = choose_thresholds(predictions, {4})[0]
    part = select(predictions, (predictions.targets == 4) == kept)
    result = apply_threshold(part, point, lesions_of(part))
    names = ("sensitivity", "specificity")
    assert [name for name in names if np.isnan(getattr(result, name))] == [unknown]
    assert np.isnan(getattr(result, f"{unknown}_interval")).all()
    assert (result.positive_images > 0, result.negative_images > 0) == (kept, not kept)
    group = {"melanoma": [result]}
    assert "–" in format_operating(group)  # noqa: RUF001
    assert plot_roc(part, group, "Test").axes[0].texts[0].get_text() == "no images of both kinds"


def test_broken_probabilities_are_refused() -> None:
    predictions = predict_randomly(20)
    predictions.probabilities[3, 2] = np.nan
    for compute in (lambda given: choose_thresholds(given, {4}), compute_referral):
        with pytest.raises(UserError, match=r"\(first: 3\)"):
            compute(predictions)


def test_referral_is_what_dropping_the_least_certain_images_gives() -> None:
    predictions = predict_randomly(120)
    referral = compute_referral(predictions)
    order = np.argsort(predictions.probabilities.max(axis=1))
    for dropped in range(120):
        rest = select(predictions, order[dropped:])
        expected = compute_metrics(rest)
        assert referral.referred_fraction[dropped] == dropped / 120
        assert referral.accuracy[dropped] == pytest.approx(expected.accuracy)
        if len(np.unique(rest.targets)) == 7:
            assert referral.balanced_accuracy[dropped] == pytest.approx(expected.balanced_accuracy)
        else:
            assert np.isnan(referral.balanced_accuracy[dropped])
    assert referral.area == pytest.approx(referral.accuracy.mean())


def test_the_order_of_equally_certain_images_does_not_matter() -> None:
    predictions = predict_randomly(200, ties=True)
    shuffled = select(predictions, np.random.default_rng(0).permutation(200))
    one, other = compute_referral(predictions), compute_referral(shuffled)
    np.testing.assert_allclose(one.accuracy, other.accuracy)
    np.testing.assert_allclose(one.balanced_accuracy, other.balanced_accuracy)
    same = Predictions(
        probabilities=np.full((4, 2), (0.6, 0.4)), targets=np.array([0, 1, 0, 0]), image_ids=()
    )
    np.testing.assert_allclose(compute_referral(same).accuracy, 0.75)


def test_missed_melanomas_are_listed_the_most_surely_missed_first() -> None:
    predictions = predict_randomly()
    missed = tabulate_missed(predictions, {4}, HAM10000_CLASSES)
    wrong = (predictions.targets == 4) & (predictions.predicted != 4)
    assert set(missed.image_id) == set(np.array(predictions.image_ids)[wrong])
    assert missed.score.is_monotonic_increasing
    first = predictions.image_ids.index(missed.image_id[0])
    assert missed.score[0] == predictions.probabilities[first, 4]
    assert missed.prediction[0] == HAM10000_CLASSES[predictions.predicted[first]]
    assert missed.confidence[0] == predictions.probabilities[first].max()
    # A melanoma taken for another malignant lesion is not taken for benign.
    malignant = tabulate_missed(predictions, MALIGNANT, HAM10000_CLASSES)
    assert not set(malignant.prediction) & {"akiec", "bcc", "mel"}
    assert set(malignant.dx) == {"akiec", "bcc", "mel"}


def test_the_roc_marks_what_each_threshold_reaches() -> None:
    predictions = predict_randomly()
    groups = find_positives(HAM10000_CLASSES)
    results = {
        name: [
            apply_threshold(predictions, point, lesions_of(predictions))
            for point in choose_thresholds(predictions, positives)
        ]
        for name, positives in groups.items()
    }
    table = format_operating(results)
    figure = plot_roc(predictions, {**results, "melanoma": ()}, "Test")
    assert figure.axes[0].texts[0].get_text() == "no threshold: val has no such image"
    for axes, (name, group) in zip(plot_roc(predictions, results, "Test").axes, results.items(), strict=True):
        assert axes.get_title(loc="left").startswith(
            f"{name.capitalize()}: {group[0].positive_images} images"
        )
        drawn = [
            (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in "os"
        ]
        assert drawn == [(1 - result.specificity, result.sensitivity) for result in group]
        assert all(f"{result.point.threshold:.4f}" in table for result in group)


def test_the_referral_plot_carries_area_and_count() -> None:
    referral = compute_referral(predict_randomly())
    axes = plot_referral(referral, "Test").axes[0]
    assert "400" in axes.get_title(loc="left")
    assert f"accuracy (area {referral.area:.3f})" in [
        text.get_text() for text in axes.get_legend().get_texts()
    ]


@pytest.mark.parametrize(("count", "title"), [(0, "none"), (1, "1"), (7, "7"), (24, "24"), (30, "24 of 30")])
def test_a_gallery_shows_up_to_24_images_and_says_of_how_many(count: int, title: str) -> None:
    images = np.zeros((count, 8, 8, 3), np.uint8)
    captions = [f"ISIC_{row:07}\nan overlong caption {row}" for row in range(count)]
    figure = plot_gallery(images, captions, "Missed melanomas")
    figure.draw_without_rendering()
    assert figure._suptitle.get_text() == f"Missed melanomas: {title}"
    shown = [axes.get_title() for axes in figure.axes if axes.images]
    assert len(shown) == min(count, 24)
    assert all(text == f"ISIC_{row:07}\nan overlong captio…" for row, text in enumerate(shown))
