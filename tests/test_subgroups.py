from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

from skin_resnet.evaluation.metrics import Predictions, compute_intervals, compute_mean_interval
from skin_resnet.evaluation.plots.subgroups import plot_slices
from skin_resnet.evaluation.subgroups import MIN_IMAGES, MIN_LESIONS, compute_slices
from skin_resnet.labels import HAM10000_CLASSES
from tests.test_metrics import predict_randomly
from tests.test_plots import assert_texts_are_apart, texts_of

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
def sliced() -> tuple[Predictions, pd.DataFrame, np.ndarray, pd.DataFrame]:
    predictions = predict_randomly(600)
    table, lesions = describe_images(predictions)
    return predictions, table, lesions, compute_slices(predictions, table, lesions)


def test_the_figures_of_a_slice_are_scikit_learns_on_its_images(sliced) -> None:
    predictions, table, lesions, slices = sliced
    for by, name, inside in (
        ("all", "all", np.ones(600, dtype=bool)),
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
        rows = slices[(slices["by"] == by) & (slices["slice"] == name)].set_index("figure")
        assert rows.value.to_dict() == pytest.approx(expected)
        part = Predictions(probabilities=probabilities, targets=targets, image_ids=())
        for figure, interval in compute_intervals(part, lesions[inside]).items():
            assert (rows.low[figure], rows.high[figure]) == interval
        assert set(rows.images) == {len(targets)}
        assert set(rows.lesions) == {len(set(lesions[inside]))}
        assert set(rows.classes) == {len(set(targets))}


def test_the_slices_by_diagnosis_hold_its_sensitivity(sliced) -> None:
    predictions, _, _, slices = sliced
    recalls = sk.recall_score(predictions.targets, predictions.predicted, average=None)
    rows = slices[slices["by"] == "dx"]
    assert set(rows.figure) == {"sensitivity"}
    assert rows["slice"].tolist() == list(HAM10000_CLASSES)
    spoken = ~rows.too_small.to_numpy()
    assert spoken.any()
    assert rows.value[spoken].to_numpy() == pytest.approx(recalls[spoken])


@pytest.mark.parametrize("by", ["sex", "age", "localization", "dx"])
def test_every_image_is_in_one_slice_and_slices_have_an_order(sliced, by: str) -> None:
    rows = sliced[3][sliced[3]["by"] == by].drop_duplicates("slice")
    assert rows.images.sum() == 600
    order = {
        "sex": ["female", "male", "unknown"],
        "age": list(AGES),
        "localization": ["back", "face", "ear", "unknown"],  # the frequent first, unknown last
        "dx": list(HAM10000_CLASSES),
    }
    assert rows["slice"].tolist() == order[by]


def test_an_age_band_begins_with_its_first_year(sliced) -> None:
    _, table, _, slices = sliced
    counts = slices[slices["by"] == "age"].drop_duplicates("slice").images.tolist()
    assert counts == [table.age.isin(ages).sum() for ages in AGES.values()]


def test_the_order_of_the_table_does_not_matter(sliced) -> None:
    predictions, table, lesions, slices = sliced
    shuffled = pd.concat([table, table.assign(image_id="x" + table.image_id)]).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compute_slices(predictions, shuffled, lesions), slices)


@pytest.mark.parametrize(
    ("images", "lesions", "classes", "too_small"),
    [
        (MIN_IMAGES, MIN_LESIONS, 2, False),
        (MIN_IMAGES - 1, MIN_LESIONS, 2, True),
        (MIN_IMAGES, MIN_LESIONS - 1, 2, True),
        (MIN_IMAGES, MIN_LESIONS, 1, True),
    ],
)
def test_a_slice_that_is_too_small_has_counts_but_no_number(
    images: int, lesions: int, classes: int, too_small: bool
) -> None:
    predictions = predict_randomly(images)
    predictions = replace(predictions, targets=np.arange(images) % classes)
    table, _ = describe_images(predictions)
    lesion_of = np.array([f"L{row % lesions}" for row in range(images)])
    slices = compute_slices(predictions, table, lesion_of)
    whole = slices[slices["by"] == "all"]
    assert (whole.too_small == too_small).all()
    assert (whole[["value", "low", "high"]].isna().all(axis=1) == too_small).all()
    assert set(whole.images) == {images}
    assert set(whole.lesions) == {lesions}


def test_an_attribute_that_is_never_known_makes_no_slices(sliced) -> None:
    predictions, table, lesions, _ = sliced
    slices = compute_slices(predictions, table.assign(sex="unknown", age=np.nan), lesions)
    assert slices["by"].unique().tolist() == ["all", "localization", "dx"]


def test_the_interval_of_a_mean_is_that_of_the_accuracy() -> None:
    predictions = predict_randomly(300)
    lesions = np.array([f"L{row // 3}" for row in range(300)])
    hits = predictions.predicted == predictions.targets
    expected = compute_intervals(predictions, lesions)["accuracy"]
    assert compute_mean_interval(hits, lesions) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("figure", ["balanced_accuracy", "accuracy", "macro_auc"])
def test_the_figure_shows_each_value_and_says_where_there_is_none(sliced, figure: str) -> None:
    page = plot_slices(sliced[3], "Test", figure)
    assert_texts_are_apart(page)
    shown = sliced[3][sliced[3].figure == figure].set_index("by")
    assert f"{shown.value['all']:.3f} (line), 600 images of 300 lesions" in page._suptitle.get_text()
    assert len(page.axes) == (4 if figure == "balanced_accuracy" else 3)
    for axes, by in zip(page.axes, ("sex", "age", "localization"), strict=False):
        line, dots = axes.lines
        assert set(line.get_xdata()) == {shown.value["all"]}
        np.testing.assert_array_equal(dots.get_xdata(), shown.value[by])
        assert texts_of(axes).count("too small to speak of") == shown.too_small[by].sum()
        counts = [f"{row.images} ({row.lesions}), {row.classes}" for row in shown.loc[by].itertuples()]
        assert [text for text in texts_of(axes) if "(" in text] == counts


def test_a_figure_of_slices_that_are_all_too_small_has_no_line() -> None:
    predictions = predict_randomly(20)
    page = plot_slices(compute_slices(predictions, *describe_images(predictions)), "Test")
    assert_texts_are_apart(page)
    assert page._suptitle.get_text() == "Test: balanced accuracy, 20 images of 10 lesions"
