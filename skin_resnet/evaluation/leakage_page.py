"""The leakage report as a page of Markdown."""

import pandas as pd

from skin_resnet.data.leakage import KINDS, LEAKING_KINDS, LeakageReport
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.formatting import format_table

_LISTED = 10  # pairs of a kind on the page; the file has all


def format_leakage(report: LeakageReport) -> str:
    """Write a leakage report as Markdown that also reads well on a terminal."""
    verdict = "the split leaks" if report.leaks else "clean" if report.knows_lesions else "no leak found"
    sizes = report.class_counts.sum()
    sections = [
        f"# Leakage report: {verdict}",
        f"{sizes.sum():,} images of {report.lesions:,} lesions: "
        + ", ".join(f"{sizes[name]:,} {name}" for name in SPLITS)
        + ".",
        "\n".join(f"- {remark}" for remark in _list_remarks(report)),
        "## Images shared between splits\n\n" + _format_shared(report),
        *_format_by_class(report),
        "## Classes\n\n" + _format_classes(report),
        *_list_pairs(report),
    ]
    return "\n\n".join(sections)


def _list_remarks(report: LeakageReport) -> list[str]:
    size = report.class_counts.test
    touched = report.count_touched(LEAKING_KINDS, seen=("train", "val"))
    remarks = ["No test image shares its lesion or its pixels with train or val."]
    if touched.any():
        melanoma = f" ({_share(touched['mel'], size['mel'])} of melanoma's)" if size.get("mel", 0) else ""
        remarks = [
            f"{_share(touched.sum(), size.sum())} of the test images{melanoma} "
            "share their lesion or their pixels with train or val."
        ]
    if not report.knows_lesions:
        remarks.append("The data does not name lesions: only pixels were compared.")
    if near := (report.pairs.kind == "near").sum():
        remarks.append(f"{_count(near, 'pair')} of images look alike and may show one lesion: check them.")
    if report.unused:
        remarks.append(f"{_count(report.unused, 'image')} of the data are in no split.")
    if report.unread:
        remarks.append(f"{_count(report.unread, 'image')} could not be read and were not audited.")
    return remarks


def _format_shared(report: LeakageReport) -> str:
    rows = []
    for kind, name in KINDS.items():
        row = [name, f"{(report.pairs.kind == kind).sum():,}"]
        for split, seen in (("test", "train"), ("test", "val"), ("val", "train")):
            touched = report.count_touched((kind,), split, (seen,)).sum()
            row.append(f"{touched:,} ({_share(touched, report.class_counts[split].sum())})")
        rows.append(row)
    return format_table(["shared", "pairs", "test & train", "test & val", "val & train"], rows)


def _format_by_class(report: LeakageReport) -> list[str]:
    size = report.class_counts.test
    touched = pd.DataFrame({kind: report.count_touched((kind,)) for kind in KINDS})
    if not touched.any(axis=None):
        return []
    rows = [["all", f"{size.sum():,}", *(_share(touched[kind].sum(), size.sum()) for kind in KINDS)]]
    for dx in size.index[size > 0]:
        rows.append([dx, f"{size[dx]:,}", *(_share(touched[kind][dx], size[dx]) for kind in KINDS)])
    table = format_table(["class", "test images", *KINDS.values()], rows)
    return [f"## Test images shared with train, by class\n\n{table}"]


def _format_classes(report: LeakageReport) -> str:
    counts = report.class_counts
    rows = [
        [str(dx), *(_share(counts[name][dx], counts[name].sum()) for name in SPLITS)] for dx in counts.index
    ]
    distances = ", ".join(f"{name} {distance:.3f}" for name, distance in report.class_distance.items())
    judgement = "differ significantly" if report.class_p < 0.01 else "do not differ significantly"
    return (
        format_table(["class", *SPLITS], rows)
        + f"\n\nDistance from train's shares (total variation, 0 to 1): {distances}. The splits {judgement} "
        f"(chi-square over lesions, p = {report.class_p:.2g})."
    )


def _list_pairs(report: LeakageReport) -> list[str]:
    sections = []
    for kind, name in KINDS.items():
        pairs = report.pairs[report.pairs.kind == kind]
        if pairs.empty:
            continue
        shown = pairs.head(_LISTED)
        rows = [
            [pair.image_id, pair.dx, pair.split, pair.seen_id, pair.seen_dx, pair.seen_split]
            + ([f"{pair.similarity:.3f}"] if kind == "near" else [])
            for pair in shown.itertuples()
        ]
        header = ["image", "dx", "split", "image", "dx", "split"] + ["similarity"] * (kind == "near")
        rest = f", the first {_LISTED} (the JSON file has all)" if len(pairs) > _LISTED else ""
        sections.append(f"## {_count(len(pairs), 'pair')}: {name}{rest}\n\n" + format_table(header, rows))
    return sections


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
