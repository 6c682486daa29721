import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from skin_resnet.data.sources import read_source
from skin_resnet.errors import UserError

HEADER = "lesion_id,image_id,dx,dx_type,age,sex,localization"
ROWS = (
    "HAM_1,ISIC_1,nv,follow_up,,,",
    "HAM_1,ISIC_2,nv,follow_up,5,female,face",
    "HAM_2,ISIC_3,mel,histo,80.0,male,back",
)
PARTS = (
    "HAM10000_images_part_1/ISIC_1.jpg",
    "HAM10000_images_part_1/ISIC_2.jpg",
    "HAM10000_images_part_2/ISIC_3.jpg",
)
ISIC_HEADER = "image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"
ISIC_ROWS = ("ISIC_1,0,0,0,0,0,0,1", "ISIC_2,0.0,1.0,0.0,0.0,0.0,0.0,0.0")


def touch(folder: Path, *names: str) -> None:
    """Make images; reading a source never opens one, so they are empty."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_lines(file: Path, *lines: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def write_ham10000(folder: Path, rows: Sequence[str] = ROWS, images: Sequence[str] = PARTS) -> Path:
    write_lines(folder / "HAM10000_metadata.csv", HEADER, *rows)
    touch(folder, *images)
    return folder


def write_isic(folder: Path, rows: Sequence[str] = ISIC_ROWS, part: str = "Training") -> Path:
    name = f"ISIC2018_Task3_{part}"
    write_lines(folder / f"{name}_GroundTruth" / f"{name}_GroundTruth.csv", ISIC_HEADER, *rows)
    touch(folder, f"{name}_Input/ISIC_1.jpg", f"{name}_Input/ISIC_2.jpg", f"{name}_Input/LICENSE.txt")
    return folder


def read(source: Path | str) -> pd.DataFrame:
    return read_source(str(source), Path("nowhere"))


def list_images(folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in read(folder)["path"]]


def check_refusal(source: Path | str, *told: str) -> None:
    with pytest.raises(UserError) as refusal:
        read(source)
    assert "\n" not in str(refusal.value)
    assert all(text in str(refusal.value) for text in told)


def test_kaggle_layout_has_its_images_in_both_parts(tmp_path: Path) -> None:
    table = read(write_ham10000(tmp_path))

    assert table["dx"].tolist() == ["nv", "nv", "mel"]
    assert table["path"].tolist() == [str(tmp_path / part) for part in PARTS]


@pytest.mark.parametrize("name", ["HAM10000_metadata", "HAM10000_metadata.tab", "ham10000_metadata.csv"])
def test_dataverse_layout_has_its_images_anywhere_below(tmp_path: Path, name: str) -> None:
    images = [f"unzipped/HAM10000_images/ISIC_{number}.jpg" for number in (1, 2, 3)]
    write_lines(tmp_path / name, *(line.replace(",", "\t") for line in (HEADER, *ROWS)))
    touch(tmp_path, *images)

    assert list_images(tmp_path) == images


def test_paths_are_absolute_for_a_relative_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_ham10000(tmp_path / "data")
    monkeypatch.chdir(tmp_path)

    assert read("data")["path"].tolist() == [str(tmp_path / "data" / part) for part in PARTS]


def test_part_folders_in_lower_case_are_found_and_copies_in_both_cases_are_one_set(tmp_path: Path) -> None:
    lower = [part.replace("HAM", "ham") for part in PARTS]

    assert list_images(write_ham10000(tmp_path / "lower", images=lower)) == lower
    assert list_images(write_ham10000(tmp_path / "both", images=[*PARTS, *lower])) == list(PARTS)


def test_masks_hidden_files_and_other_data_beside_the_images_are_left_alone(tmp_path: Path) -> None:
    folder = write_ham10000(tmp_path)
    touch(folder, "HAM10000_segmentations/ISIC_1_segmentation.png", "ISIC2018_Task3_Test_Images/ISIC_99.jpg")
    touch(folder, "__MACOSX/HAM10000_images_part_1/ISIC_1.jpg", "HAM10000_images_part_1/._ISIC_1.jpg")
    touch(folder, ".cache/ISIC_1.jpg", "hmnist_28_28_RGB.csv", "HAM10000_images_part_1/LICENSE.txt")

    assert list_images(folder) == list(PARTS)


def test_linked_image_folders_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "disk", *PARTS)
    folder = write_ham10000(tmp_path / "data", images=())
    for part in ("HAM10000_images_part_1", "HAM10000_images_part_2"):
        (folder / part).symlink_to(tmp_path / "disk" / part)

    assert list_images(folder) == list(PARTS)


@pytest.mark.parametrize("copy", ["HAM10000_images_part_2/ISIC_1.jpg", "HAM10000_images_part_1/ISIC_1.png"])
def test_an_image_that_lies_twice_is_refused(tmp_path: Path, copy: str) -> None:
    check_refusal(write_ham10000(tmp_path, images=[*PARTS, copy]), "two files of one image", copy)


def test_isic_part_is_read_from_its_parent_and_by_its_own_name(tmp_path: Path) -> None:
    table = read(write_isic(tmp_path))

    assert table["image_id"].tolist() == ["ISIC_1", "ISIC_2"]
    assert table["dx"].tolist() == ["vasc", "nv"]
    assert "lesion_id" not in table
    pd.testing.assert_frame_equal(table, read(tmp_path / "ISIC2018_Task3_Training_Input"))


def test_isic_lesion_groupings_give_the_lesion_ids(tmp_path: Path) -> None:
    groupings = write_isic(tmp_path) / "ISIC2018_Task3_Training_LesionGroupings.csv"
    rows = ("image,lesion_id,diagnosis_confirm_type", "ISIC_2,HAM_8,", "ISIC_1,HAM_7,histopathology")

    write_lines(groupings, *rows)
    assert read(tmp_path)["lesion_id"].tolist() == ["HAM_7", "HAM_8"]

    write_lines(groupings, *rows[:2])
    check_refusal(tmp_path, "LesionGroupings.csv lacks", "'ISIC_1'")

    write_lines(groupings, *rows, rows[1])
    check_refusal(tmp_path, "twice", "'ISIC_2'")


def test_one_of_several_isic_parts_must_be_passed(tmp_path: Path) -> None:
    write_isic(write_isic(tmp_path), part="Test")

    check_refusal(tmp_path, "ISIC2018_Task3_Training_Input", "data=")
    assert len(read(tmp_path / "ISIC2018_Task3_Test_Input")) == 2


def test_isic_without_ground_truth_is_refused(tmp_path: Path) -> None:
    touch(tmp_path, "ISIC2018_Task3_Test_Input/ISIC_1.jpg")

    check_refusal(tmp_path, "ISIC2018_Task3_Test_GroundTruth.csv is missing")


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    touch(tmp_path, "wart/c.PNG", "mole/a.jpg", "mole/b.jpeg", "mole/notes.txt", ".hidden/d.jpg", "README.md")

    table = read(tmp_path)

    assert table["image_id"].tolist() == ["a", "b", "c"]
    assert table["dx"].tolist() == ["mole", "mole", "wart"]
    assert list_images(tmp_path) == ["mole/a.jpg", "mole/b.jpeg", "wart/c.PNG"]


def test_every_usual_suffix_is_read_and_other_files_are_counted_and_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "nv/1.jfif", "nv/2.JPE", "nv/3.jfi", "mel/4.dib", "mel/5.heic", "mel/6.txt")

    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path)) == 4

    assert [word in caplog.text for word in ("2 files", "'mel/5.heic'", "'mel/6.txt'")] == [True] * 3


def test_links_that_lead_back_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path / "classes", "nv/1.jpg", "mel/2.jpg")
    folder = write_ham10000(tmp_path / "ham")
    for place in (tmp_path / "classes", folder, folder / "HAM10000_images_part_1"):
        (place / "loop").symlink_to(place)
    (folder / "HAM10000_images_part_2" / "across").symlink_to(folder / "HAM10000_images_part_1")

    assert len(read(tmp_path / "classes")) == 2
    assert len(read(folder)) == 3


@pytest.mark.parametrize("name", [b"nv/\xe9.jpg", b"n\xe9/1.jpg"])
def test_a_name_that_is_not_utf8_is_shown_escaped(tmp_path: Path, name: bytes) -> None:
    touch(tmp_path, "nv/1.jpg", "mel/2.jpg", os.fsdecode(name))

    check_refusal(tmp_path, "not UTF-8", "\\udce9")


def test_images_of_one_stem_are_named_with_their_class(tmp_path: Path) -> None:
    touch(tmp_path, "nv/1.jpg", "nv/2.jpg", "mel/1.jpg")

    assert read(tmp_path)["image_id"].tolist() == ["mel/1", "nv/1", "nv/2"]


@pytest.mark.parametrize("extra", ["empty/notes.txt", "nv/more/3.jpg"])
def test_class_folders_hold_images_and_no_folders(tmp_path: Path, extra: str) -> None:
    touch(tmp_path, "nv/1.jpg", "mel/2.jpg", extra)

    check_refusal(tmp_path, "class", repr(extra.split("/")[0]))


def test_csv_paths_count_from_its_folder(tmp_path: Path) -> None:
    touch(tmp_path, "lists/x.jpg", "images/y.jpg", "images/z.jpg")
    rows = ("path,dx", "x.jpg,nv", "../images/y.jpg,nv", f"{tmp_path}/images/z.jpg,mel")

    table = read(write_lines(tmp_path / "lists" / "list.csv", *rows))

    assert table["image_id"].tolist() == ["x", "y", "z"]
    assert table["path"].tolist() == [
        str(tmp_path / name) for name in ("lists/x.jpg", "images/y.jpg", "images/z.jpg")
    ]


@pytest.mark.parametrize(
    "path",
    ["no_folder/1.jpg", ".", "pipe.jpg", "~nosuchuser/1.jpg", 300 * "n", 2500 * "n/"],
)
def test_csv_paths_that_are_no_file_are_refused(tmp_path: Path, path: str) -> None:
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")

    check_refusal(write_lines(tmp_path / "list.csv", "path,dx", "1.jpg,nv", f"{path},mel"), "not a file")


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    check_refusal(tmp_path / "nowhere", "nowhere", "does not exist")
    check_refusal("~nosuchuser/x", "~nosuchuser/x", "no such user")
    for length in (300, 5000):
        check_refusal("n" * length, "does not exist")


@pytest.fixture
def install_kagglehub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a way to put a package named kagglehub on the path, whose download does what it is told."""

    def install(action: str) -> None:
        write_lines(tmp_path / "kagglehub.py", "def dataset_download(name):", f"    {action}")
        monkeypatch.syspath_prepend(tmp_path)
        # Set, so that monkeypatch puts back what was there; then gone, so that the import looks on the path.
        monkeypatch.setitem(sys.modules, "kagglehub", None)
        del sys.modules["kagglehub"]

    return install


def test_kaggle_without_its_package_names_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # makes the import fail, also where it is installed

    check_refusal("kaggle", "pip install kagglehub")


def test_a_failed_kaggle_download_names_the_cause_and_the_way_by_hand(
    install_kagglehub: Callable[[str], None],
) -> None:
    install_kagglehub("raise ConnectionError('no route to kaggle.com\\nsecond line')")

    check_refusal("kaggle", "no route to kaggle.com;", "by hand", "pass its folder")


def test_a_kaggle_download_is_read_as_its_folder(
    tmp_path: Path, install_kagglehub: Callable[[str], None]
) -> None:
    folder = write_ham10000(tmp_path / "skin-cancer-mnist-ham10000")
    install_kagglehub(f"return {str(tmp_path)!r} + '/' + name.removeprefix('kmader/')")

    assert read("kaggle")["path"].tolist() == [str(folder / part) for part in PARTS]
