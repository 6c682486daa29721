"""The demo data must be what HAM10000 is, in small: readers and splits are tried on it."""

import multiprocessing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skin_resnet.data.demo import draw_image, open_demo, write_demo
from skin_resnet.errors import UserError
from skin_resnet.labels import HAM10000_CLASSES


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return open_demo(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def table(demo_folder: Path) -> pd.DataFrame:
    return pd.read_csv(demo_folder / "HAM10000_metadata.csv")


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_row_has_its_image_and_every_image_its_row(demo_folder: Path, table: pd.DataFrame) -> None:
    files = [file for file in demo_folder.rglob("*.*") if file.suffix != ".csv"]
    assert sorted(file.stem for file in files) == sorted(table.image_id)
    assert {file.parent.name for file in files} == {"HAM10000_images_part_1", "HAM10000_images_part_2"}
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (96, 72))


def test_classes_lesions_and_ages_are_those_of_ham10000(table: pd.DataFrame) -> None:
    counts = {"akiec": 327, "bcc": 514, "bkl": 1099, "df": 115, "mel": 1113, "nv": 6705, "vasc": 142}
    gaps = table.dx.value_counts(normalize=True) - pd.Series(counts) / 10015
    assert gaps.abs().max() < 0.03
    # A split by lesion needs some of each class in each split.
    assert table.groupby("dx").lesion_id.nunique().min() >= 8
    # Neither the order nor the file names reveal the class.
    assert set(table.dx[: len(table) // 2]) == set(table.dx[len(table) // 2 :]) == set(HAM10000_CLASSES)
    lesions = table.groupby("lesion_id")
    assert (lesions.size() > 1).mean() == pytest.approx(0.26, abs=0.02)
    assert (lesions[["dx", "dx_type", "age", "sex", "localization"]].nunique() <= 1).all(axis=None)
    assert 0 < table.age.isna().mean() < 0.05
    assert set(table.age.dropna()) <= set(range(0, 90, 5))


def test_the_same_seed_gives_the_same_bytes(demo_folder: Path, tmp_path: Path) -> None:
    write_demo(tmp_path / "again")
    assert read_files(tmp_path / "again") == read_files(demo_folder)


@pytest.mark.parametrize("dx", HAM10000_CLASSES)
def test_two_images_of_a_lesion_are_more_alike_than_two_lesions(dx: str) -> None:
    def compute_colors(lesion_seed: int, image_seed: int) -> np.ndarray:
        image = draw_image(dx, np.random.default_rng(lesion_seed), np.random.default_rng(image_seed))
        # Sorted by brightness, pixels can be compared however the lesion is framed.
        return np.sort(image[18:54, 24:72].reshape(-1, 3), axis=0).astype(float)

    first = [compute_colors(seed, 100 + seed) for seed in range(8)]
    second = [compute_colors(seed, 200 + seed) for seed in range(8)]
    gaps = np.array([[np.abs(a - b).mean() for b in second] for a in first])
    assert 0 < np.diag(gaps).mean() < 0.7 * gaps[~np.eye(8, dtype=bool)].mean()


def test_a_killed_build_is_never_taken_for_whole_and_two_at_once_share_one(
    tmp_path: Path, demo_folder: Path
) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=open_demo, args=(tmp_path,))
    process.start()
    while not any(tmp_path.rglob("*.jpg")):
        assert process.is_alive()
    process.kill()
    process.join()
    assert not (tmp_path / demo_folder.name).exists()
    with context.Pool(2) as pool:
        folders = pool.map(open_demo, [tmp_path, tmp_path], chunksize=1)
    assert folders == [tmp_path / demo_folder.name] * 2
    assert read_files(folders[0]) == read_files(demo_folder)
    assert not list(tmp_path.glob("*.tmp"))
    before = folders[0].stat().st_mtime_ns
    assert open_demo(tmp_path).stat().st_mtime_ns == before, "a whole demo is not drawn again"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(UserError, match=r"cache_dir: .*cache"):
        open_demo(tmp_path / "cache")
