"""Where a data set comes from: every layout is found and read into a raw table of text columns.

A raw table has image_id, dx and path (absolute); lesion_id, age, sex and localization if the source has them.
"""

import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NoReturn

import pandas as pd

from skin_resnet.data import demo
from skin_resnet.data.text_table import read_text_table, refuse_any
from skin_resnet.errors import UserError
from skin_resnet.labels import HAM10000_CLASSES

KAGGLE_DATASET = "kmader/skin-cancer-mnist-ham10000"

_PICTURE_SUFFIXES = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_HAM10000_METADATA = re.compile(r"HAM10000_metadata(\.(csv|tab|tsv|txt))?", re.IGNORECASE)
_HAM10000_IMAGES = re.compile(r"HAM10000_images.*", re.IGNORECASE)
_ISIC_INPUT = re.compile(r"ISIC2018_Task3_(Training|Validation|Test)_Input")
_ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_LAYOUTS = (
    "HAM10000_metadata.csv with image folders (Kaggle, Dataverse), "
    "ISIC2018_Task3_..._Input with its ground truth, or a sub-folder of pictures per class"
)


def read_source(source: str, cache_dir: Path) -> pd.DataFrame:
    """Read `demo`, `kaggle`, a folder or a CSV file into a raw table.

    Raises:
        UserError: There is no such source, it has no known layout, or its files do not fit each other.
        OSError: A file or folder cannot be read.
    """
    if source == "demo":
        return _read_folder(demo.open_demo(cache_dir).absolute())
    if source == "kaggle":
        return _read_folder(_download_kaggle())
    path = Path(os.path.abspath(os.path.expanduser(source)))
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_path_table(path)
    raise UserError(
        f"data must be demo, kaggle, a folder or a CSV file, but {source!r} does not exist; check the path."
    )


def _download_kaggle() -> Path:
    try:
        kagglehub = importlib.import_module("kagglehub")
    except ImportError:
        raise UserError(
            "data=kaggle needs the package kagglehub, but it is not installed; "
            "run pip install kagglehub, or download the data set by hand and pass its folder."
        ) from None
    try:
        return Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # whatever the network, Kaggle's login or the disk answers with
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"data=kaggle downloads {KAGGLE_DATASET}, but that failed: {cause}; "
            f"download it by hand from https://www.kaggle.com/datasets/{KAGGLE_DATASET} and pass its folder."
        ) from error


def _read_folder(folder: Path) -> pd.DataFrame:
    """Recognise the layout by the names at the folder's top."""
    if _ISIC_INPUT.fullmatch(folder.name):
        return _read_isic(folder)
    metadata = sorted(
        path for path in folder.iterdir() if _HAM10000_METADATA.fullmatch(path.name) and path.is_file()
    )
    if metadata:
        refuse_any(
            [path.name for path in metadata[1:]],
            rule=f"{folder} must hold one metadata file",
            problem=f"beside {metadata[0].name!r} lies",
            remedy="remove one of them",
        )
        return _read_ham10000(folder, metadata[0])
    _, names, _ = next(_walk(folder))
    # Without this, the two part folders would pass as two classes.
    refuse_any(
        [name for name in names if _HAM10000_IMAGES.fullmatch(name)],
        rule="Image folders of HAM10000 need HAM10000_metadata.csv beside them",
        problem=f"{folder} has only",
        remedy="put it there",
    )
    inputs = [name for name in names if _ISIC_INPUT.fullmatch(name)]
    if not inputs:
        return _read_class_folders(folder, names)
    refuse_any(
        inputs[1:],
        rule="data must be one part of ISIC 2018 Task 3",
        problem=f"{folder} holds {inputs[0]!r} and",
        remedy=f"name one, as in {folder / inputs[0]}",
    )
    return _read_isic(folder / inputs[0])


def _read_ham10000(folder: Path, metadata: Path) -> pd.DataFrame:
    table = read_text_table(metadata, required=("lesion_id", "image_id", "dx"))
    refuse_any(
        table["dx"][~table["dx"].isin(HAM10000_CLASSES)],
        rule=f"dx in {metadata.name} must be one of {', '.join(HAM10000_CLASSES)}",
        problem="it has",
        remedy="correct it, or use a CSV of path,dx for classes of your own",
    )
    return table.assign(path=_find_pictures(table["image_id"], folder, metadata))


def _read_isic(folder: Path) -> pd.DataFrame:
    """Read one part from its image folder; the ground truth lies beside it, or in a folder beside it."""
    part = folder.name.removesuffix("_Input")
    truth = _find_beside(folder, f"{part}_GroundTruth.csv")
    if truth is None:
        raise UserError(
            f"{folder} needs {part}_GroundTruth.csv beside it, but it is not there; put it there."
        )
    table = read_text_table(truth, required=("image", *_ISIC_CLASSES)).rename(columns={"image": "image_id"})
    one_hot = table[list(_ISIC_CLASSES)].apply(pd.to_numeric, errors="coerce")
    refuse_any(
        table["image_id"][~one_hot.isin((0, 1)).all(axis=1) | (one_hot.sum(axis=1) != 1)],
        rule=f"Every row of {truth.name} must have a single 1 and zeros",
        problem="that is not so for",
        remedy="correct the row",
    )
    table["dx"] = one_hot.idxmax(axis=1).str.lower()
    groupings = _find_beside(folder, f"{part}_LesionGroupings.csv")
    if groupings is not None:
        table["lesion_id"] = _read_lesion_ids(table["image_id"], groupings)
    return table.assign(path=_find_pictures(table["image_id"], folder, truth))


