"""The leakage report as a page of Markdown."""

import pandas as pd

from skin_resnet.data.leakage import KINDS, LEAKING_KINDS, LeakageReport
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.formatting import format_table

_LISTED = 10  # pairs of a kind on the page; the JSON file has all


def format_leakage(report: LeakageReport) -> str:
    """Write a leakage report as Markdown that also reads well on a terminal."""
    verdict = "the split leaks" if report.leaks else "clean" if report.knows_lesions else "no leak found"
    sizes = report.class_counts.sum()
    counts = ", ".join(f"{sizes[name]:,} {name}" for name in SPLITS)
    return "\n\n".join(
        [
            f"# Leakage report: {verdict}",
            f"{sizes.sum():,} images of {report.lesions:,} lesions: {counts}.",
            "\n".join(f"- {remark}" for remark in _list_remarks(report)),
            f"## Images shared between splits\n\n{_format_shared(report)}",
            f"## Classes\n\n{_format_classes(report)}",
            *_list_pairs(report),
        ]
    )


def _list_remarks(report: LeakageReport) -> list[str]:
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
        "The data does not name lesions: only pixels were compared.": not report.knows_lesions,
        f"{near} of images look alike and may show one lesion: check them.": near[0] != "0",
        f"{_count(report.unused, 'image')} of the data in no split.": report.unused,
        f"{_count(report.unread, 'image')} could not be read and were not audited.": report.unread,
        f"The classes of the splits {differ} (chi-square over lesions, p = {report.class_p:.2g}); total "
        f"variation distance from train: {distances}.": True,
    }
    return [remark for remark, applies in remarks.items() if applies]


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
    counts = report.class_counts
    touched = pd.DataFrame({kind: report.count_touched((kind,)) for kind in KINDS})
    kinds = [kind for kind in KINDS if touched[kind].any()]
    rows = [
        [
            str(dx),
            *(_share(counts[name][dx], counts[name].sum()) for name in SPLITS),
            *(_share(touched[kind][dx], counts.test[dx]) for kind in kinds),
        ]
        for dx in counts.index
    ]
    return format_table(["class", *SPLITS, *(f"test & train: {KINDS[kind]}" for kind in kinds)], rows)


def _list_pairs(report: LeakageReport) -> list[str]:
    columns = ["image_id", "dx", "split", "seen_id", "seen_dx", "seen_split", "similarity"]
    sections = []
    for kind, name in KINDS.items():
        pairs = report.pairs[report.pairs.kind == kind]
        if pairs.empty:
            continue
        shown = pairs.head(_LISTED)[columns].round(3).astype(object).fillna("").astype(str)
        rest = f", the first {_LISTED} (the JSON file has all)" if len(pairs) > _LISTED else ""
        header = ["image", "dx", "split", "image", "dx", "split", "similarity"]
        table = format_table(header, shown.to_numpy().tolist())
        sections.append(f"## {_count(len(pairs), 'pair')}: {name}{rest}\n\n{table}")
    return sections


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
