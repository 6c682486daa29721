"""Data set layouts: each is recognized and read into a raw table of text columns.

A raw table has image_id, dx and path (absolute); lesion_id, age, sex and localization if the source has them.
"""

import importlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple, NoReturn

import pandas as pd

from skin_resnet.data import demo
from skin_resnet.data.tables import read_table, reject
from skin_resnet.errors import UserError, expand
from skin_resnet.labels import HAM10000_CLASSES

KAGGLE_DATASET = "kmader/skin-cancer-mnist-ham10000"

_IMAGE_SUFFIXES = frozenset(
    f".{name}" for name in "bmp dib gif jfi jfif jif jpe jpeg jpg png tif tiff webp".split()
)
_HAM10000_METADATA = re.compile(r"HAM10000_metadata(\.(csv|tab|tsv|txt))?", re.IGNORECASE)
_HAM10000_IMAGES = re.compile(r"HAM10000_images.*", re.IGNORECASE)
_ISIC_INPUT = re.compile(r"ISIC2018_Task3_(Training|Validation|Test)_Input")
_ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # Python's stand-ins for bytes that are not UTF-8
_LAYOUTS = (
    "HAM10000_metadata.csv with image folders (Kaggle, Dataverse), "
    "ISIC2018_Task3_..._Input with its ground truth, or a subfolder of images per class"
)

_logger = logging.getLogger(__name__)


class _Folder(NamedTuple):
    """A folder's path, and the sorted names in it."""

    path: str
    folders: list[str]
    images: list[str]
    others: list[str]


def read_source(source: str, cache_dir: Path) -> pd.DataFrame:
    """Read `demo`, `kaggle`, a folder or a CSV file into a raw table.

    Raises:
        UserError: There is no such source, its layout is unknown, or its files do not fit each other.
        OSError: A file or folder cannot be read.
    """
    if source == "demo":
        return _read_folder(demo.open_demo(cache_dir).absolute())
    if source == "kaggle":
        return _read_folder(_download_kaggle())
    path = os.path.abspath(expand(source))
    reject([path] if _NOT_UTF8.search(path) else [], "data is not UTF-8", "rename the folder or file")
    if os.path.isdir(path):
        return _read_folder(Path(path))
    if os.path.isfile(path):
        return _read_path_table(Path(path))
    raise UserError(f"data={source!r} does not exist; pass demo, kaggle, a folder or a CSV file.")


def _download_kaggle() -> Path:
    try:
        kagglehub = importlib.import_module("kagglehub")
    except ImportError:
        raise UserError(
            "data=kaggle needs the package kagglehub; run pip install kagglehub, or download the data set by "
            "hand and pass its folder."
        ) from None
    try:
        return Path(kagglehub.dataset_download(KAGGLE_DATASET))
    except Exception as error:  # whatever the network, Kaggle's login or the disk answers with
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"cannot download {KAGGLE_DATASET}: {cause}; "
            f"download it by hand from https://www.kaggle.com/datasets/{KAGGLE_DATASET} and pass its folder."
        ) from error


def _read_folder(folder: Path) -> pd.DataFrame:
    """Recognize the layout by the names in the folder."""
    if _ISIC_INPUT.fullmatch(folder.name):
        return _read_isic(folder)
    top = next(_walk(folder))
    metadata = [name for name in top.others if _HAM10000_METADATA.fullmatch(name)]
    if metadata:
        reject(metadata[1:], f"{folder} has a second metadata file beside {metadata[0]}", "remove one")
        return _read_ham10000(folder, folder / metadata[0])
    # Without this check, the two folders of HAM10000's images would pass as two classes.
    reject(
        [name for name in top.folders if _HAM10000_IMAGES.fullmatch(name)],
        f"{folder} has image folders of HAM10000 without HAM10000_metadata.csv",
        "put that file there",
    )
    inputs = [name for name in top.folders if _ISIC_INPUT.fullmatch(name)]
    if not inputs:
        return _read_class_folders(top)
    if len(inputs) > 1:
        raise UserError(
            f"{folder} contains several ISIC parts ({', '.join(inputs)}); pass one, e.g. "
            f"data={folder / inputs[0]}."
        )
    return _read_isic(folder / inputs[0])


def _read_ham10000(folder: Path, metadata: Path) -> pd.DataFrame:
    table = read_table(metadata, required=("lesion_id", "image_id", "dx"))
    reject(
        table["dx"][~table["dx"].isin(HAM10000_CLASSES)],
        f"{metadata.name} has a dx other than {', '.join(HAM10000_CLASSES)}",
        "correct it, or use a CSV of path,dx for classes of your own",
    )
    return table.assign(path=_find_images(table["image_id"], folder, metadata))


