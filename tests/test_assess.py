"""Everything said of a model at once: complete, readable, and writable as JSON."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from skin_resnet.errors import UserError
from skin_resnet.evaluation.assess import Assessment, Calibration, assess, calibrate, format_assessment
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.labels import HAM10000_CLASSES
from skin_resnet.tracking.log_assessment import _drop_nans
from tests.conftest import make_table


def predict(table: pd.DataFrame, seed: int) -> Predictions:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet(np.ones(7), len(table)) + np.eye(7)[table.target] * rng.random(
        (len(table), 1)
    )
    return Predictions(
        probabilities=probabilities / probabilities.sum(axis=1, keepdims=True),
        targets=table.target.to_numpy(),
        image_ids=tuple(table.image_id),
    )


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return make_table(lesions_per_class=30)


@pytest.fixture(scope="module")
def assessment(table: pd.DataFrame) -> Assessment:
    calibration = calibrate(predict(table, 0), HAM10000_CLASSES, coverage=0.8)
    return assess(predict(table, 1), table, HAM10000_CLASSES, "nv", calibration)


def test_what_val_fits_survives_the_checkpoint(table: pd.DataFrame) -> None:
    calibration = calibrate(predict(table, 0), HAM10000_CLASSES, coverage=0.8)
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
    assert set(calibration.points) == {"melanoma", "malignant"}


def test_the_page_has_every_part(assessment: Assessment) -> None:
    page = format_assessment(assessment, "test")
    for part in ("Test: ", "Calibration", "Operating points", "Referral", "Test-retest", "Slices"):
        assert f"### {part}" in page
    assert "always nv" in page
    assert "names no lesions" not in page
    assert " nan" not in page


def test_temperature_changes_how_sure_the_model_is_and_no_answer(assessment: Assessment) -> None:
    assert (assessment.raw.predicted == assessment.scores.predictions.predicted).all()
    assert not np.allclose(assessment.raw.probabilities, assessment.scores.predictions.probabilities)


def test_the_file_for_programs_is_strict_json(assessment: Assessment) -> None:
    written = json.dumps(_drop_nans(assessment.to_json("test")), allow_nan=False)
    read = json.loads(written)
    assert read["intervals_drawn_by"] == "lesion"
    assert np.array(read["confusion"]).sum() == len(assessment.raw.targets)
    assert read["metrics"]["balanced_accuracy"] == assessment.scores.metrics.balanced_accuracy
    assert len(read["classes"]) == 7
    assert len(read["operating_points"]["melanoma"]) == 2


def test_every_metric_for_mlflow_is_a_number_under_its_split(assessment: Assessment) -> None:
    figures = assessment.to_dict("test")
    assert all(name.startswith(("test/", "test_")) for name in figures)
    assert figures["test_sensitivity/mel"] == assessment.scores.class_table.sensitivity[4]
    for name in (
        "ece",
        "brier",
        "coverage",
        "melanoma_at_0.90_specificity",
        "retest_agreement",
        "macro_auc_low",
    ):
        assert np.isfinite(figures[f"test/{name}"])


def test_without_lesion_ids_the_page_says_what_the_intervals_are(table: pd.DataFrame) -> None:
    alone = table.assign(lesion_id=table.image_id)
    calibration = calibrate(predict(alone, 0), HAM10000_CLASSES, coverage=0.8)
    assessment = assess(predict(alone, 1), alone, HAM10000_CLASSES, "nv", calibration)
    page = format_assessment(assessment, "test")
    assert "The source names no lesions: intervals are by image" in page
    assert " lesions\n" not in page.split("|")[0]
    assert "No lesion has several photos" in page
    assert assessment.to_json("test")["intervals_drawn_by"] == "image"


def test_answers_that_are_no_numbers_are_refused(table: pd.DataFrame, assessment: Assessment) -> None:
    broken = predict(table, 1)
    probabilities = broken.probabilities.copy()
    probabilities[3] = np.nan
    with pytest.raises(UserError, match="must be finite, but 1 of"):
        assess(
            replace(broken, probabilities=probabilities),
            table,
            HAM10000_CLASSES,
            "nv",
            assessment.calibration,
        )


def test_other_classes_have_no_operating_points() -> None:
    table = make_table(lesions_per_class=10, classes=("a", "b"))
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(2), len(table))
    predictions = Predictions(
        probabilities=probabilities, targets=table.target.to_numpy(), image_ids=tuple(table.image_id)
    )
    calibration = calibrate(predictions, ("a", "b"), coverage=0.9)
    page = format_assessment(assess(predictions, table, ("a", "b"), "a", calibration), "test")
    assert "Operating points" not in page
