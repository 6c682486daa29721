"""The demo data must be what HAM10000 is, in small: readers and splits are tried on it."""

import csv
import multiprocessing
import os
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skin_resnet.data.demo import draw_image, open_demo, write_demo
from skin_resnet.errors import UserError
from skin_resnet.labels import HAM10000_CLASSES

PARTS = ("HAM10000_images_part_1", "HAM10000_images_part_2")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def demo_folder(cache_dir: Path) -> Path:
    return open_demo(cache_dir)


@pytest.fixture(scope="module")
def rows(demo_folder: Path) -> list[dict[str, str]]:
    with open(demo_folder / "HAM10000_metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def draw(dx: str, lesion_seed: int, photo_seed: int) -> np.ndarray:
    return draw_image(dx, np.random.default_rng(lesion_seed), np.random.default_rng(photo_seed))


def test_columns_are_those_of_ham10000(rows: list[dict[str, str]]) -> None:
    assert list(rows[0]) == ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]


def test_every_row_has_its_picture_and_every_picture_its_row(
    demo_folder: Path, rows: list[dict[str, str]]
) -> None:
    pictures = [path.stem for part in PARTS for path in (demo_folder / part).iterdir()]
    assert sorted(pictures) == sorted(row["image_id"] for row in rows)
    assert len(set(pictures)) == len(pictures)
    assert {path.name for path in demo_folder.iterdir()} == {*PARTS, "HAM10000_metadata.csv"}


def test_pictures_are_landscape_rgb_jpegs_of_one_size(demo_folder: Path) -> None:
    seen = set()
    for path in demo_folder.rglob("*.jpg"):
        with Image.open(path) as image:
            seen.add((image.format, image.mode, image.size))
    assert seen == {("JPEG", "RGB", (96, 72))}


def test_classes_are_as_imbalanced_as_in_ham10000(rows: list[dict[str, str]]) -> None:
    shares = {dx: count / len(rows) for dx, count in Counter(row["dx"] for row in rows).items()}
    ham10000 = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
    assert tuple(sorted(shares)) == HAM10000_CLASSES
    for dx, count in ham10000.items():
        assert shares[dx] == pytest.approx(count / 10015, abs=0.03), dx


def test_every_class_has_lesions_for_three_parts(rows: list[dict[str, str]]) -> None:
    lesions = Counter(dx for _, dx in {(row["lesion_id"], row["dx"]) for row in rows})
    assert min(lesions.values()) >= 8


def test_a_quarter_of_the_lesions_has_several_photos_of_one_diagnosis(rows: list[dict[str, str]]) -> None:
    photos = defaultdict(list)
    for row in rows:
        photos[row["lesion_id"]].append({name: row[name] for name in row if name != "image_id"})
    several = [group for group in photos.values() if len(group) > 1]
    assert len(several) / len(photos) == pytest.approx(0.26, abs=0.02)
    assert all(photo == group[0] for group in several for photo in group)


def test_dx_types_are_those_of_ham10000(rows: list[dict[str, str]]) -> None:
    dx_types = defaultdict(set)
    for row in rows:
        dx_types[row["dx"]].add(row["dx_type"])
    assert dx_types["mel"] == dx_types["bcc"] == dx_types["akiec"] == {"histo"}
    assert dx_types["nv"] == {"histo", "follow_up", "consensus"}
    assert all("follow_up" not in seen for dx, seen in dx_types.items() if dx != "nv")


def test_a_few_ages_are_missing_and_the_others_are_multiples_of_five(rows: list[dict[str, str]]) -> None:
    ages = [float(row["age"]) for row in rows if row["age"]]
    assert 0 < len(rows) - len(ages) < 0.05 * len(rows)
    assert set(ages) <= set(range(0, 90, 5))


def test_neither_names_nor_order_tell_the_diagnosis(rows: list[dict[str, str]]) -> None:
    middle = len(rows) // 2
    first, second = Counter(row["dx"] for row in rows[:middle]), Counter(row["dx"] for row in rows[middle:])
    assert set(first) == set(second) == set(HAM10000_CLASSES)


def test_the_same_seed_gives_the_same_bytes(demo_folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(demo_folder)


def test_another_seed_gives_other_pictures(demo_folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "other", seed=1)
    ours, others = read_files(demo_folder), read_files(tmp_path / "other")
    assert set(ours) == set(others)
    assert not any(ours[name] == others[name] for name in ours)


@pytest.mark.parametrize("dx", HAM10000_CLASSES)
def test_two_photos_of_a_lesion_are_more_alike_than_two_lesions(dx: str) -> None:
    def compute_colours(lesion_seed: int, photo_seed: int) -> np.ndarray:
        # Sorted by brightness, pixels can be compared whatever the framing.
        return np.sort(draw(dx, lesion_seed, photo_seed)[18:54, 24:72].reshape(-1, 3), axis=0).astype(float)

    first = [compute_colours(seed, 100 + seed) for seed in range(8)]
    second = [compute_colours(seed, 200 + seed) for seed in range(8)]
    gaps = np.array([[np.abs(a - b).mean() for b in second] for a in first])
    assert np.diag(gaps).mean() < 0.7 * gaps[~np.eye(8, dtype=bool)].mean()


def test_no_two_photos_of_a_lesion_are_equal() -> None:
    assert not np.array_equal(draw("nv", 0, 1), draw("nv", 0, 2))


def test_demo_is_drawn_once(cache_dir: Path, demo_folder: Path) -> None:
    before = (demo_folder / "HAM10000_metadata.csv").stat().st_mtime_ns
    assert open_demo(cache_dir) == demo_folder
    assert (demo_folder / "HAM10000_metadata.csv").stat().st_mtime_ns == before


def test_nothing_but_the_demo_is_left_in_the_cache(cache_dir: Path, demo_folder: Path) -> None:
    assert {path.name for path in cache_dir.iterdir()} <= {demo_folder.name, f"{demo_folder.name}.lock"}


def test_a_half_written_demo_is_never_taken_for_whole(tmp_path: Path, demo_folder: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=open_demo, args=(tmp_path,))
    process.start()
    while not any(tmp_path.rglob("*.jpg")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / demo_folder.name).exists()
    assert read_files(open_demo(tmp_path)) == read_files(demo_folder)


def test_two_processes_at_once_get_the_same_whole_demo(tmp_path: Path, demo_folder: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        folders = pool.map(open_demo, [tmp_path, tmp_path], chunksize=1)
    assert folders == [tmp_path / demo_folder.name] * 2
    assert read_files(folders[0]) == read_files(demo_folder)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cache_dir=.*cache"):
        open_demo(tmp_path / "cache")
    assert os.listdir(tmp_path) == ["cache"]
