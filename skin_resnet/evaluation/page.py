"""Pages in Markdown: evaluations, leakage reports and their tables, for MLflow and for the terminal."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from rich.console import Console
from rich.markdown import Markdown

from skin_resnet.data.leakage import KINDS, LEAKING_KINDS, LeakageReport
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import HEADLINES, PLAIN
from skin_resnet.evaluation.operating import find_positives
from skin_resnet.evaluation.subgroups import MIN_IMAGES, MIN_LESIONS

# At the top of every report of a training whose split shares lesions.
LEAK_BANNER = (
    "**The split of this training leaks: train, val or test share lesions or images, so its metrics may be "
    "too high.**"
)
_ACRONYMS = {"auc", "ppv", "npv", "f1", "ap"}
_MISSING = "–"  # noqa: RUF001 (an en dash marks an empty cell)
# So that the table of the classes fits a terminal of 80 columns.
_SHORT = {"sensitivity": "sens.", "specificity": "spec.", "coverage": "cover."}
_LISTED = 10  # pairs of a kind on the page; the JSON file has all


def print_markdown(text: str) -> None:
    """Print Markdown as plain text, its tables fitted to the terminal's width, or to 80 columns elsewhere."""
    console = Console(highlight=False)
    for number, part in enumerate(text.split("```")):
        if number % 2:  # a command, to be pasted: rich would give it margins and trailing spaces
            console.out(part.partition("\n")[2])
        else:
            console.print(Markdown(part))


def spell_metric(name: str) -> str:
    """Write a metric's name in words: `balanced accuracy`, `macro AUC`."""
    return " ".join(word.upper() if word in _ACRONYMS else word for word in name.split("_"))


