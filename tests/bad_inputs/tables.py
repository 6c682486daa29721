"""Metadata and splits."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.bad_inputs import BadInput, Options

Row = dict[str, str]
COLUMNS = ("image_id", "path", "dx", "lesion_id", "age", "sex")
SIZE = 32


def draw(number: int) -> Image.Image:
    """A small image, unlike all others."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


def write_images(folder: Path) -> list[Row]:
    """Twelve images, each of a lesion of its own, four of each class."""
    rows = []
    for number in range(12):
        name = f"photo_{number:02}"
        draw(number).save(folder / f"{name}.png")
        dx = ("mole", "scar", "wart")[number % 3]
        cells = (name, f"{name}.png", dx, f"lesion_{number:02}", "50", "male")
        rows.append(dict(zip(COLUMNS, cells, strict=True)))
    return rows


def format_table(rows: list[Row], delimiter: str = ",") -> str:
    lines = [delimiter.join(rows[0]), *(delimiter.join(row.values()) for row in rows)]
    return "\n".join(lines) + "\n"


def write_data(folder: Path) -> Options:
    """A data set with nothing wrong."""
    (folder / "list.csv").write_text(format_table(write_images(folder)))
    return {"data": str(folder / "list.csv")}


def with_cells(**cells: str) -> Callable[[Path], Options]:
    """Change cells of the last row."""

    def make(folder: Path) -> Options:
        rows = write_images(folder)
        rows[-1].update(cells)
        (folder / "list.csv").write_text(format_table(rows))
        return {"data": str(folder / "list.csv")}

    return make


def with_text(change: Callable[[str], str], encoding: str = "utf-8") -> Callable[[Path], Options]:
    """Change the table's text."""

    def make(folder: Path) -> Options:
        text = change(format_table(write_images(folder)))
        (folder / "list.csv").write_bytes(text.encode(encoding))
        return {"data": str(folder / "list.csv")}

    return make


def with_split(change: Callable[[list[str]], list[str]], **cells: str) -> Callable[[Path], Options]:
    """Write a split by file, with its lines changed; and cells of the data's last row."""

    def make(folder: Path) -> Options:
        options = with_cells(**cells)(folder)
        sides = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
        lines = ["image_id,split", *(f"photo_{number:02},{side}" for number, side in enumerate(sides))]
        (folder / "split.csv").write_text("\n".join(change(lines)))
        return {**options, "split": str(folder / "split.csv")}

    return make


def with_files(contents: dict[str, str]) -> Callable[[Path], Options]:
    """Write files by path, and give their folder as data; an image may be empty where nothing opens it."""

    def make(folder: Path) -> Options:
        for name, content in contents.items():
            file = folder / "data" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        return {"data": str(folder / "data")}

    return make


def without_column(name: str) -> Callable[[Path], Options]:
    def make(folder: Path) -> Options:
        rows = [{key: cell for key, cell in row.items() if key != name} for row in write_images(folder)]
        (folder / "list.csv").write_text(format_table(rows))
        return {"data": str(folder / "list.csv")}

    return make


def with_same_pixels(folder: Path) -> Options:
    options = with_split(lambda lines: lines)(folder)
    draw(0).save(folder / "photo_11.png")
    return options


def with_pipe_as_split(folder: Path) -> Options:
    """A pipe that nobody writes to: whoever reads it waits."""
    os.mkfifo(folder / "pipe")
    return {**write_data(folder), "split": str(folder / "pipe")}


_HAM = "HAM10000_metadata.csv"
_PART = "HAM10000_images_part_1"
_ISIC = "ISIC2018_Task3_Training"
_HAM_HEADER = "lesion_id,image_id,dx\n"
_ISIC_HEADER = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC\n"


def with_ham10000(row: str, *images: str) -> Callable[[Path], Options]:
    return with_files({_HAM: _HAM_HEADER + row, **{f"{_PART}/{name}": "" for name in images}})


