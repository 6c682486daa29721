"""Every way in which splits can share a lesion is found and counted; what is clean is called clean."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance
from scipy.stats import chi2_contingency

from skin_resnet.cli import main
from skin_resnet.data import leakage
from skin_resnet.data.extract import extract
from skin_resnet.data.leakage import LeakageReport, audit_split
from skin_resnet.data.split import SPLITS, Split, read_split, split_lesions
from skin_resnet.data.store import ImageStore, Pixels, describe_image, open_store
from tests.conftest import make_table

SIZE = 64


def draw(number: int) -> Image.Image:
    """A image of smooth patches, as unlike the others as two images of skin are."""
    noise = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def draw_pixels(table: pd.DataFrame) -> Pixels:
    return np.stack([np.asarray(draw(number)) for number in range(len(table))])


def build_store(table: pd.DataFrame, pixels: Pixels) -> ImageStore:
    digests, thumbnails = zip(*map(describe_image, pixels), strict=True)
    return ImageStore(
        pixels=pixels,
        thumbnails=np.stack(thumbnails),
        digests=digests,
        image_ids=tuple(table.image_id),
        image_size=pixels.shape[1],
        key="",
        skipped={},
    )


def audit(table: pd.DataFrame, sides: list[str], pixels: Pixels | None = None) -> LeakageReport:
    split = Split.from_frame(pd.DataFrame({"image_id": table.image_id, "split": sides}))
    return audit_split(table, split, build_store(table, draw_pixels(table) if pixels is None else pixels))


def make_small_table() -> pd.DataFrame:
    """Two classes of three lesions: one with three images, two with one."""
    table = make_table(lesions_per_class=4, classes=("mel", "nv"))
    return table[~table.lesion_id.str.endswith("3")].reset_index(drop=True)


# mel_000_0, mel_000_1, mel_000_2, mel_001_0, mel_002_0, then nv's: no lesion in two splits
CLEAN = ["train", "train", "train", "val", "test"] * 2


def list_pairs(report: LeakageReport) -> list[tuple[str, ...]]:
    return list(report.pairs[["kind", "image_id", "seen_id"]].itertuples(index=False, name=None))


def test_a_split_by_lesion_is_clean() -> None:
    report = audit(make_small_table(), CLEAN)
    assert not report.leaks
    assert report.pairs.empty
    assert report.lesions == 6
    assert report.class_distance == {"val": 0.0, "test": 0.0}


def test_a_lesion_in_two_splits_is_found_and_priced_by_class() -> None:
    report = audit(make_small_table(), ["train", "train", "test", "val", "test", *CLEAN[5:]])
    assert report.leaks
    assert list_pairs(report) == [
        ("lesion", "mel_000_2", "mel_000_0"),
        ("lesion", "mel_000_2", "mel_000_1"),
    ]
    assert report.count_touched(("lesion",)).to_dict() == {"mel": 1, "nv": 0}
    assert report.count_touched(("lesion",), seen=("val",)).sum() == 0
    assert report.class_counts.test.to_dict() == {"mel": 2, "nv": 1}


def test_published_pairs_are_found_through_their_lesions_other_images() -> None:
    table = make_small_table()
    table.loc[[0, 3], "image_id"] = ["ISIC_0033481", "ISIC_0033421"]
    table = table.assign(lesion_id=["L0", "L0", "L0", "L1", *table.lesion_id[4:]])
    # The pair's own first image is in no split.
    sides = Split(train=("mel_000_1",), val=("mel_000_2",), test=("ISIC_0033421",))
    report = audit_split(table, sides, build_store(table, draw_pixels(table)))
    assert list_pairs(report) == [
        ("lesion", "mel_000_2", "mel_000_1"),
        ("published", "ISIC_0033421", "mel_000_1"),
        ("published", "ISIC_0033421", "mel_000_2"),
    ]
    assert report.unused == len(table) - 3


def test_equal_pixels_are_a_leak_and_images_of_one_color_are_not_alike() -> None:
    table = make_small_table()
    pixels = draw_pixels(table)
    pixels[9] = pixels[0]
    pixels[3], pixels[8] = 10, 200
    report = audit(table, CLEAN, pixels)
    assert list_pairs(report) == [("duplicate", "nv_002_0", "mel_000_0")]
    assert report.leaks


def save_as_jpeg(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=40)
    return Image.open(stream)


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        (save_as_jpeg, True),
        (lambda image: image.resize((SIZE // 2, SIZE // 2)), True),
        (lambda image: ImageEnhance.Brightness(image).enhance(0.8), True),
        (lambda image: image.crop((1, 1, SIZE - 1, SIZE - 1)), True),
        (lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), True),
        (lambda image: image.transpose(Image.Transpose.ROTATE_90), True),
        (lambda image: image.transpose(Image.Transpose.TRANSVERSE), True),
        (lambda image: image.crop((0, 0, SIZE // 2, SIZE // 2)), False),
        (lambda image: Image.eval(image, lambda value: 255 - value), False),
    ],
    ids=["jpeg", "half", "darker", "crop_2", "flip", "turn", "transverse", "quarter", "negative"],
)
def test_a_changed_copy_is_shown_but_no_proof(change: object, is_found: bool) -> None:
    assert callable(change)
    table = make_small_table()
    pixels = draw_pixels(table)
    pixels[9] = np.asarray(change(draw(0)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    report = audit(table, CLEAN, pixels)
    assert list_pairs(report) == ([("near", "nv_002_0", "mel_000_0")] if is_found else [])
    assert not report.leaks


def test_no_pair_that_is_alike_is_missed() -> None:
    rng = np.random.default_rng(0)
    axis = np.linspace(-1, 1, 16)
    blobs = [np.exp(-((axis - x) ** 2)[:, None] * w - (axis - y) ** 2) for x, y, w in rng.random((120, 3))]
    turned = [np.rot90(blob, rng.integers(4))[:: rng.choice([-1, 1])] for blob in blobs]
    drawn = np.array([*blobs, *turned]) + rng.normal(0, 0.02, (240, 16, 16))
    thumbnails = leakage._normalize_thumbnails((drawn * 99).astype(np.uint8))
    order = rng.integers(0, 3, 240)
    views = [np.rot90(m, k, (1, 2)) for m in (thumbnails, thumbnails[:, :, ::-1]) for k in range(4)]
    similarity = np.max([np.einsum("nij,mij->nm", view, thumbnails) for view in views], axis=0)
    expected = np.argwhere((similarity >= 0.98) & (order[:, None] > order))
    assert 50 < len(expected) < 20_000
    found = leakage._find_alike(order, thumbnails)
    np.testing.assert_array_equal(found[["row", "seen_row"]].sort_values(["row", "seen_row"]), expected)


def test_class_shift_agrees_with_scipy() -> None:
    table = make_table(lesions_per_class=40)
    lesions = table.drop_duplicates("lesion_id")
    rng = np.random.default_rng(0)
    weights = {True: (0.4, 0.3, 0.3), False: (0.7, 0.2, 0.1)}
    side_of = {row.lesion_id: rng.choice(SPLITS, p=weights[row.target < 2]) for row in lesions.itertuples()}
    sides = table.lesion_id.map(side_of)
    report = audit(table, list(sides))
    observed = pd.crosstab(lesions.dx, lesions.lesion_id.map(side_of))
    assert report.class_p == pytest.approx(chi2_contingency(observed).pvalue)
    shares = pd.crosstab(table.dx, sides, normalize="columns")
    assert report.class_distance["val"] == pytest.approx((shares.val - shares.train).clip(lower=0).sum())


def test_the_report_is_json_and_counts_what_was_not_audited() -> None:
    table = make_small_table()
    sides = Split(train=tuple(table.image_id[:5]), val=(), test=(*table.image_id[6:], "unreadable"))
    report = audit_split(table, sides, build_store(table, draw_pixels(table)))
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (told["unused"], told["unread"], told["leaks"]) == (1, 1, False)
    assert told["images"] == {"train": 5, "val": 0, "test": 4}
    assert (told["class_distance"], told["class_p"] < 0.05) == ({"test": 1.0}, True)


def test_the_usual_names_of_splits_are_read(tmp_path: Path) -> None:
    file = tmp_path / "split.csv"
    file.write_text("image_id;split\nmel_000_0;Training\nmel_001_0;valid\nmel_002_0;TEST\n")
    split = read_split(file, make_small_table().image_id)
    assert split == Split(train=("mel_000_0",), val=("mel_001_0",), test=("mel_002_0",))


def run_command(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as end:
        main(["audit", *arguments])
    return end.value.code


def test_the_command_calls_our_split_clean_and_one_by_image_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--cache_dir", str(tmp_path)) == 0
    assert "Leakage report: clean" in capsys.readouterr().out
    table = extract("demo", tmp_path)
    by_image = table[["image_id"]].assign(split=[SPLITS[row % 3] for row in range(len(table))])
    by_image.to_csv(tmp_path / "split.csv", index=False)
    files = {"split": "split.csv", "report": "report.json"}
    options = [part for name, file in files.items() for part in (f"--{name}", str(tmp_path / file))]
    assert run_command("--cache_dir", str(tmp_path), *options) == 1
    page = capsys.readouterr().out
    assert "Leakage report: the split leaks" in page
    assert "of melanoma's" in page
    told = json.loads((tmp_path / "report.json").read_text())
    sides = table.merge(by_image)
    learned = set(sides.lesion_id[sides.split == "train"])
    touched = sides[(sides.split == "test") & sides.lesion_id.isin(learned)].dx.value_counts()
    assert told["test_touched"]["lesion"] == touched.to_dict()


def test_data_without_lesions_is_not_called_clean(
    class_folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("--data", str(class_folders), "--cache_dir", str(tmp_path)) == 0
    page = capsys.readouterr().out
    assert "Leakage report: no leak found" in page
    assert "no lesion ids" in page


@pytest.mark.skipif("SKIN_RESNET_DATA" not in os.environ, reason="SKIN_RESNET_DATA names no HAM10000 folder")
def test_a_split_of_ham10000_by_image_leaks_and_ours_does_not(tmp_path: Path) -> None:
    table = extract(os.environ["SKIN_RESNET_DATA"], tmp_path)
    store = open_store(table, 64, tmp_path, "stop")
    assert (table.lesion_id.value_counts() > 1).sum() == 1956
    ours = audit_split(table, split_lesions(table, val_fraction=0.15, test_fraction=0.15, seed=0), store)
    assert not ours.leaks
    sides = np.random.default_rng(0).choice(SPLITS, len(table), p=[0.7, 0.15, 0.15])
    report = audit(table, list(sides), store.pixels)
    shares = report.count_touched(("lesion",)) / report.class_counts.test
    assert shares["mel"] == pytest.approx(0.63, abs=0.06)
    assert report.count_touched(("lesion",)).sum() / (sides == "test").sum() == pytest.approx(0.35, abs=0.04)
