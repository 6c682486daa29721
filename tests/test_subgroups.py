from dataclasses import replace
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from skin_resnet.evaluation.calibration import decide
from skin_resnet.evaluation.metrics import Predictions, compute_scores
from skin_resnet.evaluation.subgroups import MIN_IMAGES, MIN_LESIONS, compute_retest, compute_subgroups
from skin_resnet.labels import HAM10000_CLASSES
from tests.test_metrics import predict_randomly

AGES = {
    "under 30": (0, 29.5),
    "30-44": (30, 44),
    "45-59": (45, 59.9),
    "60-74": (60, 74),
    "75 and over": (75, 101),
    "unknown": (np.nan,),
}


def describe_images(predictions: Predictions, seed: int = 0) -> tuple[pd.DataFrame, np.ndarray]:
    """A table of the images, and the lesion of each: two photos a lesion."""
    rng = np.random.default_rng(seed)
    size = len(predictions.targets)
    lesions = np.array([f"L{row // 2}" for row in range(size)])
    ages = rng.choice(np.concatenate(list(AGES.values())), size)
    table = pd.DataFrame(
        {
            "image_id": predictions.image_ids,
            "lesion_id": lesions,
            "dx": pd.Categorical.from_codes(predictions.targets, list(HAM10000_CLASSES), ordered=True),
            "age": ages,
            "sex": rng.choice(["male", "female", "unknown"], size, p=[0.5, 0.48, 0.02]),
            "localization": rng.choice(["back", "unknown", "face", "ear"], size, p=[0.3, 0.5, 0.18, 0.02]),
        }
    )
    return table, lesions


@pytest.fixture(scope="module")
def measured() -> tuple[Predictions, pd.DataFrame, np.ndarray, pd.DataFrame]:
    predictions = predict_randomly(600)
    table, lesions = describe_images(predictions)
    return predictions, table, lesions, compute_subgroups(predictions, table, lesions)


def test_the_metrics_of_a_subgroup_are_scikit_learns_on_its_images(measured) -> None:
    predictions, table, lesions, subgroups = measured
    for by, name, inside in (
        ("sex", "female", table.sex == "female"),
        ("age", "60-74", table.age.between(*AGES["60-74"])),
        ("localization", "back", table.localization == "back"),
    ):
        targets, probabilities = predictions.targets[inside], predictions.probabilities[inside]
        expected = {
            "balanced_accuracy": sk.balanced_accuracy_score(targets, probabilities.argmax(axis=1)),
            "accuracy": sk.accuracy_score(targets, probabilities.argmax(axis=1)),
            "macro_auc": sk.roc_auc_score(targets, probabilities, multi_class="ovr"),
        }
        rows = subgroups[(subgroups["by"] == by) & (subgroups["subgroup"] == name)].set_index("metric")
        assert rows.value.to_dict() == pytest.approx(expected)
        part = Predictions(probabilities=probabilities, targets=targets, image_ids=())
        scores = compute_scores(part, lesions[inside])
        for metric in rows.index:
            assert (rows.value[metric], rows.low[metric], rows.high[metric]) == scores[metric]
        assert set(rows.images) == {len(targets)}
        assert set(rows.lesions) == {len(set(lesions[inside]))}
        assert set(rows.classes) == {len(set(targets))}


def test_the_subgroups_by_diagnosis_hold_its_sensitivity(measured) -> None:
    predictions, _, _, subgroups = measured
    recalls = sk.recall_score(predictions.targets, predictions.predicted, average=None)
    rows = subgroups[subgroups["by"] == "dx"]
    assert set(rows.metric) == {"sensitivity"}
    assert rows["subgroup"].tolist() == list(HAM10000_CLASSES)
    spoken = rows.value.notna().to_numpy()
    assert spoken.any()
    assert rows.value[spoken].to_numpy() == pytest.approx(recalls[spoken])


def test_every_image_is_in_one_subgroup_and_subgroups_have_an_order(measured) -> None:
    _, table, _, subgroups = measured
    order = {
        "sex": ["female", "male", "unknown"],
        "age": list(AGES),
        "localization": ["back", "face", "ear", "unknown"],  # the frequent first, unknown last
        "dx": list(HAM10000_CLASSES),
    }
    for by, names in order.items():
        rows = subgroups[subgroups["by"] == by].drop_duplicates("subgroup")
        assert rows.images.sum() == 600
        assert rows["subgroup"].tolist() == names
    counts = subgroups[subgroups["by"] == "age"].drop_duplicates("subgroup").images.tolist()
    assert counts == [table.age.isin(ages).sum() for ages in AGES.values()]


def test_the_order_of_the_table_does_not_matter(measured) -> None:
    predictions, table, lesions, subgroups = measured
    shuffled = pd.concat([table, table.assign(image_id="x" + table.image_id)]).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compute_subgroups(predictions, shuffled, lesions), subgroups)