def _find_beside(folder: Path, name: str) -> Path | None:
    places = (folder.parent, folder.parent / folder.name.replace("_Input", "_GroundTruth"))
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_lesion_ids(image_ids: "pd.Series[str]", groupings: Path) -> "pd.Series[str]":
    table = read_text_table(groupings, required=("image", "lesion_id"))
    refuse_any(
        table["image"][table["image"].duplicated()],
        rule=f"Every image must occur once in {groupings.name}",
        problem="it doubles",
        remedy="remove one of the two rows",
    )
    lesion_ids = image_ids.map(table.set_index("image")["lesion_id"])
    refuse_any(
        image_ids[lesion_ids.isna()],
        rule=f"{groupings.name} must know the lesion of every image",
        problem="it lacks",
        remedy="use the whole file, or remove it to go without lesion ids",
    )
    return lesion_ids


def _read_class_folders(folder: Path, names: list[str]) -> pd.DataFrame:
    contents = {name: next(_walk(folder / name)) for name in names}
    if not any(pictures for _, _, pictures in contents.values()):
        raise UserError(
            f"{folder} must have a known layout, but has none of these: {_LAYOUTS}; name such a folder."
        )
    refuse_any(
        [name for name, (_, folders, pictures) in contents.items() if folders or not pictures],
        rule=f"Every sub-folder of {folder} is a class and must hold pictures, and no folders",
        problem="that is not so in",
        remedy="move what is no class elsewhere",
    )
    rows = [(f"{dx}/{picture}", dx) for dx, (_, _, pictures) in contents.items() for picture in pictures]
    table = pd.DataFrame(rows, columns=["path", "dx"], dtype="str")
    return table.assign(image_id=_name_images(table["path"]), path=f"{folder}/" + table["path"])


def _read_path_table(file: Path) -> pd.DataFrame:
    table = read_text_table(file, required=("path", "dx"))
    if "image_id" not in table:
        table["image_id"] = _name_images(table["path"])
    table["path"] = [os.path.abspath(file.parent / path) for path in table["path"]]
    refuse_any(
        _list_missing(table["path"]),
        rule=f"Every path in {file.name} must be a file, named from the folder of {file.name} on",
        problem="there is no",
        remedy="correct the path or remove the row",
    )
    return table


def _name_images(paths: Iterable[str]) -> list[str]:
    """Call images by their file's stem, or, where two share one, all by their path without suffix."""
    stems = [PurePath(path).stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [os.path.splitext(path)[0] for path in paths]


def _list_missing(paths: Iterable[str]) -> list[str]:
    # One listing a folder: asking for each of ten thousand files takes seconds on a network drive.
    parents = {os.path.dirname(path) for path in paths}
    entries = (entry for parent in parents if os.path.isdir(parent) for entry in os.scandir(parent))
    present = {entry.path for entry in entries if entry.is_file()}
    return [path for path in paths if path not in present]


def _find_pictures(image_ids: "pd.Series[str]", folder: Path, metadata: Path) -> "pd.Series[str]":
    """Find every image's file by its stem, wherever below the folder it lies."""
    wanted = set(image_ids)
    found: dict[str, str] = {}
    doubled, unknown = [], []
    for parent, _, names in _walk(folder):
        stems = [os.path.splitext(name)[0] for name in names]
        if wanted.isdisjoint(stems):
            continue  # lesion masks or another data set: no image folder of this table
        for stem, name in zip(stems, names, strict=True):
            path = os.path.join(parent, name)
            if stem not in wanted:
                unknown.append(path)
            # Kaggle's download may hold each part twice, as HAM10000_images_part_1 and ham10000_...
            elif found.setdefault(stem, path).lower() != path.lower():
                doubled.append(path)
    refuse_any(
        [image_id for image_id in image_ids if image_id not in found],
        rule=f"Every image in {metadata.name} must lie as a file of its name in or below {folder}",
        problem="there is none for",
        remedy="unpack all image archives there",
    )
    refuse_any(
        doubled,
        rule=f"Every image must lie once below {folder}",
        problem="another file of the same name exists for",
        remedy="remove one of the two",
    )
    refuse_any(
        unknown,
        rule=f"Every picture in the image folders must be in {metadata.name}",
        problem="it lacks",
        remedy="add its row or move it elsewhere",
    )
    return image_ids.map(found)


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield each folder from this one down, with the sorted names of its folders and of its pictures.

    Links are followed; hidden names and macOS's archive leftovers are not seen.
    """
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        pictures = [name for name in files if os.path.splitext(name)[1].lower() in _PICTURE_SUFFIXES]
        yield parent, folders, sorted(name for name in pictures if not name.startswith("."))


def _raise(error: OSError) -> NoReturn:
    raise error
