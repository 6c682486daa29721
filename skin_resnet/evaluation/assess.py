"""All that is said of a model on one split: what val fits, and what any split is then measured by."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from skin_resnet.data.split import join_lesions
from skin_resnet.evaluation.calibration import (
    ConformalThreshold,
    Coverage,
    apply_temperature,
    check_coverage,
    check_probabilities,
    compute_brier,
    compute_ece,
    compute_reliability,
    fit_conformal,
    fit_temperature,
)
from skin_resnet.evaluation.formatting import format_class_table, format_score
from skin_resnet.evaluation.metrics import Predictions, compute_confusion, compute_metrics
from skin_resnet.evaluation.operating import (
    OperatingPoint,
    OperatingResult,
    Referral,
    apply_threshold,
    choose_thresholds,
    compute_referral,
    find_positives,
    format_operating,
)
from skin_resnet.evaluation.retest import Retest, compute_retest, format_retest
from skin_resnet.evaluation.scores import Scores, compute_scores, format_scores
from skin_resnet.evaluation.subgroups import compute_slices

# What every report of a training begins with whose split shares lesions.
LEAK_BANNER = (
    "**The split of this training leaks: its parts share lesions, and scores may be too good to be true.**"
)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What is fitted on val and travels with the network.

    Attributes:
        temperature: What the logits are divided by.
        conformal: What a probability must reach for its class to be in an image's set.
        points: By what is looked for (melanoma, malignant), thresholds that reach a sensitivity on val.
    """

    temperature: float
    conformal: ConformalThreshold
    points: dict[str, tuple[OperatingPoint, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Give plain values, as a checkpoint may hold."""
        points = {name: [_to_plain(point) for point in group] for name, group in self.points.items()}
        return {"temperature": self.temperature, "conformal": asdict(self.conformal), "points": points}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Read what `to_dict` gave."""
        points = {
            name: tuple(
                OperatingPoint(**{**point, "positives": frozenset(point["positives"])}) for point in group
            )
            for name, group in values["points"].items()
        }
        conformal = ConformalThreshold(**values["conformal"])
        return cls(temperature=values["temperature"], conformal=conformal, points=points)


def _to_plain(point: OperatingPoint) -> dict[str, Any]:
    return {**asdict(point), "positives": sorted(point.positives)}


def calibrate(predictions: Predictions, classes: tuple[str, ...], coverage: float) -> Calibration:
    """Fit temperature, conformal sets and operating points.

    Args:
        predictions: Of val, as the network gives them.
        classes: The class order.
        coverage: Share of images whose set should hold the true class.
    """
    temperature = fit_temperature(predictions)
    calibrated = apply_temperature(predictions, temperature)
    return Calibration(
        temperature=temperature,
        conformal=fit_conformal(calibrated, coverage),
        points={
            name: choose_thresholds(calibrated, positives)
            for name, positives in find_positives(classes).items()
        },
    )


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """All figures of a model on one split.

    Attributes:
        raw: The predictions before temperature; `scores` and all else are those after.
        knows_lesions: Whether the source tells which photos show one lesion; without, intervals are by image.
        slices: From `compute_slices`.
        leaks: Whether the split that the model was trained on does.
        views: How many views of an image its predictions average.
    """

    raw: Predictions
    scores: Scores
    calibration: Calibration
    brier: float
    ece: float
    coverage: Coverage
    operating: dict[str, tuple[OperatingResult, ...]]
    referral: Referral
    retest: Retest
    slices: pd.DataFrame
    knows_lesions: bool
    leaks: bool = False
    views: int = 1

    def to_dict(self, split: str) -> dict[str, float]:
        """Name the figures as MLflow shows them."""
        figures = {
            **self.scores.to_dict(split),
            **self.retest.to_dict(split),
            f"{split}/views": self.views,
            f"{split}/loss_before_temperature": compute_metrics(self.raw).loss,
            f"{split}/brier": self.brier,
            f"{split}/ece": self.ece,
            f"{split}/ece_before_temperature": compute_ece(self.raw),
            f"{split}/coverage": self.coverage.coverage,
            f"{split}/coverage_low": self.coverage.interval[0],
            f"{split}/coverage_high": self.coverage.interval[1],
            f"{split}/set_size": self.coverage.mean_size,
            f"{split}/referral_area": self.referral.area,
        }
        for name, group in self.operating.items():
            for result in group:
                for figure in ("sensitivity", "specificity"):
                    key = f"{split}/{name}_at_{result.point.goal:.2f}_{figure}"
                    low, high = getattr(result, f"{figure}_interval")
                    figures |= {key: getattr(result, figure), f"{key}_low": low, f"{key}_high": high}
        for row in self.scores.class_table.to_dict("records"):
            figures |= {
                f"{split}_{name}/{row['dx']}": row[name] for name in row if name not in ("dx", "images")
            }
        return figures

    def to_json(self, split: str) -> dict[str, Any]:
        """Give everything but the single predictions, for programs."""
        operating = {
            name: [{**asdict(result), "point": _to_plain(result.point)} for result in group]
            for name, group in self.operating.items()
        }
        return {
            "split_leaks": self.leaks,
            "views": self.views,
            "metrics": {name.removeprefix(f"{split}/"): value for name, value in self.to_dict(split).items()},
            "confusion": compute_confusion(self.scores.predictions).tolist(),
            "reliability": compute_reliability(self.scores.predictions).to_dict("records"),
            "referral": {
                "referred_fraction": self.referral.referred_fraction.tolist(),
                "accuracy": self.referral.accuracy.tolist(),
                "balanced_accuracy": self.referral.balanced_accuracy.tolist(),
            },
            "intervals": self.scores.intervals,
            "intervals_drawn_by": "lesion" if self.knows_lesions else "image",
            "baseline": {"class": self.scores.baseline_class, **asdict(self.scores.baseline)},
            "calibration": self.calibration.to_dict(),
            "coverage": {**asdict(self.coverage), "class_coverage": self.coverage.class_coverage.tolist()},
            "operating_points": operating,
            "classes": self.scores.class_table.to_dict("records"),
            "slices": self.slices.to_dict("records"),
            "retest": self.retest.table.to_dict("records"),
        }


def assess(
    raw: Predictions,
    table: pd.DataFrame,
    classes: tuple[str, ...],
    baseline_class: str,
    calibration: Calibration,
) -> Assessment:
    """Measure a model on the images of a table.

    Args:
        raw: What the network says of them, in the table's order.
        table: Rows from `extract`.
        classes: The class order.
        baseline_class: The class with most training images.
        calibration: From `calibrate`, on val.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    check_probabilities(raw)
    calibrated = apply_temperature(raw, calibration.temperature)
    lesions = join_lesions(table).to_numpy(str)
    return Assessment(
        raw=raw,
        scores=compute_scores(calibrated, lesions, classes, baseline_class),
        calibration=calibration,
        brier=compute_brier(calibrated),
        ece=compute_ece(calibrated),
        coverage=check_coverage(calibrated, calibration.conformal, lesions),
        operating={
            name: tuple(apply_threshold(calibrated, point, lesions) for point in group)
            for name, group in calibration.points.items()
        },
        referral=compute_referral(calibrated),
        retest=compute_retest(calibrated, lesions, classes),
        slices=compute_slices(calibrated, table, lesions),
        knows_lesions=not table.lesion_id.equals(table.image_id),
    )


def format_assessment(assessment: Assessment, split: str) -> str:
    """Write a page of Markdown that also reads well on a terminal."""
    parts = [LEAK_BANNER] if assessment.leaks else []
    if assessment.views > 1:
        parts.append(
            f"Predictions are averaged over {assessment.views} views; temperature, thresholds and sets were "
            "fitted on val with one."
        )
    parts.append(format_scores(assessment.scores, split, assessment.knows_lesions))
    parts.append(_format_calibration(assessment))
    if assessment.operating:
        parts += ["### Operating points, chosen on val", format_operating(assessment.operating)]
    parts += [
        _format_referral(assessment.referral),
        format_retest(assessment.retest),
        _format_slices(assessment),
    ]
    return "\n\n".join(parts)


def _format_calibration(assessment: Assessment) -> str:
    coverage, conformal = assessment.coverage, assessment.calibration.conformal
    kept = format_score(coverage.coverage, coverage.interval)
    return (
        "### Calibration\n\n"
        f"Temperature {assessment.calibration.temperature:.2f}, fitted on val, takes the expected "
        f"calibration error from {compute_ece(assessment.raw):.3f} to {assessment.ece:.3f}. "
        f"The Brier score is {assessment.brier:.3f}. "
        f"Sets meant to hold the true class of {conformal.coverage:.0%} of images hold it for {kept}, "
        f"with {coverage.mean_size:.1f} classes on average."
    )


def _format_referral(referral: Referral) -> str:
    images = len(referral.accuracy)
    kept = ", ".join(
        f"{referral.accuracy[int(fraction * images)]:.3f} at {fraction:.0%}"
        for fraction in (0, 0.1, 0.2, 0.5)
    )
    return f"### Referral\n\nAccuracy on the rest when the least certain images are referred: {kept}."


def _format_slices(assessment: Assessment) -> str:
    slices = assessment.slices
    shown = ((slices.figure == "balanced_accuracy") & (slices["by"] != "all")) | (slices["by"] == "dx")
    spoken = slices[shown & ~slices.too_small]
    small = slices[slices.too_small].drop_duplicates(["by", "slice"])
    rows = pd.DataFrame(
        {
            "slice": spoken["by"] + ": " + spoken["slice"],
            "images": spoken.images,
            "lesions": spoken.lesions,
            "classes": spoken.classes,
            "one answer for all": np.where(spoken["by"] == "dx", np.nan, 1 / spoken.classes),
            "balanced accuracy; of a dx, sensitivity": [
                format_score(row.value, (row.low, row.high)) for row in spoken.itertuples()
            ],
        }
    )
    parts = ["### Slices"]
    if len(rows):
        parts.append(format_class_table(rows))
    if len(small):
        names = ", ".join(f"{row.slice} ({row.images})" for row in small.itertuples())
        parts.append(f"Too small to speak of: {names}.")
    return "\n\n".join(parts)