@pytest.mark.parametrize(
    ("images", "lesions", "classes", "too_small"),
    [
        (MIN_IMAGES, MIN_LESIONS, 2, False),
        (MIN_IMAGES - 1, MIN_LESIONS, 2, True),
        (MIN_IMAGES, MIN_LESIONS - 1, 2, True),
        (MIN_IMAGES, MIN_LESIONS, 1, True),
    ],
)
def test_a_subgroup_that_is_too_small_has_counts_but_no_number(
    images: int, lesions: int, classes: int, too_small: bool
) -> None:
    predictions = predict_randomly(images)
    predictions = replace(predictions, targets=np.arange(images) % classes)
    table, _ = describe_images(predictions)
    lesion_of = np.array([f"L{row % lesions}" for row in range(images)])
    subgroups = compute_subgroups(predictions, table.assign(sex="female"), lesion_of)
    whole = subgroups[subgroups["by"] == "sex"]
    assert (whole[["value", "low", "high"]].isna().all(axis=1) == too_small).all()
    assert set(whole.images) == {images}
    assert set(whole.lesions) == {lesions}


def test_an_attribute_that_is_never_known_makes_no_subgroups(measured) -> None:
    predictions, table, lesions, _ = measured
    subgroups = compute_subgroups(predictions, table.assign(sex="unknown", age=np.nan), lesions)
    assert subgroups["by"].unique().tolist() == ["localization", "dx"]


# Test-retest

CLASSES = ("bkl", "mel", "nv")


def predict_photos(lesions: int = 90, noise: float = 0.5, photos: int = 3) -> tuple[Predictions, np.ndarray]:
    """Lesions of `photos`, one, `photos`, one ... photos, whose predictions differ by noise; shuffled."""
    rng = np.random.default_rng(0)
    lesion_of = np.repeat(np.arange(lesions), np.where(np.arange(lesions) % 2, 1, photos))
    rng.shuffle(lesion_of)
    logits = rng.normal(0, 1, (lesions, 3))[lesion_of] + rng.normal(0, 1, (len(lesion_of), 3)) * noise
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.where(lesion_of < 70, 1, 2)
    ids = tuple(map(str, range(len(targets))))
    return Predictions(probabilities=probabilities, targets=targets, image_ids=ids), lesion_of.astype(str)


def pick(retest: pd.DataFrame, dx: str = "all") -> dict[str, float]:
    rows = retest[retest.dx == dx]
    return dict(zip(rows.metric, rows.value, strict=True))


def test_retest_metrics_are_means_over_lesions_of_means_over_pairs() -> None:
    predictions, lesions = predict_photos()
    predictions = decide(predictions, np.array([5, 1, 0.2]))
    assert (predictions.predicted != predictions.plain.predicted).any()
    per_lesion, others = [], []
    for lesion in {name for name in lesions if (lesions == name).sum() > 1}:
        photos = np.flatnonzero(lesions == lesion)
        beside = np.flatnonzero((lesions != lesion) & (predictions.targets == predictions.targets[photos[0]]))
        for found, pairs in (
            (per_lesion, list(combinations(photos, 2))),
            (others, [(a, b) for a in photos for b in beside]),
        ):
            p, q = (predictions.probabilities[[pair[side] for pair in pairs]] for side in (0, 1))
            r, s = (predictions.predicted[[pair[side] for pair in pairs]] for side in (0, 1))
            agree = r == s
            distance = np.maximum(p - q, 0).sum(axis=1)  # another form of the total variation
            found.append(
                (agree.mean(), float(agree.all()), distance.mean(), np.abs(p[:, 1] - q[:, 1]).mean())
            )
    retest = compute_retest(predictions, lesions, CLASSES)
    names = ["agreement", "unanimous", "distance", "mel_difference"]
    assert pick(retest) == pytest.approx(dict(zip(names, np.mean(per_lesion, axis=0), strict=True)))
    beside = retest[retest.dx == "all"].others.to_numpy()
    assert beside[[0, 2, 3]] == pytest.approx(np.mean(others, axis=0)[[0, 2, 3]])
    assert np.isnan(beside[1])


def test_only_lesions_with_several_photos_are_counted_each_under_its_class() -> None:
    retest = compute_retest(*predict_photos(), CLASSES)
    counts = retest.drop_duplicates("dx")[["dx", "lesions", "images"]].to_numpy().tolist()
    assert counts == [["all", 45, 135], ["mel", 35, 105], ["nv", 10, 30]]
    assert np.isnan(list(pick(retest, "nv").values())).all()  # too few lesions
    assert np.isfinite(list(pick(retest, "mel").values())).all()


@pytest.mark.parametrize(("lesions", "photos", "rows"), [(50, 1, 0), (2 * MIN_LESIONS - 2, 3, 3)])
def test_without_enough_lesions_there_is_no_number(lesions: int, photos: int, rows: int) -> None:
    retest = compute_retest(*predict_photos(lesions, photos=photos), ("a", "b", "c"))
    assert (retest.dx == "all").sum() == rows  # without a class mel, three metrics
    assert retest.value.isna().all()