def _read_isic(folder: Path) -> pd.DataFrame:
    """Read one part from its image folder; the ground truth is beside it, or in a folder beside it."""
    part = folder.name.removesuffix("_Input")
    truth = _find_beside(folder, f"{part}_GroundTruth.csv")
    if truth is None:
        raise UserError(f"{part}_GroundTruth.csv is missing beside {folder}; put it there.")
    table = read_table(truth, required=("image", *_ISIC_CLASSES)).rename(columns={"image": "image_id"})
    one_hot = table[list(_ISIC_CLASSES)].apply(pd.to_numeric, errors="coerce")
    reject(
        table["image_id"][~one_hot.isin((0, 1)).all(axis=1) | (one_hot.sum(axis=1) != 1)],
        f"{truth.name} has a row that is not a single 1 and zeros, of image",
        "correct the row",
    )
    table["dx"] = one_hot.idxmax(axis=1).str.lower()
    groupings = _find_beside(folder, f"{part}_LesionGroupings.csv")
    if groupings is not None:
        lesions = read_table(groupings, required=("image", "lesion_id")).set_index("image")
        table["lesion_id"] = table["image_id"].map(lesions["lesion_id"])
        missing = table["image_id"][table["lesion_id"].isna()]
        reject(missing, f"{groupings.name} lacks the image", "use the whole file, or remove it")
    return table.assign(path=_find_images(table["image_id"], folder, truth))


def _find_beside(folder: Path, name: str) -> Path | None:
    places = (folder.parent, folder.parent / folder.name.replace("_Input", "_GroundTruth"))
    return next((place / name for place in places if (place / name).is_file()), None)


def _read_class_folders(top: _Folder) -> pd.DataFrame:
    classes = {name: next(_walk(Path(top.path, name))) for name in top.folders}
    if not any(folder.images for folder in classes.values()):
        raise UserError(f"{top.path} has none of the known layouts: {_LAYOUTS}; pass such a folder.")
    reject(
        [name for name, folder in classes.items() if folder.folders or not folder.images],
        f"in {top.path}, a class folder has no images or has subfolders",
        "move what is not a class elsewhere",
    )
    others = [f"{dx}/{name}" for dx, folder in classes.items() for name in folder.others]
    if others:
        listed = ", ".join(map(repr, others[:3])) + (", ..." if len(others) > 3 else "")
        _logger.warning("ignored %d files in %s that are not images: %s", len(others), top.path, listed)
    rows = [(f"{dx}/{image}", dx) for dx, folder in classes.items() for image in folder.images]
    table = pd.DataFrame(rows, columns=["path", "dx"], dtype="str")
    return table.assign(image_id=_name_images(table["path"]), path=f"{top.path}/" + table["path"])


def _read_path_table(file: Path) -> pd.DataFrame:
    table = read_table(file, required=("path", "dx"))
    if "image_id" not in table:
        table["image_id"] = _name_images(table["path"])
    table["path"] = [os.path.abspath(file.parent / path) for path in table["path"]]
    reject(
        table["path"][~table["path"].map(os.path.isfile)],
        f"{file.name} has a path that is not a file",
        f"correct it (relative paths start at {file.parent}) or remove the row",
    )
    return table


def _name_images(paths: Iterable[str]) -> list[str]:
    """Name each image by its file's stem or, where two stems are equal, all by their path without suffix."""
    stems = [PurePath(path).stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [os.path.splitext(path)[0] for path in paths]


def _find_images(image_ids: "pd.Series[str]", folder: Path, metadata: Path) -> "pd.Series[str]":
    """Find each image's file by its stem, in the folder or anywhere below it."""
    wanted = set(image_ids)
    found: dict[str, str] = {}
    repeated, unknown = [], []
    for place in _walk(folder):
        stems = [os.path.splitext(name)[0] for name in place.images]
        if wanted.isdisjoint(stems):
            continue  # lesion masks or another data set, not images of this table
        for stem, name in zip(stems, place.images, strict=True):
            path = os.path.join(place.path, name)
            if stem not in wanted:
                unknown.append(path)
            # Kaggle's download may have each part twice, as HAM10000_images_part_1 and ham10000_...
            elif found.setdefault(stem, path).lower() != path.lower():
                repeated.append(path)
    missing = [image_id for image_id in image_ids if image_id not in found]
    reject(missing, f"{folder} lacks the file of an image in {metadata.name}", "unpack all archives there")
    reject(repeated, f"{folder} has two files of one image, the second", "remove one of the two")
    reject(unknown, f"{metadata.name} has no row for the image", "add the row or move the file")
    return image_ids.map(found)


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and below it, sorted."""
    return sorted(Path(place.path, name) for place in _walk(folder) for name in place.images)


def _walk(folder: Path) -> Iterator[_Folder]:
    """Yield each folder from this one down, without hidden names and macOS's archive leftovers.

    Links are followed, but each real folder is visited once: a link may lead back to a folder above.
    """
    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(parent)) in visited:
            folders.clear()
            continue
        visited.add(real)
        shown = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        folders[:] = [name for name in shown if os.path.realpath(os.path.join(parent, name)) not in visited]
        names = sorted(name for name in files if not name.startswith("."))
        images = [name for name in names if os.path.splitext(name)[1].lower() in _IMAGE_SUFFIXES]
        reject(
            [os.path.join(parent, name) for name in (*folders, *images) if _NOT_UTF8.search(name)],
            "a path is not UTF-8",
            "rename it",
        )
        others = {name for name in set(names) - set(images) if os.path.isfile(os.path.join(parent, name))}
        yield _Folder(parent, list(folders), images, sorted(others))


def _raise(error: OSError) -> NoReturn:
    raise error