METADATA = [
    BadInput(name=name, make=make, told=told, command="audit")
    for name, make, told in [
        ("no path column", without_column("path"), ("lacks: 'path'",)),
        ("no dx column", without_column("dx"), ("lacks: 'dx'",)),
        ("doubled column", with_text(lambda t: t.replace("sex", "age", 1)), ("twice: 'age'",)),
        ("empty file", with_text(lambda _: ""), ("no rows", "list.csv")),
        ("blank lines only", with_text(lambda _: "\n \n,,\n"), ("as CSV", "list.csv")),
        ("header only", with_text(lambda t: t.partition("\n")[0]), ("no rows", "list.csv")),
        ("UTF-16", with_text(str, "utf-16"), ("UTF-8", "list.csv")),
        ("no text", with_text(lambda _: "PK\3\4\xff", "latin-1"), ("UTF-8", "list.csv")),
        (
            "null character",
            with_text(lambda t: t.replace("scar", "sc\0r", 1)),
            ("null character in line: 3",),
        ),
        ("a cell too many", with_text(lambda t: t.replace("male", "male,x", 1)), ("line 2",)),
        ("a cell too few", with_text(lambda t: t.replace(",male", "", 1)), ("line: 2",)),
        ("quote left open", with_text(lambda t: t.replace("wart", '"wart', 1)), ("as CSV", "list.csv")),
        (
            "bars between cells",
            with_text(lambda t: t.replace(",", "|")),
            ("lacks: 'path'", "image_id|path"),
        ),
        ("two dx empty", with_text(lambda t: t.replace("wart", "")), ("dx in line: 4 (and 3 more)",)),
        (
            "dx empty after a blank line",
            with_text(lambda t: t.replace("\n", "\n\n", 1).replace("mole", " ", 1)),
            ("dx in line: 3",),
        ),
        ("dx NaN", with_cells(dx="NaN"), ("dx in line: 13",)),
        ("lesion_id NaN", with_cells(lesion_id="nan"), ("lesion_id in line: 13",)),
        ("image_id empty", with_cells(image_id=""), ("image_id in line: 13",)),
        ("image_id twice", with_cells(image_id="photo_00"), ("twice: 'photo_00'",)),
        ("path twice", with_cells(path="./photo_00.png"), ("same path", "photo_00.png")),
        ("no such image", with_cells(path="gone.png"), ("not a file", "gone.png")),
        ("lesion of two dx", with_cells(lesion_id="lesion_00"), ("different dx", "'lesion_00'")),
        (
            "one class",
            with_text(lambda t: t.replace("scar", "mole").replace("wart", "mole")),
            ("one class", "'mole'"),
        ),
        ("Wart and wart", with_cells(dx="Wart"), ("case", "'Wart'")),
        ("class of dots", with_cells(dx=".."), ("dx", "'..'")),
        ("class called as a column", with_cells(dx="prediction"), ("dx", "'prediction'")),
        ("age in words", with_cells(age="old"), ("age is not a number", "'old'")),
        ("age below 0", with_cells(age="-1"), ("age is not a number", "'-1'")),
        ("age 999", with_cells(age="999"), ("age is not a number", "'999'")),
        ("age infinite", with_cells(age="inf"), ("age is not a number", "'inf'")),
        ("no such source", lambda folder: {"data": f"{folder}/gone"}, ("existing path", "gone")),
        (
            "image as source",
            lambda folder: {"data": write_data(folder)["data"].replace("list.csv", "photo_00.png")},
            ("UTF-8", "photo_00.png"),
        ),
        ("empty folder", lambda folder: {"data": str(folder)}, ("known layouts",)),
        (
            "class folder without images",
            with_files({"a/1.png": "", "b/notes.txt": ""}),
            ("no images", "'b'"),
        ),
        (
            "two lesions",
            with_text(lambda t: "\n".join(t.splitlines()[:3])),
            ("would be empty", "2 lesions"),
        ),
        ("unknown dx in HAM10000", with_ham10000("L1,I1,scc", "I1.jpg"), ("akiec", "'scc'")),
        ("HAM10000 without an image", with_ham10000("L1,I1,mel"), ("lacks the file", "'I1'")),
        (
            "HAM10000 without a row",
            with_ham10000("L1,I1,mel", "I1.jpg", "I2.jpg"),
            ("no row", "I2.jpg"),
        ),
        (
            "HAM10000 without metadata",
            with_files({f"{_PART}/I1.jpg": ""}),
            ("without HAM10000_metadata.csv", _PART),
        ),
        (
            "two metadata files",
            with_files({_HAM: "", "HAM10000_metadata.tab": ""}),
            ("second metadata file", ".tab"),
        ),
        (
            "two 1s in an ISIC row",
            with_files(
                {f"{_ISIC}_GroundTruth.csv": _ISIC_HEADER + "I1,1,1,0,0,0,0,0", f"{_ISIC}_Input/I1.jpg": ""}
            ),
            ("single 1", "'I1'"),
        ),
    ]
]

