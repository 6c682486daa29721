"""An evaluation: one table of all metrics, from which page, JSON, MLflow metrics and files are made."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from skin_resnet.commands.train import format_result
from skin_resnet.errors import UserError
from skin_resnet.evaluation.artifacts import list_artifacts
from skin_resnet.evaluation.assess import Assessment, assess
from skin_resnet.evaluation.calibration import Calibration, fit_calibration
from skin_resnet.evaluation.metrics import HEADLINES, Predictions, compute_metrics, compute_scores
from skin_resnet.evaluation.page import format_assessment, format_summary
from skin_resnet.evaluation.plots.assessment import plot_gradcam
from skin_resnet.labels import HAM10000_CLASSES
from tests.conftest import make_table

# In scripts that matplotlib's font lacks, and with what TeX and MLflow treat specially.
ODD_CLASSES = ("黒色腫", "母斑", "$x_{", "a|b/c $1$", "меланома")


def predict(table: pd.DataFrame, seed: int = 1) -> Predictions:
    rng = np.random.default_rng(seed)
    classes = len(table.dx.cat.categories)
    noise = rng.dirichlet(np.ones(classes), len(table))
    probabilities = noise + np.eye(classes)[table.target] * rng.random((len(table), 1))
    return Predictions(
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
    )


def evaluate(table: pd.DataFrame, raw: Predictions | None = None, val_seed: int = 0) -> Assessment:
    classes = tuple(table.dx.cat.categories)
    calibration = fit_calibration(predict(table, val_seed), classes, 0.8, np.arange(len(classes)) + 10)
    return assess(raw or predict(table), table, classes, classes[-2], calibration)


def make_calibration(least_probability: float, classes: int) -> Calibration:
    return Calibration(
        temperature=1.0, tau=0.0, decision_weights=[1.0] * classes, coverage=0.9,
        least_probability=least_probability, thresholds={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return make_table(lesions_per_class=30)


@pytest.fixture(scope="module")
def assessment(table: pd.DataFrame) -> Assessment:
    return evaluate(table)


def test_the_table_holds_the_headline_metrics_with_intervals_beside_the_baseline(
    assessment: Assessment,
) -> None:
    scores = compute_scores(assessment.predictions, assessment.lesions)
    for name in HEADLINES:
        row = assessment.get(name)
        assert (row.value, row.low, row.high) == scores[name]
        assert row.low < row.value < row.high
        assert row.n == len(assessment.lesions)
    assert assessment.get("baseline_balanced_accuracy").value == pytest.approx(1 / 7)
    assert assessment.get("baseline_accuracy").value == (assessment.predictions.targets == 5).mean()
    assert assessment.get("lesions").value == 210


def test_the_table_names_every_metric_once(assessment: Assessment) -> None:
    assert assessment.table.name.is_unique
    wanted = {"ece", "brier", "set_size", "melanoma_at_0.90_specificity", "malignant_at_0.95_threshold"}
    assert np.isfinite(assessment.table.set_index("name").value[[*wanted]]).all()


def test_coverage_is_the_share_of_sets_that_hold_the_true_class() -> None:
    table = make_table(lesions_per_class=2, classes=("a", "b", "c")).iloc[:4]
    table = table.assign(target=[0, 1, 1, 0], lesion_id=[*"aabc"])
    probabilities = np.array([[0.7, 0.3, 0], [0.5, 0.4, 0.1], [0.9, 0.1, 0], [0.6, 0.35, 0.05]])
    raw = Predictions(
        probabilities=probabilities, targets=table.target.to_numpy(), image_ids=tuple(table.image_id)
    )
    calibration = make_calibration(0.4, 3)
    result = assess(raw, table, ("a", "b", "c"), "a", calibration)
    values = [result.get(name).value for name in ("coverage", "set_size", "singleton_fraction")]
    assert values == [0.75, 1.25, 0.75]
    assert result.per_class.coverage[:2].tolist() == [1, 0.5]
    assert np.isnan(result.per_class.coverage[2])


def test_mlflow_gets_the_headline_metrics_only_under_their_split(assessment: Assessment) -> None:
    metrics = assessment.metrics("test")
    names = {"loss", "ece", *HEADLINES, "plain_accuracy", "plain_balanced_accuracy", "baseline_accuracy"}
    names |= {"balanced_accuracy_low", "balanced_accuracy_high"}
    assert set(metrics) == {f"test_{name}" for name in names}
    plain = compute_metrics(assessment.predictions.plain)
    assert metrics["test_plain_balanced_accuracy"] == plain.balanced_accuracy
    scores = compute_scores(assessment.predictions.plain, assessment.lesions)
    for name in ("accuracy", "balanced_accuracy"):
        row = assessment.get(f"plain_{name}")
        assert (row.value, row.low, row.high) == scores[name]
    assert metrics["test_balanced_accuracy_low"] == assessment.get("balanced_accuracy").low


def test_a_score_whose_interval_holds_the_baselines_is_said_to_be_no_better(table: pd.DataFrame) -> None:
    shuffled = predict(table).select(np.random.default_rng(1).permutation(len(table)))
    random = replace(shuffled, targets=table.target.to_numpy(), image_ids=tuple(table.image_id))
    chance, good = evaluate(table, random), evaluate(table)
    for each, is_better in ((chance, False), (good, True)):
        for name in ("balanced_accuracy", "accuracy"):
            row, baseline = each.get(name), each.get(f"baseline_{name}").value
            assert (row.low > baseline) == is_better
            assert (name in each.find_not_better()) != is_better
        for text in (format_summary(each, "test"), format_assessment(each, "test"), format_result(each)):
            assert ("ot better" in text) != is_better
    assert chance.get("balanced_accuracy").value > 1 / 7, "above the baseline, but within the noise"


def test_the_page_shows_the_values_of_the_table(assessment: Assessment) -> None:
    page = format_assessment(assessment, "test", ["**A warning.**", ""])
    assert page.startswith("**A warning.**\n\n### Test: ")
    row = assessment.get("balanced_accuracy")
    assert f"{row.value:.3f} [{row.low:.2f}, {row.high:.2f}]" in page
    assert f"{assessment.get('ece').value:.3f}" in page
    assert f"{assessment.calibration['thresholds']['malignant_at_0.95']:.4f}" in page
    assert "always nv" in page
    assert " nan" not in page
    lines = [line for line in page.splitlines() if line.startswith("|")][:6]
    assert len({tuple(match.start() for match in re.finditer(r"\|", line)) for line in lines}) == 1


def test_predictions_are_a_row_per_image(assessment: Assessment) -> None:
    rows = list_artifacts(assessment, "val", "Val")["val/predictions.csv"]
    assert rows.columns.tolist() == ["image_id", "lesion_id", "dx", "prediction", *HAM10000_CLASSES]
    assert rows[[*HAM10000_CLASSES]].sum(axis=1).to_numpy() == pytest.approx(np.ones(len(rows)))
    assert (rows.dx == rows.prediction).mean() == assessment.get("accuracy").value


def test_without_lesion_ids_intervals_are_said_to_be_by_image(table: pd.DataFrame) -> None:
    alone = evaluate(table.assign(lesion_id=table.image_id))
    page = format_assessment(alone, "test")
    assert "intervals are by image" in page
    assert alone.retest.empty
    assert "Test-retest" not in page
    assert "Test-retest" in format_assessment(evaluate(table), "test")


def test_a_val_without_melanoma_gives_no_threshold_for_it_and_says_so(table: pd.DataFrame) -> None:
    without = predict(table).select((table.dx != "mel").to_numpy())
    calibration = fit_calibration(without, HAM10000_CLASSES, 0.8, np.full(7, 9))
    assert {name.partition("_at_")[0] for name in calibration["thresholds"]} == {"malignant"}
    result = assess(predict(table), table, HAM10000_CLASSES, "nv", calibration)
    assert "no threshold for melanoma" in format_assessment(result, "test")


@pytest.mark.parametrize(("rows", "words"), [(0, "no images"), (5, r"1 of 5 images \(first: image_3\)")])
def test_no_images_and_output_that_is_not_finite_are_refused(rows: int, words: str) -> None:
    probabilities = np.full((rows, 2), 0.5)
    probabilities[3:4] = np.nan
    ids = tuple(f"image_{row}" for row in range(rows))
    broken = Predictions(probabilities=probabilities, targets=np.zeros(rows, np.int64), image_ids=ids)
    calibration = make_calibration(0.5, 2)
    with pytest.raises(UserError, match=words):
        fit_calibration(broken, ("a", "b"), 0.9, np.full(2, 9))
    with pytest.raises(UserError, match=words):
        assess(broken, pd.DataFrame(), ("a", "b"), "a", calibration)


def test_class_names_in_any_script_and_with_tex_are_drawn_and_have_metrics_of_their_own() -> None:
    table = make_table(lesions_per_class=10, classes=ODD_CLASSES)
    result = evaluate(table)
    rows = np.arange(len(ODD_CLASSES))
    pixels = np.zeros((len(rows), 8, 8, 3), np.uint8)
    files = list_artifacts(result, "test", "Test")
    heats = pixels[..., 0].astype(np.float32)
    files["gradcam"] = plot_gradcam(pixels, heats, result.predictions, rows, ODD_CLASSES, "Test")
    for content in files.values():
        if isinstance(content, Figure):
            content.draw_without_rendering()  # raises for broken TeX, and warns of what the font lacks
    labels = [label.get_text() for label in files["test/confusion.png"].axes[0].get_xticklabels()]
    assert labels == ["class 0", "class 1", r"\$x_{", r"a|b/c \$1\$", "меланома"]
    assert result.per_class.dx.tolist() == [*ODD_CLASSES]
    assert all(re.fullmatch("[a-z_/]+", name) for name in result.metrics("test"))
    assert "Decision thresholds" not in files["test/evaluation.md"]
    assert "test/roc.png" not in files


def test_the_work_for_images_does_not_grow_with_the_number_of_classes() -> None:
    table = make_table(lesions_per_class=1, classes=tuple(f"class {index:03}" for index in range(60)))
    result = evaluate(table)
    files = list_artifacts(result, "test", "Test")
    assert len(files["test/confusion.png"].axes[0].texts) == 0
    for content in files.values():
        if isinstance(content, Figure):
            assert content.get_figheight() < 20
