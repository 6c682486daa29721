from itertools import combinations

import numpy as np
import pytest

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.retest import Retest, compute_retest, format_retest
from skin_resnet.evaluation.subgroups import MIN_LESIONS

CLASSES = ("bkl", "mel", "nv")


def predict_photos(lesions: int = 90, noise: float = 0.5, photos: int = 3) -> tuple[Predictions, np.ndarray]:
    """Lesions of `photos`, one, `photos`, one ... photos, whose answers differ by noise; rows shuffled."""
    rng = np.random.default_rng(0)
    lesion_of = np.repeat(np.arange(lesions), np.where(np.arange(lesions) % 2, 1, photos))
    rng.shuffle(lesion_of)
    logits = rng.normal(0, 1, (lesions, 3))[lesion_of] + rng.normal(0, 1, (len(lesion_of), 3)) * noise
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.where(lesion_of < 70, 1, 2)
    ids = tuple(map(str, range(len(targets))))
    return Predictions(probabilities=probabilities, targets=targets, image_ids=ids), lesion_of.astype(str)


def pick(retest: Retest, dx: str = "all") -> dict[str, float]:
    rows = retest.table[retest.table.dx == dx]
    return dict(zip(rows.figure, rows.value, strict=True))


def test_figures_are_means_over_lesions_of_means_over_pairs() -> None:
    predictions, lesions = predict_photos()
    per_lesion, others = [], []
    for lesion in {name for name in lesions if (lesions == name).sum() > 1}:
        photos = np.flatnonzero(lesions == lesion)
        beside = np.flatnonzero((lesions != lesion) & (predictions.targets == predictions.targets[photos[0]]))
        for found, pairs in (
            (per_lesion, list(combinations(photos, 2))),
            (others, [(a, b) for a in photos for b in beside]),
        ):
            p, q = (predictions.probabilities[[pair[side] for pair in pairs]] for side in (0, 1))
            agree = p.argmax(axis=1) == q.argmax(axis=1)
            distance = np.maximum(p - q, 0).sum(axis=1)  # another form of the total variation
            found.append(
                (agree.mean(), float(agree.all()), distance.mean(), np.abs(p[:, 1] - q[:, 1]).mean())
            )
    retest = compute_retest(predictions, lesions, CLASSES)
    names = ["agreement", "unanimous", "distance", "mel_difference"]
    assert pick(retest) == pytest.approx(dict(zip(names, np.mean(per_lesion, axis=0), strict=True)))
    beside = retest.table[retest.table.dx == "all"].others.to_numpy()
    assert beside[[0, 2, 3]] == pytest.approx(np.mean(others, axis=0)[[0, 2, 3]])
    assert np.isnan(beside[1])


def test_only_lesions_with_several_photos_are_counted_each_under_its_class() -> None:
    retest = compute_retest(*predict_photos(), CLASSES)
    assert (retest.lesions, retest.images) == (45, 135)
    counts = retest.table.drop_duplicates("dx")[["dx", "lesions", "images"]].to_numpy().tolist()
    assert counts == [["all", 45, 135], ["mel", 35, 105], ["nv", 10, 30]]


def test_a_model_that_says_the_same_of_all_photos_of_a_lesion_is_perfect() -> None:
    retest = compute_retest(*predict_photos(noise=0), CLASSES)
    perfect = {"agreement": 1, "unanimous": 1, "distance": 0, "mel_difference": 0}
    assert pick(retest) == perfect
    others = retest.table.others[retest.table.dx == "all"].to_numpy()
    assert others[0] < 0.6
    assert others[2] > 0.2


def test_intervals_hold_the_mean_and_narrow_with_the_number_of_lesions() -> None:
    few, many = (
        compute_retest(*predict_photos(lesions), CLASSES).table.set_index(["dx", "figure"]).loc["all"]
        for lesions in (60, 960)
    )
    for table in (few, many):
        assert ((table.low < table.value) & (table.value < table.high)).all()
    narrowing = (few.high - few.low) / (many.high - many.low)
    assert narrowing.between(2.5, 6).all()  # 4 = the root of 16 times as many


def test_a_class_with_too_few_lesions_has_counts_but_no_number() -> None:
    retest = compute_retest(*predict_photos(), CLASSES)
    assert np.isnan(list(pick(retest, "nv").values())).all()
    assert np.isfinite(list(pick(retest, "mel").values())).all()
    assert "| nv  |      10 |     30 |         – |" in format_retest(retest)  # noqa: RUF001


def test_without_a_class_mel_its_probability_is_left_out() -> None:
    retest = compute_retest(*predict_photos(), ("a", "b", "c"))
    assert set(retest.table.figure) == {"agreement", "unanimous", "distance"}


@pytest.mark.parametrize(
    ("lesions", "photos", "words"),
    [(50, 1, "No lesion has several photos"), (2 * MIN_LESIONS - 2, 3, f"Under {MIN_LESIONS} lesions")],
)
def test_where_there_is_too_little_to_compare_it_says_so_and_gives_no_number(
    lesions: int, photos: int, words: str
) -> None:
    retest = compute_retest(*predict_photos(lesions, photos=photos), CLASSES)
    assert words in format_retest(retest)
    assert "|" not in format_retest(retest)
    assert retest.to_dict("test") == {}


def test_the_page_and_the_metrics_hold_the_figures() -> None:
    retest = compute_retest(*predict_photos(), CLASSES)
    row = retest.table.iloc[0]
    page = format_retest(retest)
    assert "135 photos of the 45 lesions" in page
    assert f"{row.value:.3f} [{row.low:.2f}, {row.high:.2f}] | {row.others:19.3f} |" in page
    metrics = retest.to_dict("test")
    assert len(metrics) == 12
    assert metrics["test/retest_agreement"] == row.value
    assert metrics["test/retest_agreement_high"] == row.high
