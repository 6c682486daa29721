"""The evaluation of a model on one split: what is fitted on val, and one table of all its metrics."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.calibration import (
    apply_temperature,
    check_probabilities,
    compute_brier,
    compute_ece,
    compute_reliability,
    fit_conformal,
    fit_temperature,
    predict_sets,
)
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    Predictions,
    compute_class_table,
    compute_intervals,
    compute_metrics,
    compute_share_interval,
    predict_always,
)
from skin_resnet.evaluation.operating import (
    apply_threshold,
    choose_thresholds,
    compute_referral,
    find_positives,
)
from skin_resnet.evaluation.subgroups import compute_retest, compute_subgroups

# The metrics that MLflow shows and compares; all others are in the artifacts of the run.
_TRACKED = ("images", "loss", "ece", *HEADLINES, *(f"baseline_{name}" for name in HEADLINES))

Row = tuple[str, float, float, float, int]  # name, value, low and high end of the 95 % interval, images
_NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is fitted on val and travels in the checkpoint.

    Attributes:
        temperature: What the logits are divided by.
        coverage: Wanted share of images whose prediction set holds the true class.
        least_probability: From which on a class belongs to an image's prediction set.
        thresholds: By name (`melanoma_at_0.90`): the highest one that reaches that sensitivity on val.
    """

    temperature: float
    coverage: float
    least_probability: float
    thresholds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as a checkpoint may hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` returned."""
        return cls(**values)


def fit_calibration(predictions: Predictions, classes: tuple[str, ...], coverage: float) -> Calibration:
    """Fit temperature, conformal sets and decision thresholds.

    Args:
        predictions: Of val, as the network outputs them.
        classes: The class order.
        coverage: Wanted share of images whose prediction set holds the true class.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(predictions)
    temperature = fit_temperature(predictions)
    calibrated = apply_temperature(predictions, temperature)
    return Calibration(
        temperature=temperature,
        coverage=coverage,
        least_probability=fit_conformal(calibrated, coverage),
        thresholds=choose_thresholds(calibrated, classes),
    )


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The evaluation of a model on some images.

    Attributes:
        table: All metrics, a row each: name, value, low and high (95 % interval by bootstrap over lesions,
            NaN where there is none), n (images measured).
        per_class: From `compute_class_table`, and the empirical coverage of each class.
        subgroups: From `compute_subgroups`.
        retest: From `compute_retest`.
        reliability: From `compute_reliability`, with a column `temperature`: before (1) and after.
        referral: From `compute_referral`.
        predictions: After temperature scaling.
        lesions: Which lesion each image shows, (N,).
        knows_lesions: Whether the source names lesions; without, intervals are by image.
        classes: The class order.
        baseline_class: The class with most training images.
        calibration: Fitted on val.
    """

    table: pd.DataFrame
    per_class: pd.DataFrame
    subgroups: pd.DataFrame
    retest: pd.DataFrame
    reliability: pd.DataFrame
    referral: pd.DataFrame
    predictions: Predictions
    lesions: NDArray[np.str_]
    knows_lesions: bool
    classes: tuple[str, ...]
    baseline_class: str
    calibration: Calibration

    def get(self, name: str) -> Any:
        """Return a metric's row of the table, with fields value, low, high and n."""
        return next(self.table[self.table.name == name].itertuples(index=False))

    def metrics(self, split: str) -> dict[str, float]:
        """Return the tracked metrics under their MLflow keys, `test/accuracy`, `test/accuracy_low`, ..."""
        rows = self.table[self.table.name.isin(_TRACKED)]
        return {
            f"{split}/{row.name}{end}": value
            for row in rows.itertuples(index=False)
            for end, value in (("", row.value), ("_low", row.low), ("_high", row.high))
            if np.isfinite(value)
        }

    def tabulate_predictions(self) -> pd.DataFrame:
        """Return a row per image: image_id, lesion_id, dx, prediction, and each class's probability."""
        names = np.array(self.classes)
        return pd.DataFrame(
            {
                "image_id": self.predictions.image_ids,
                "lesion_id": self.lesions,
                "dx": names[self.predictions.targets],
                "prediction": names[self.predictions.predicted],
                **dict(zip(self.classes, self.predictions.probabilities.T, strict=True)),
            }
        )


def assess(
    raw: Predictions,
    table: pd.DataFrame,
    classes: tuple[str, ...],
    baseline_class: str,
    calibration: Calibration,
) -> Assessment:
    """Evaluate a model on the images of a table.

    Args:
        raw: The network's predictions, in the table's order.
        table: Rows from `extract`.
        classes: The class order.
        baseline_class: The class with most training images.
        calibration: From `fit_calibration`, on val.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(raw)
    calibrated = apply_temperature(raw, calibration.temperature)
    lesions = join_lesions(table).to_numpy(str)
    sets = predict_sets(calibrated, calibration.least_probability)
    covered = sets[np.arange(len(sets)), calibrated.targets]
    per_class = compute_class_table(calibrated, classes)
    per_class["coverage"] = pd.Series(covered).groupby(calibrated.targets).mean().reindex(range(len(classes)))
    retest = compute_retest(calibrated, lesions, classes)
    referral = compute_referral(calibrated)
    rows = [
        *_measure_headlines(raw, calibrated, lesions, classes.index(baseline_class)),
        *_measure_sets(sets, covered, lesions),
        *_measure_thresholds(calibrated, calibration, lesions, classes),
        *_list_means(referral, retest, per_class),
    ]
    before = compute_reliability(raw).assign(temperature=1.0)
    after = compute_reliability(calibrated).assign(temperature=calibration.temperature)
    return Assessment(
        table=pd.DataFrame(rows, columns=["name", "value", "low", "high", "n"]),
        per_class=per_class,
        subgroups=compute_subgroups(calibrated, table, lesions),
        retest=retest,
        reliability=pd.concat([before, after]),
        referral=referral,
        predictions=calibrated,
        lesions=lesions,
        knows_lesions=not table.lesion_id.equals(table.image_id),
        classes=classes,
        baseline_class=baseline_class,
        calibration=calibration,
    )


def _measure_headlines(
    raw: Predictions, calibrated: Predictions, lesions: NDArray[np.str_], baseline: int
) -> Iterator[Row]:
    images = len(calibrated.targets)
    metrics, intervals = compute_metrics(calibrated), compute_intervals(calibrated, lesions)
    always = compute_metrics(predict_always(baseline, calibrated))
    for name in HEADLINES:
        yield name, getattr(metrics, name), *intervals[name], images
    single = {
        **{f"baseline_{name}": getattr(always, name) for name in HEADLINES},
        "loss": metrics.loss,
        "loss_before_temperature": compute_metrics(raw).loss,
        "ece": compute_ece(calibrated),
        "ece_before_temperature": compute_ece(raw),
        "brier": compute_brier(calibrated),
        "images": images,
        "lesions": len(np.unique(lesions)),
    }
    for name, value in single.items():
        yield name, value, _NAN, _NAN, images


def _measure_sets(
    sets: NDArray[np.bool_], covered: NDArray[np.bool_], lesions: NDArray[np.str_]
) -> Iterator[Row]:
    sizes = sets.sum(axis=1)
    yield "coverage", float(covered.mean()), *compute_share_interval(covered, lesions), len(sets)
    yield "set_size", float(sizes.mean()), _NAN, _NAN, len(sets)
    yield "singleton_fraction", float((sizes == 1).mean()), _NAN, _NAN, len(sets)


def _measure_thresholds(
    predictions: Predictions,
    calibration: Calibration,
    lesions: NDArray[np.str_],
    classes: tuple[str, ...],
) -> Iterator[Row]:
    groups = find_positives(classes)
    for name, threshold in calibration.thresholds.items():
        positives = groups[name.partition("_at_")[0]]
        for row in apply_threshold(predictions, positives, threshold, lesions):
            yield f"{name}_{row[0]}", *row[1:]


def _list_means(referral: pd.DataFrame, retest: pd.DataFrame, per_class: pd.DataFrame) -> Iterator[Row]:
    """Yield the rows of the table that summarise other frames."""
    yield "referral_area", float(referral.accuracy.mean()), _NAN, _NAN, len(referral)
    for row in retest[retest.dx == "all"].itertuples():
        yield f"retest_{row.metric}", row.value, row.low, row.high, row.images
    for name, column in per_class.drop(columns=["dx", "images"]).items():
        for dx, images, value in zip(per_class.dx, per_class.images, column, strict=True):
            yield f"{name}/{dx}", value, _NAN, _NAN, images
