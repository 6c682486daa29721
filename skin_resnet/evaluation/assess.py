"""The evaluation of a model on one split: one table of all its metrics, and a few frames."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from skin_resnet.data.extract import has_lesion_ids
from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.calibration import (
    Calibration,
    apply_temperature,
    check_probabilities,
    compute_brier,
    compute_ece,
    compute_reliability,
    decide,
    predict_sets,
)
from skin_resnet.evaluation.metrics import (
    HEADLINES,
    PLAIN,
    Predictions,
    compute_class_table,
    compute_metrics,
    compute_scores,
    compute_share,
    is_better,
    predict_always,
)
from skin_resnet.evaluation.operating import apply_threshold, compute_referral, find_positives
from skin_resnet.evaluation.subgroups import compute_retest, compute_subgroups

# The metrics that MLflow shows and compares; all others are in the artifacts of the run.
_TRACKED = ("loss", "ece", *HEADLINES, *PLAIN, "baseline_accuracy")

Row = tuple[str, float, float, float, int]  # name, value, low and high end of the 95 % interval, images
_NO_INTERVAL = (float("nan"), float("nan"))


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """The evaluation of a model on some images.

    Attributes:
        table: A row per metric over all images: name, value, low and high (95 % interval by bootstrap over
            lesions, NaN where there is none), n (images measured).
        per_class: From `compute_class_table`, and the empirical coverage of each class.
        reliability: From `compute_reliability`, with a column `temperature`: before (1) and after.
        predictions: After temperature scaling, with the decisions of the decision rule.
        lesions: Which lesion each image shows, (N,).
        knows_lesions: Whether the source names lesions; without, intervals are by image.
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

    def find_not_better(self) -> list[str]:
        """Return the scores whose interval is not above that of always predicting the majority class."""
        names = ("balanced_accuracy", "accuracy")
        pairs = {name: (self.get(name).low, self.get(f"baseline_{name}").value) for name in names}
        return [name for name, pair in pairs.items() if not is_better(*pair)]

    def metrics(self, split: str) -> dict[str, float]:
        """Return the tracked metrics under their MLflow keys, `test_accuracy`, ...

        Without a slash, they come after the curves of train and val on the run's page: MLflow shows one
        section per prefix, by name, and `test/` would come first.
        """
        metrics = {name: self.get(name).value for name in _TRACKED}
        score = self.get("balanced_accuracy")
        metrics |= {"balanced_accuracy_low": score.low, "balanced_accuracy_high": score.high}
        return {f"{split}_{name}": value for name, value in metrics.items() if np.isfinite(value)}

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
    """Evaluate a network's predictions of the images of a table from `extract`, in its order.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(raw)
    calibrated = decide(apply_temperature(raw, calibration["temperature"]), calibration["decision_weights"])
    lesions = join_lesions(table).to_numpy(str)
    sets = predict_sets(calibrated, calibration["least_probability"])
    covered = sets[np.arange(len(sets)), calibrated.targets]
    per_class = compute_class_table(calibrated, classes)
    per_class["coverage"] = pd.Series(covered).groupby(calibrated.targets).mean().reindex(range(len(classes)))
    rows = [
        *_measure(raw, calibrated, lesions, classes.index(baseline_class)),
        ("coverage", *compute_share(covered, lesions), len(sets)),
        ("set_size", sets.sum(axis=1).mean(), *_NO_INTERVAL, len(sets)),
        ("singleton_fraction", (sets.sum(axis=1) == 1).mean(), *_NO_INTERVAL, len(sets)),
        *_measure_thresholds(calibrated, calibration["thresholds"], lesions, classes),
    ]
    before = compute_reliability(raw).assign(temperature=1.0)
    after = compute_reliability(calibrated).assign(temperature=calibration["temperature"])
    return Assessment(
        table=pd.DataFrame(rows, columns=["name", "value", "low", "high", "n"]),
        per_class=per_class,
        subgroups=compute_subgroups(calibrated, table, lesions),
        retest=compute_retest(calibrated, lesions, classes),
        reliability=pd.concat([before, after]),
        referral=compute_referral(calibrated),
        predictions=calibrated,
        lesions=lesions,
        knows_lesions=has_lesion_ids(table),
        classes=classes,
        baseline_class=baseline_class,
        calibration=calibration,
    )


def _measure(
    raw: Predictions, calibrated: Predictions, lesions: NDArray[np.str_], baseline: int
) -> Iterator[Row]:
    images, scores = len(lesions), compute_scores(calibrated, lesions)
    for name in (*HEADLINES, *PLAIN):
        yield name, *scores[name], images
    always = compute_metrics(predict_always(baseline, calibrated))
    single = {
        **{f"baseline_{name}": getattr(always, name) for name in HEADLINES},
        "loss": compute_metrics(calibrated).loss,
        "loss_before_temperature": compute_metrics(raw).loss,
        "ece": compute_ece(calibrated),
        "ece_before_temperature": compute_ece(raw),
        "brier": compute_brier(calibrated),
        "images": images,
        "lesions": len(np.unique(lesions)),
    }
    for name, value in single.items():
        yield name, value, *_NO_INTERVAL, images
    if raw.unfamiliarity is not None:
        yield "unfamiliar", *compute_share(raw.unfamiliarity > 1, lesions), images


def _measure_thresholds(
    predictions: Predictions,
    thresholds: dict[str, float],
    lesions: NDArray[np.str_],
    classes: tuple[str, ...],
) -> Iterator[Row]:
    groups = find_positives(classes)
    for name, threshold in thresholds.items():
        yield f"{name}_threshold", threshold, *_NO_INTERVAL, len(lesions)
        positives = groups[name.partition("_at_")[0]]
        for metric, value, low, high, n in apply_threshold(predictions, positives, threshold, lesions):
            yield f"{name}_{metric}", value, low, high, n
