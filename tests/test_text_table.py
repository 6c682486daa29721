from pathlib import Path

import pytest

from skin_resnet.data.text_table import read_text_table, refuse_any
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

    table = read_text_table(file, required=("path", "dx"))

    assert list(table.columns) == ["path", "dx", "age"]
    assert table["dx"].tolist() == ["nv", "mel"]
    assert table["age"].fillna("nobody knows").tolist() == ["80.0", "nobody knows"]
    assert table.index.tolist() == [2, 3]


def test_quoted_cells_lose_their_quotes_and_keep_their_delimiters(tmp_path: Path) -> None:
    file = tmp_path / "table.tab"
    file.write_text('"path"\t"dx"\n"a\tb.jpg"\t"nv"\n')

    assert read_text_table(file, required=("path", "dx")).loc[2].tolist() == ["a\tb.jpg", "nv"]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], ["a header and rows", "has none"]),
        ([",,"], ["a header and rows"]),
        (["path,dx"], ["a header and rows", "has none"]),
        (["file,dx", "1.jpg,nv"], ["columns path, dx", "file, dx", "'path'"]),
        (["path,dx,dx", "1.jpg,nv,mel"], ["every column once", "'dx'"]),
        (["path,dx", "1.jpg,nv", "2.jpg,mel,x"], ["2 cells", "line 3"]),
        (["path,dx", "1.jpg,nv", '"2.jpg"x,mel'], ["readable as CSV", "line 3"]),
        (["path,dx", "1.jpg,nv", "2.jpg, ", "3.jpg,NaN"], ["dx must be filled", "line 3 (2 in all)"]),
        (["path,dx", "1.jpg,nv", "", ",mel"], ["path must be filled", "line 4"]),
        (["path,dx,lesion_id", "1.jpg,nv,L1", "2.jpg,mel,"], ["lesion_id must be filled", "line 3"]),
        (["path,dx,image_id", "1.jpg,nv,", "2.jpg,mel,B"], ["image_id must be filled", "line 2"]),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, lines: list[str], told: list[str]) -> None:
    file = tmp_path / "list.csv"
    file.write_text("\n".join(lines))

    with pytest.raises(UserError) as refusal:
        read_text_table(file, required=("path", "dx"))

    assert "\n" not in str(refusal.value)
    assert all(text in str(refusal.value) for text in ["list.csv", *told])


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04\xff\xfe")

    with pytest.raises(UserError, match="must be text in UTF-8"):
        read_text_table(tmp_path / "archive.zip", required=())


def test_a_refusal_tells_the_first_offender_on_one_line_and_how_many_there_are() -> None:
    with pytest.raises(UserError) as refusal:
        refuse_any(["a\nb", "c"], rule="Names must be short", problem="there is", remedy="cut it")

    assert str(refusal.value) == r"Names must be short, but there is 'a\nb' (2 in all); cut it."
