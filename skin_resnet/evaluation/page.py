"""An evaluation as a page of Markdown that also reads well on a terminal."""

from collections.abc import Sequence

import pandas as pd

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.formatting import format_class_table, format_score, format_table, spell_metric
from skin_resnet.evaluation.metrics import HEADLINES
from skin_resnet.evaluation.operating import find_positives
from skin_resnet.evaluation.subgroups import MIN_IMAGES, MIN_LESIONS

# At the top of every report of a training whose split shares lesions.
LEAK_BANNER = (
    "**The split of this training leaks: train, val or test share lesions or images, so its metrics may be "
    "too high.**"
)
_RETEST = {
    "agreement": "pairs of photos with the same prediction",
    "unanimous": "lesions whose photos all have the same prediction",
    "distance": "total variation distance of the probabilities",
    "mel_difference": "absolute difference of the probability of mel",
}


def format_assessment(assessment: Assessment, split: str, notes: Sequence[str] = ()) -> str:
    """Write an evaluation as Markdown.

    Args:
        assessment: Of any split.
        split: Its name.
        notes: Paragraphs to begin with: what the reader must know to trust the metrics.
    """
    parts = [
        *filter(None, notes),
        _format_headlines(assessment, split),
        format_class_table(assessment.per_class),
        _format_calibration(assessment),
        *_format_thresholds(assessment),
        _format_referral(assessment),
        *_format_retest(assessment.retest),
        *_format_subgroups(assessment.subgroups),
    ]
    return "\n\n".join(parts)


def _format_row(assessment: Assessment, name: str) -> str:
    row = assessment.get(name)
    return format_score(row.value, None if pd.isna(row.low) else (row.low, row.high))


def _format_headlines(assessment: Assessment, split: str) -> str:
    rows = [
        [spell_metric(name), _format_row(assessment, name), _format_row(assessment, f"baseline_{name}")]
        for name in HEADLINES
    ]
    rows.append(["loss (nats, after temperature)", _format_row(assessment, "loss"), ""])
    shown = f"{assessment.get('images').value:.0f} images"
    note = "Intervals are by bootstrap over lesions."
    if assessment.knows_lesions:
        shown += f" of {assessment.get('lesions').value:.0f} lesions"
    else:
        note = (
            "The data does not name lesions: intervals are by image, too narrow where photos share a lesion."
        )
    header = ["", "model [95 % interval]", f"always {assessment.baseline_class}"]
    return f"### {split.capitalize()}: {shown}\n\n{format_table(header, rows)}\n\n{note}"


def _format_calibration(assessment: Assessment) -> str:
    calibration = assessment.calibration
    ece_before, ece, brier, size = (
        assessment.get(name).value for name in ("ece_before_temperature", "ece", "brier", "set_size")
    )
    return (
        "### Calibration\n\n"
        f"A temperature of {calibration.temperature:.2f}, fitted on val, changes the expected calibration "
        f"error from {ece_before:.3f} to {ece:.3f}; the Brier score is {brier:.3f}. "
        f"Conformal prediction sets for {calibration.coverage:.0%} coverage have an "
        f"empirical coverage of {_format_row(assessment, 'coverage')} and {size:.1f} classes on "
        "average."
    )


def _format_thresholds(assessment: Assessment) -> list[str]:
    rows = []
    for name, threshold in assessment.calibration.thresholds.items():
        group, _, goal = name.partition("_at_")
        scores = [_format_row(assessment, f"{name}_{metric}") for metric in ("sensitivity", "specificity")]
        rows.append([group, goal, f"{threshold:.4f}", *scores])
    groups = find_positives(assessment.classes)
    without = [name for name in groups if not any(row[0] == name for row in rows)]
    header = ["positive", "sensitivity on val", "threshold", "sensitivity [95 %]", "specificity [95 %]"]
    parts = [format_table(header, rows)] if rows else []
    parts += [f"There is no threshold for {name}: val has no such image." for name in without]
    return ["### Decision thresholds, chosen on val", *parts] if parts else []


def _format_referral(assessment: Assessment) -> str:
    accuracy = assessment.referral.accuracy
    kept = ", ".join(
        f"{accuracy[int(fraction * len(accuracy))]:.3f} at {fraction:.0%}" for fraction in (0, 0.1, 0.2, 0.5)
    )
    return f"### Referral\n\nSelective accuracy when the least confident images are referred: {kept}."


def _format_retest(retest: pd.DataFrame) -> list[str]:
    head = "### Test-retest: agreement between photos of one lesion"
    if retest.empty:
        return [f"{head}\n\nNo lesion has several photos here."]
    table = pd.DataFrame(
        {
            **retest[["dx", "lesions", "images"]],
            "mean over lesions": retest.metric.map(_RETEST),
            "same lesion [95 % interval]": _format_intervals(retest),
            "others of its class": retest.others,
        }
    )
    return [head, format_class_table(table), f"Metrics need {MIN_LESIONS} lesions with several photos."]


def _format_intervals(rows: pd.DataFrame) -> list[str]:
    return [format_score(row.value, (row.low, row.high)) for row in rows.itertuples()]


def _format_subgroups(subgroups: pd.DataFrame) -> list[str]:
    rows = subgroups[subgroups.metric.isin(["balanced_accuracy", "sensitivity"])]
    shown = rows[rows.value.notna()]
    table = pd.DataFrame(
        {
            "subgroup": shown["by"] + ": " + shown.subgroup,
            **shown[["images", "lesions", "classes"]],
            "chance": (1 / shown.classes).where(shown["by"] != "dx"),
            "balanced accuracy; of a dx, sensitivity": _format_intervals(shown),
        }
    )
    note = f"{len(rows) - len(shown)} subgroups have under {MIN_IMAGES} images or {MIN_LESIONS} lesions."
    return ["### Subgroups", *([format_class_table(table)] if len(shown) else []), note]