def format_score(value: float, interval: tuple[float, float] | None = None) -> str:
    """Write a score as `0.613`, or with its interval as `0.613 [0.52, 0.70]`; an en dash if it is NaN.

    An interval that is NaN, or of a constant, is left out.
    """
    if np.isnan(value):
        return _MISSING
    low, high = interval or (value, value)
    return f"{value:.3f}" + (f" [{low:.2f}, {high:.2f}]" if low < high else "")


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a markdown table: the first column to the left, the others to the right."""
    widths = [max(3, *map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    template = f"| {{:<{widths[0]}}} | " + " | ".join(f"{{:>{width}}}" for width in widths[1:]) + " |"
    return "\n".join(template.format(*row) for row in (header, rule, *rows))


def format_frame(frame: pd.DataFrame) -> str:
    """Write a data frame as a markdown table."""
    rows = [
        [format_score(cell) if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        for row in frame.itertuples(index=False)
    ]
    return format_table([spell_metric(str(name)) for name in frame.columns], rows)


def format_assessment(assessment: Assessment, split: str, notes: Sequence[str] = ()) -> str:
    """Write the evaluation of a split as Markdown; notes are paragraphs to begin with."""
    more = [*_format_referral(assessment), *_format_retest(assessment.retest)]
    return "\n\n".join([*filter(None, notes), format_results(assessment, split), *more])


def format_results(assessment: Assessment, split: str) -> str:
    """Write scores, classes, calibration, thresholds and subgroups of a split, as a model card has them."""
    parts = [
        *_format_headlines(assessment, split),
        format_frame(assessment.per_class.rename(columns=_SHORT)),
        _format_calibration(assessment),
        *_format_thresholds(assessment),
        *_format_subgroups(assessment.subgroups),
    ]
    return "\n\n".join(parts)


def _format_metric(assessment: Assessment, name: str) -> str:
    row = assessment.get(name)
    return format_score(row.value, (row.low, row.high))


def _judge(assessment: Assessment) -> str:
    names = " and ".join(map(spell_metric, assessment.find_not_better()))
    return f"**Not better than always {assessment.baseline_class}: {names}.**" if names else ""


def format_summary(assessment: Assessment, split: str) -> str:
    """Write the headline metrics beside those of the majority class, in one paragraph."""
    # No parenthesis after an interval: in Markdown that is a link.
    scores = ", ".join(f"{spell_metric(name)} {_format_metric(assessment, name)}" for name in HEADLINES)
    baseline = ", ".join(format_score(assessment.get(f"baseline_{name}").value) for name in HEADLINES)
    text = f"{split.capitalize()} {scores}; always {assessment.baseline_class}: {baseline}."
    if assessment.calibration["tau"] > 0:
        balanced, accuracy = (format_score(assessment.get(name).value) for name in PLAIN)
        text += f" Plain decision: balanced accuracy {balanced}, accuracy {accuracy}."
    return f"{_judge(assessment)} {text}".lstrip()


def _format_headlines(assessment: Assessment, split: str) -> Iterator[str]:
    rows = []
    for name in ("balanced_accuracy", "accuracy"):
        cells = [_format_metric(assessment, f"{kind}{name}") for kind in ("", "plain_", "baseline_")]
        rows.append([spell_metric(name), *cells])
    for name in ("macro_auc", "loss"):
        rows.append([spell_metric(name), _format_metric(assessment, name), "", ""])
    shown = f"{assessment.get('images').value:.0f} images"
    note = "The data has no lesion ids: intervals are by image, too narrow where photos share a lesion."
    if assessment.knows_lesions:
        shown += f" of {assessment.get('lesions').value:.0f} lesions"
        note = "Intervals are by bootstrap over lesions."
    yield f"### {split.capitalize()}: {shown}"
    always = f"always {assessment.baseline_class}"
    yield format_table(["", "model [95 % interval]", "plain decision", always], rows)
    if verdict := _judge(assessment):
        yield verdict
    yield (
        f"{note} The model predicts argmax p / prior^τ, with τ = {assessment.calibration['tau']:.2f} fitted "
        "on val for balanced accuracy; the plain decision is the most probable class. Loss is in nats, after "
        "temperature scaling."
    )


def _format_calibration(assessment: Assessment) -> str:
    fitted, names = assessment.calibration, ("ece_before_temperature", "ece", "brier", "set_size")
    before, after, brier, size = (assessment.get(name).value for name in names)
    return (
        f"### Calibration\n\nExpected calibration error (ECE) {before:.3f} before and {after:.3f} after "
        f"temperature scaling (T = {fitted['temperature']:.2f}, fitted on val); Brier score {brier:.3f}; "
        f"conformal sets for {fitted['coverage']:.0%} coverage: empirical coverage "
        f"{_format_metric(assessment, 'coverage')}, {size:.1f} classes on average."
    )


def _format_thresholds(assessment: Assessment) -> Iterator[str]:
    thresholds, groups = assessment.calibration["thresholds"], find_positives(assessment.classes)
    if groups:
        yield "### Decision thresholds, chosen on val for a sensitivity"
    rows = []
    for name, threshold in thresholds.items():
        scores = [_format_metric(assessment, f"{name}_{kind}") for kind in ("sensitivity", "specificity")]
        rows.append([*name.split("_at_"), f"{threshold:.4f}", *scores])
    if rows:
        header = ["positive", "on val", "threshold", "sensitivity [95 %]", "specificity [95 %]"]
        yield format_table(header, rows)
    for group in groups:
        if not any(name.startswith(group) for name in thresholds):
            yield f"There is no threshold for {group}: val has no such image."


def _format_referral(assessment: Assessment) -> Iterator[str]:
    accuracy = assessment.referral.accuracy
    kept = ", ".join(f"{accuracy[int(f * len(accuracy))]:.3f} at {f:.0%}" for f in (0, 0.1, 0.2, 0.5))
    yield f"### Referral\n\nSelective accuracy when the least confident images are referred: {kept}."
    if "unfamiliar" in set(assessment.table.name):
        yield f"Images unlike the training images: {_format_metric(assessment, 'unfamiliar')} of all."


def _format_retest(retest: pd.DataFrame) -> Iterator[str]:
    known = retest[retest.value.notna()]
    if known.empty:
        return
    pairs, unanimous = (known[known.metric == name] for name in ("agreement", "unanimous"))
    columns = {
        **pairs[["dx", "lesions"]],
        "photos": pairs.images,
        "pairs agree [95 %]": _format_intervals(pairs),
        "of other lesions": pairs.others,
        "all agree [95 %]": _format_intervals(unanimous),
    }
    yield "### Test-retest: agreement between photos of one lesion"
    yield format_frame(pd.DataFrame(columns))
    yield f"Of classes with {MIN_LESIONS} such lesions: pairs predicted alike; lesions with all photos alike."


def _format_intervals(rows: pd.DataFrame) -> list[str]:
    return [format_score(row.value, (row.low, row.high)) for row in rows.itertuples()]


def _format_subgroups(subgroups: pd.DataFrame) -> Iterator[str]:
    rows = subgroups[subgroups.metric.isin(["balanced_accuracy", "sensitivity"])]
    shown = rows[rows.value.notna()]
    yield "### Subgroups"
    if len(shown):
        columns = {
            "subgroup": shown["by"] + ": " + shown.subgroup,
            **shown[["images", "lesions", "classes"]],
            "chance": (1 / shown.classes).where(shown["by"] != "dx"),
            "balanced accuracy; of a dx, sensitivity": _format_intervals(shown),
        }
        yield format_frame(pd.DataFrame(columns))
    if hidden := len(rows) - len(shown):
        limits = f"fewer than {MIN_IMAGES} images or {MIN_LESIONS} lesions, or one class only"
        yield f"Not shown: {_count(hidden, 'subgroup')} with {limits}."


def format_leakage(report: LeakageReport) -> str:
    """Write a leakage report as Markdown."""
    verdict = "the split leaks" if report.leaks else "clean" if report.knows_lesions else "no leak found"
    sizes = report.class_counts.sum()
    counts = ", ".join(f"{sizes[name]:,} {name}" for name in SPLITS)
    parts = [
        f"# Leakage report: {verdict}",
        f"{sizes.sum():,} images of {report.lesions:,} lesions: {counts}.",
        format_remarks(report),
        f"## Images shared between splits\n\n{_format_shared(report)}",
        f"## Classes\n\n{_format_classes(report)}",
        *_list_pairs(report),
    ]
    return "\n\n".join(parts)


def format_remarks(report: LeakageReport) -> str:
    """Write what a leakage report found as a list, a sentence each."""
    size = report.class_counts.test
    touched = report.count_touched(LEAKING_KINDS, seen=("train", "val"))
    melanoma = f" ({_share(touched['mel'], size['mel'])} of melanoma's)" if size.get("mel", 0) else ""
    near = _count((report.pairs.kind == "near").sum(), "pair")
    distances = ", ".join(f"{name} {distance:.3f}" for name, distance in report.class_distance.items())
    differ = "differ significantly" if report.class_p < 0.01 else "do not differ significantly"
    remarks = {
        f"{_share(touched.sum(), size.sum())} of the test images{melanoma} share their lesion or pixels "
        "with train or val.": touched.any(),
        "No test image shares its lesion or pixels with train or val.": not touched.any(),
        "The data has no lesion ids: only pixels were compared.": not report.knows_lesions,
        f"{near} of images look alike and may show one lesion: check them.": near[0] != "0",
        f"{_count(report.unused, 'image')} of the data in no split.": report.unused,
        f"{_count(report.unread, 'image')} could not be read and were not audited.": report.unread,
        f"The classes of the splits {differ} (chi-square over lesions, p = {report.class_p:.2g}); total "
        f"variation distance from train: {distances}.": True,
    }
    return "\n".join(f"- {remark}" for remark, applies in remarks.items() if applies)


def _format_shared(report: LeakageReport) -> str:
    rows = []
    for kind, name in KINDS.items():
        row = [name, f"{(report.pairs.kind == kind).sum():,}"]
        for split, seen in (("test", "train"), ("test", "val"), ("val", "train")):
            touched = report.count_touched((kind,), split, (seen,)).sum()
            row.append(f"{touched:,} ({_share(touched, report.class_counts[split].sum())})")
        rows.append(row)
    return format_table(["shared", "pairs", "test & train", "test & val", "val & train"], rows)


def _format_classes(report: LeakageReport) -> str:
    """Write each class's share of each split, and what share of its test images is shared with train."""
    counts, columns = report.class_counts, {}
    for name in SPLITS:
        columns[name] = [_share(count, counts[name].sum()) for count in counts[name]]
    for kind, name in KINDS.items():
        touched = report.count_touched((kind,))
        if touched.any():
            columns[f"test & train: {name}"] = [*map(_share, touched, counts.test)]
    return format_frame(pd.DataFrame({"class": counts.index, **columns}))


def _list_pairs(report: LeakageReport) -> Iterator[str]:
    columns = ["image_id", "dx", "split", "seen_id", "seen_dx", "seen_split", "similarity"]
    header = ["image", "dx", "split", "image", "dx", "split", "similarity"]
    for kind, pairs in report.pairs.groupby("kind", observed=True):
        shown = pairs.head(_LISTED)[columns].round(3).astype(object).fillna("").astype(str)
        rest = f", the first {_LISTED} (the JSON file has all)" if len(pairs) > _LISTED else ""
        table = format_table(header, shown.to_numpy().tolist())
        yield f"## {_count(len(pairs), 'pair')}: {KINDS[kind]}{rest}\n\n{table}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
