"""The leak passport as a page."""

import pandas as pd

from skin_resnet.data.leakage import KINDS, LEAKING_KINDS, LeakageReport
from skin_resnet.data.split import SPLITS
from skin_resnet.evaluation.formatting import format_table

_LISTED = 10  # pairs of a kind on the page; the file has all


def format_passport(passport: LeakageReport) -> str:
    """Write a passport as Markdown that also reads well on a terminal."""
    verdict = "it leaks" if passport.leaks else "clean" if passport.knows_lesions else "no leak found"
    sizes = passport.class_counts.sum()
    sections = [
        f"# Leak passport: {verdict}",
        f"{sizes.sum():,} images of {passport.lesions:,} lesions: "
        + ", ".join(f"{sizes[name]:,} {name}" for name in SPLITS)
        + ".",
        "\n".join(f"- {remark}" for remark in _remark(passport)),
        "## What splits share, in images\n\n" + _format_shared(passport),
        *_format_price(passport),
        "## Classes\n\n" + _format_classes(passport),
        *_list_pairs(passport),
    ]
    return "\n\n".join(sections)


def _remark(passport: LeakageReport) -> list[str]:
    size = passport.class_counts.test
    touched = passport.count_touched(LEAKING_KINDS, seen=("train", "val"))
    remarks = ["No test image shows what train or val show too."]
    if touched.any():
        melanoma = f" ({_share(touched['mel'], size['mel'])} of melanoma's)" if size.get("mel", 0) else ""
        remarks = [
            f"{_share(touched.sum(), size.sum())} of the test images{melanoma} "
            "show what train or val show too."
        ]
    if not passport.knows_lesions:
        remarks.append("The source does not tell which images show one lesion: only pixels were compared.")
    if near := (passport.pairs.kind == "near").sum():
        remarks.append(f"{_count(near, 'pair')} of pictures look alike and may be one lesion: look at them.")
    if passport.unused:
        remarks.append(f"{_count(passport.unused, 'image')} of the data in no split.")
    if passport.unread:
        remarks.append(f"{_count(passport.unread, 'image')} could not be read, nor audited.")
    return remarks


def _format_shared(passport: LeakageReport) -> str:
    rows = []
    for kind, name in KINDS.items():
        row = [name, f"{(passport.pairs.kind == kind).sum():,}"]
        for split, seen in (("test", "train"), ("test", "val"), ("val", "train")):
            touched = passport.count_touched((kind,), split, (seen,)).sum()
            row.append(f"{touched:,} ({_share(touched, passport.class_counts[split].sum())})")
        rows.append(row)
    return format_table(["shared", "pairs", "test & train", "test & val", "val & train"], rows)


def _format_price(passport: LeakageReport) -> list[str]:
    size = passport.class_counts.test
    touched = pd.DataFrame({kind: passport.count_touched((kind,)) for kind in KINDS})
    if not touched.any(axis=None):
        return []
    rows = [["all", f"{size.sum():,}", *(_share(touched[kind].sum(), size.sum()) for kind in KINDS)]]
    for dx in size.index[size > 0]:
        rows.append([dx, f"{size[dx]:,}", *(_share(touched[kind][dx], size[dx]) for kind in KINDS)])
    table = format_table(["class", "test images", *KINDS.values()], rows)
    return [f"## The price: test images that share it with train\n\n{table}"]


def _format_classes(passport: LeakageReport) -> str:
    counts = passport.class_counts
    rows = [
        [str(dx), *(_share(counts[name][dx], counts[name].sum()) for name in SPLITS)] for dx in counts.index
    ]
    distances = ", ".join(f"{name} {distance:.3f}" for name, distance in passport.class_distance.items())
    judgement = "are unequal beyond chance" if passport.class_p < 0.01 else "differ no more than by chance"
    return (
        format_table(["class", *SPLITS], rows)
        + f"\n\nDistance from train's shares (total variation, 0 to 1): {distances}. The splits {judgement} "
        f"(chi-square over lesions, p = {passport.class_p:.2g})."
    )


def _list_pairs(passport: LeakageReport) -> list[str]:
    sections = []
    for kind, name in KINDS.items():
        pairs = passport.pairs[passport.pairs.kind == kind]
        if pairs.empty:
            continue
        shown = pairs.head(_LISTED)
        rows = [
            [pair.image_id, pair.dx, pair.split, pair.seen_id, pair.seen_dx, pair.seen_split]
            + ([f"{pair.similarity:.3f}"] if kind == "near" else [])
            for pair in shown.itertuples()
        ]
        header = ["image", "dx", "split", "image", "dx", "split"] + ["similarity"] * (kind == "near")
        rest = f", the first {_LISTED} (passport=FILE has all)" if len(pairs) > _LISTED else ""
        sections.append(f"## {_count(len(pairs), 'pair')}: {name}{rest}\n\n" + format_table(header, rows))
    return sections


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