SPLITS = [
    BadInput(name=name, make=make, told=told)
    for name, make, told in [
        (
            "no such split",
            lambda folder: {**write_data(folder), "split": f"{folder}/gone.csv"},
            ("split", "existing path", "gone.csv"),
        ),
        (
            "unknown id in split",
            with_split(lambda lines: [*lines, "other,train"]),
            ("not in the data: 'other'",),
        ),
        (
            "image on two sides",
            with_split(lambda lines: [*lines, "photo_00,test"]),
            ("split.csv", "twice: 'photo_00'"),
        ),
        (
            "lesion on two sides",
            with_split(lambda lines: lines, lesion_id="lesion_02"),
            ("leaks", "photo_02", "photo_11"),
        ),
        ("pixels on two sides", with_same_pixels, ("leaks", "photo_00", "photo_11")),
        (
            "unknown side",
            with_split(lambda lines: [*lines[:-1], "photo_11,holdout"]),
            ("train, val, test: 'holdout'",),
        ),
        ("nothing in test", with_split(lambda lines: lines[:-3]), ("no image in: 'test'",)),
        (
            "one training image",
            with_split(lambda lines: [line for line in lines if "train" not in line] + ["photo_00,train"]),
            ("train needs 2", "has 1"),
        ),
        (
            "nothing in val",
            with_split(lambda lines: [line for line in lines if "val" not in line]),
            ("val needs 1",),
        ),
        (
            "split without its column",
            with_split(lambda lines: ["image_id,fold", *lines[1:]]),
            ("lacks: 'split'",),
        ),
        (
            "side left empty",
            with_split(lambda lines: [*lines[:-1], "photo_11,"]),
            ("split in line: 13",),
        ),
        ("pipe as split", with_pipe_as_split, ("not a regular file", "pipe")),
        ("empty split", with_split(lambda _: []), ("no rows", "split.csv")),
    ]
]

# What a table may look like, too: each must give what the plain one gives.
SPELLINGS = {
    "byte order mark": with_text(str, "utf-8-sig"),
    "semicolons": with_text(lambda text: text.replace(",", ";")),
    "tabs": with_text(lambda text: text.replace(",", "\t")),
    "Windows line ends": with_text(lambda text: text.replace("\n", "\r\n")),
    "quoted cells": with_text(lambda text: text.replace("mole", '"mole"')),
    "spaces around cells": with_text(lambda text: text.replace(",", " , ")),
    "blank lines": with_text(lambda text: text.replace("\n", "\n\n")),
    "one more column": with_text(lambda text: text.replace("male", "male,x").replace("sex", "sex,notes")),
    "columns in another order": with_text(
        lambda text: "\n".join(",".join(reversed(line.split(","))) for line in text.splitlines())
    ),
}
