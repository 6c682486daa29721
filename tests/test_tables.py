from pathlib import Path

import pytest

from skin_resnet.data.tables import read_table, reject
from skin_resnet.errors import UserError

LINES = ("path,dx,age", "1.jpg,nv,80.0", "2.jpg, mel ,")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_spelling_gives_the_same_table(
    tmp_path: Path, delimiter: str, encoding: str, line_end: str
) -> None:
    file = tmp_path / "table"
    file.write_bytes(line_end.join(LINES).replace(",", delimiter).encode(encoding))

    table = read_table(file, required=("path", "dx"))

    assert list(table.columns) == ["path", "dx", "age"]
    assert table["dx"].tolist() == ["nv", "mel"]
    assert table["age"].fillna("unknown").tolist() == ["80.0", "unknown"]
    assert table.index.tolist() == [2, 3]


def test_quoted_cells_lose_their_quotes_and_keep_their_delimiters(tmp_path: Path) -> None:
    file = tmp_path / "table.tab"
    file.write_text('"path"\t"dx"\n"a\tb.jpg"\t"nv"\n')

    assert read_table(file, required=("path", "dx")).loc[2].tolist() == ["a\tb.jpg", "nv"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("path,dx,age\n1.jpg,nv,5\n2.jpg,mel", "3 columns, but fewer cells in line: 3"),
        ('path,dx\n1.jpg,nv\n"2.jpg"x,mel', "as CSV"),
        ("path,dx\n1.jpg,nv\n2.jpg, \n3.jpg,NaN", "dx in line: 3 (and 1 more)"),
        ("path,dx\n1.jpg,nv\n\n,mel", "path in line: 4"),
        ("path,dx,lesion_id\n1.jpg,nv,L1\n2.jpg,mel,", "lesion_id in line: 3"),
        ("path,dx,image_id\n1.jpg,nv,\n2.jpg,mel,B", "image_id in line: 2"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, content: str, named: str) -> None:
    file = tmp_path / "list.csv"
    file.write_bytes(content.encode("latin-1"))

    with pytest.raises(UserError) as error:
        read_table(file, required=("path", "dx"))

    assert "\n" not in str(error.value)
    assert all(text in str(error.value) for text in ("list.csv", named))


def test_a_rejection_names_the_first_offender_and_counts_the_others() -> None:
    with pytest.raises(UserError) as error:
        reject(["a\nb", "c"], "name with a line end", "rename it")

    assert str(error.value) == r"name with a line end: 'a\nb' (and 1 more); rename it."
