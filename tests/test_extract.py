import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from skin_resnet.data.extract import extract
from skin_resnet.errors import UserError
from skin_resnet.labels import HAM10000_CLASSES


def write_list(folder: Path, *lines: str) -> str:
    """Write a CSV source beside images 1.jpg to 3.jpg; extract never opens one, so they are empty."""
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        (folder / name).touch()
    (folder / "list.csv").write_text("\n".join(lines), encoding="utf-8")
    return str(folder / "list.csv")


def test_a_source_becomes_the_table_sorted_by_image_id(tmp_path: Path) -> None:
    source = write_list(
        tmp_path,
        "dx,path,image_id,lesion_id,age,sex,localization,dx_type",
        "nv,3.jpg,C,L2,80.0,Male,back,histo",
        "mel,1.jpg,A,L1,,,NaN,histo",
        "mel,2.jpg,B,L1,5,female,left hand,histo",
    )

    table = extract(source, tmp_path)

    columns = ["image_id", "lesion_id", "dx", "target", "path", "age", "sex", "localization"]
    assert list(table.columns) == columns
    assert table.index.equals(pd.RangeIndex(3))
    assert table["image_id"].tolist() == ["A", "B", "C"]
    assert table["lesion_id"].tolist() == ["L1", "L1", "L2"]
    assert table["dx"].tolist() == ["mel", "mel", "nv"]
    assert table["path"].tolist() == [str(tmp_path / name) for name in ("1.jpg", "2.jpg", "3.jpg")]
    np.testing.assert_array_equal(table["age"], [np.nan, 5, 80])
    assert table["sex"].tolist() == ["unknown", "female", "male"]
    assert table["localization"].tolist() == ["unknown", "left hand", "back"]


def test_what_a_source_does_not_contain_is_unknown_and_each_image_its_own_lesion(tmp_path: Path) -> None:
    table = extract(write_list(tmp_path, "path,dx", "1.jpg,nv", "2.jpg,mel"), tmp_path)

    assert table["lesion_id"].tolist() == table["image_id"].tolist() == ["1", "2"]
    assert table["age"].isna().all()
    assert set(table["sex"]) == set(table["localization"]) == {"unknown"}


@pytest.mark.parametrize(
    ("codes", "class_names"),
    [
        (("nv", "mel"), HAM10000_CLASSES),  # a model of HAM10000 keeps its seven outputs
        (("wart", "mole"), ("mole", "wart")),
    ],
)
def test_the_class_order_travels_in_the_table(
    tmp_path: Path, codes: tuple[str, str], class_names: tuple[str, ...]
) -> None:
    table = extract(write_list(tmp_path, "path,dx", f"1.jpg,{codes[0]}", f"2.jpg,{codes[1]}"), tmp_path)

    assert tuple(table["dx"].cat.categories) == class_names
    assert table["target"].dtype == np.int64
    assert [class_names[target] for target in table["target"]] == table["dx"].tolist() == list(codes)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nv").mkdir(mode=0)

    with pytest.raises(UserError, match="Permission denied"):
        extract(str(tmp_path), tmp_path)


def test_the_demo_is_read_with_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    table = extract("demo", Path("cache"))

    assert set(table["dx"]) == set(HAM10000_CLASSES)
    assert table["lesion_id"].nunique() < len(table)
    assert all(os.path.isabs(path) and os.path.isfile(path) for path in table["path"])


@pytest.mark.skipif("SKIN_RESNET_DATA" not in os.environ, reason="SKIN_RESNET_DATA names no HAM10000 folder")
def test_ham10000_has_its_published_counts(tmp_path: Path) -> None:
    table = extract(os.environ["SKIN_RESNET_DATA"], tmp_path)

    # Source: Tschandl, Rosendahl, Kittler, Scientific Data 5:180161 (2018).
    counts = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
    assert table["dx"].value_counts().to_dict() == counts
    assert table["lesion_id"].nunique() == 7470
