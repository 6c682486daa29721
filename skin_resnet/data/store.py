"""The T of the ETL: images are decoded once into a uint8 array on disk, which every later run shares."""

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from skin_resnet.config import OnBadImage
from skin_resnet.data.decode import BadImageError, decode_image, open_image
from skin_resnet.data.folders import name_aside, remove_leftovers, write_aside
from skin_resnet.errors import UserError

# Source: torchvision's ImageNet weights, `torchvision.transforms._presets.ImageClassification`.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

AUTO_IMAGE_SIZE = 224
_STORE_VERSION = 1
_DECODED_AT_ONCE = 256  # bounds the memory: 40 MB at 224 px, 800 MB at 1024
_CHECKED_AT_ONCE = 1 << 24

ImageSize = int | Literal["auto"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStore:
    """The decoded pictures of a table, in its order and without the skipped ones.

    Attributes:
        pixels: uint8 (N, S, S, 3), mapped read-only from disk.
        image_ids: Whose picture each row is.
        image_size: S, in pixels.
        key: What the store was made from, hashed; the name of its folder.
        skipped: Why a picture was left out, by image id.
        build_s: What building cost this process; 0 for a store it found.
    """

    pixels: np.memmap[Any, np.dtype[np.uint8]] = field(repr=False)
    image_ids: tuple[str, ...] = field(repr=False)
    image_size: int
    key: str
    skipped: dict[str, str]
    build_s: float = 0.0

    def find_rows(self, image_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Give the row of each image, int64 (len(image_ids),).

        Raises:
            KeyError: An image is not in the store, as the skipped ones are not.
        """
        wanted = pd.Index(image_ids)
        rows: npt.NDArray[np.int64] = pd.Index(self.image_ids).get_indexer(wanted).astype(np.int64)
        if (missing := rows < 0).any():
            raise KeyError(f"{wanted[missing][0]} is not among the store's {len(self.image_ids)} images")
        return rows


def normalize(images: Tensor) -> Tensor:
    """Shift and scale float32 images (N, 3, H, W) in [0, 1] as the ImageNet weights expect, in one pass."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    # Non-blocking, or a GPU would finish all earlier work before these six numbers are copied.
    shift, scale = torch.stack((-mean / std, 1 / std)).view(2, 3, 1, 1).to(images.device, non_blocking=True)
    return torch.addcmul(shift, images, scale)


def open_store(
    table: pd.DataFrame, image_size: ImageSize, cache_dir: Path, on_bad_image: OnBadImage
) -> ImageStore:
    """Open the store of the table's pictures (columns image_id, path); where there is none, build it first.

    It lies in `cache_dir/stores/<key>/`. The key covers what is asked for and each file's image id, size and
    modification time, but not its folder. A build is written beside and renamed when whole, so processes may
    call this at once; a damaged store is built anew. `auto` is 224, or the shorter side of the smallest good
    picture where that is less.

    Raises:
        UserError: A picture is bad (on_bad_image=stop), all are, or `cache_dir` cannot be used.
    """
    with warnings.catch_warnings():
        # Pillow's, about pictures that `decode` refuses with their name, or reads as it documents.
        warnings.simplefilter("ignore")
        return _open_store(table, image_size, cache_dir, on_bad_image)


def _open_store(
    table: pd.DataFrame, image_size: ImageSize, cache_dir: Path, on_bad_image: OnBadImage
) -> ImageStore:
    key = _compute_key(table, image_size, on_bad_image)
    folder = cache_dir.expanduser() / "stores" / key
    try:
        remove_leftovers(folder.parent)
        if (found := _read_store(folder)) is not None:
            return found
        started = time.perf_counter()
        _logger.info("decoding %d images into %s", len(table), folder)
        with write_aside(folder) as unfinished:
            _build_store(unfinished, key, table, image_size, on_bad_image)
        build_s = time.perf_counter() - started
        _logger.info("decoded %d images in %.1f s", len(table), build_s)
        built = _read_store(folder)
    except OSError as error:
        problem = f"{error.strerror or error} at {error.filename or folder}"
    else:
        if built is not None:
            return replace(built, build_s=build_s)
        problem = f"what was written to {folder} reads back damaged"
    raise UserError(
        f"cache_dir must be a folder on a sound disk with room for the decoded images, but {problem}; "
        "make room or choose another cache_dir."
    )


def _compute_key(table: pd.DataFrame, image_size: ImageSize, on_bad_image: OnBadImage) -> str:
    digest = hashlib.sha256(json.dumps([_STORE_VERSION, image_size, on_bad_image]).encode())
    for image_id, path in zip(table["image_id"], table["path"], strict=True):
        try:
            status = os.stat(path)
            size, mtime_ns = status.st_size, status.st_mtime_ns
        except OSError:  # decoding will name the missing file; once it is back, the key is another
            size, mtime_ns = -1, -1
        digest.update(json.dumps([image_id, size, mtime_ns]).encode())
    return digest.hexdigest()[:32]


def _choose_image_size(paths: Sequence[str]) -> int:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return min(pool.map(_read_shorter_side, paths), default=AUTO_IMAGE_SIZE)


def _read_shorter_side(path: str) -> int:
    try:
        with open_image(Path(path)) as image:
            return min(*image.size, AUTO_IMAGE_SIZE)
    except BadImageError:  # no say in the size; decoding will name it
        return AUTO_IMAGE_SIZE


def _build_store(
    folder: Path, key: str, table: pd.DataFrame, image_size: ImageSize, on_bad_image: OnBadImage
) -> None:
    size = _choose_image_size(table["path"]) if image_size == "auto" else image_size
    skipped = _write_pixels(folder / "pixels.npy", table, size, on_bad_image)
    good = table[~table["image_id"].isin(list(skipped))]
    # A small picture with a good header and a broken body must not shrink all others.
    if skipped and image_size == "auto" and (larger := _choose_image_size(good["path"])) > size:
        size = larger
        skipped = _write_pixels(folder / "pixels.npy", table, size, on_bad_image)
    contents = {
        "version": _STORE_VERSION,
        "key": key,
        "image_size": size,
        "image_ids": [image_id for image_id in table["image_id"] if image_id not in skipped],
        "skipped": skipped,
    }
    checksum = _compute_checksum(folder, contents)
    with (folder / "store.json").open("w", encoding="utf-8") as file:
        json.dump(contents | {"checksum": checksum}, file)
        file.flush()
        os.fsync(file.fileno())


def _write_pixels(
    path: Path, table: pd.DataFrame, image_size: int, on_bad_image: OnBadImage
) -> dict[str, str]:
    """Decode the pictures, in order, into an .npy file; give by image id why a picture was left out."""
    image_ids, paths = list(table["image_id"]), list(table["path"])
    skipped: dict[str, str] = {}
    # Written, not mapped: on a full disk a write raises, where a map ends the process (SIGBUS).
    with path.open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_npy_header(file, len(paths), image_size)
        for start in range(0, len(paths), _DECODED_AT_ONCE):
            part = slice(start, start + _DECODED_AT_ONCE)
            decoded = pool.map(partial(_try_decode, image_size=image_size), paths[part])
            for image_id, image_path, result in zip(image_ids[part], paths[part], decoded, strict=True):
                if not isinstance(result, BadImageError):
                    file.write(result.data)
                elif on_bad_image == "skip":
                    skipped[image_id] = str(result)
                else:
                    raise UserError(
                        f"Every image must be readable, but {image_id} ({image_path}) is not: {result}; "
                        "repair or remove it, or pass on_bad_image=skip."
                    )
        if len(skipped) == len(paths):
            reason = next(iter(skipped.values()), "there is none")
            raise UserError(
                f"One image at least must be readable, but none of {len(paths)} is (the first: {reason}); "
                "check that the data was copied whole."
            )
        file.seek(0)
        _write_npy_header(file, len(paths) - len(skipped), image_size)
        file.flush()
        os.fsync(file.fileno())
    return skipped


def _write_npy_header(file: BinaryIO, rows: int, image_size: int) -> None:
    # numpy leaves room for the first axis to grow, so the final header is as long as the one it replaces.
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, image_size, image_size, 3)}
    np.lib.format.write_array_header_1_0(file, header)


def _try_decode(path: str, image_size: int) -> npt.NDArray[np.uint8] | BadImageError:
    try:
        return decode_image(Path(path), image_size)
    except BadImageError as error:
        return error


def _compute_checksum(folder: Path, contents: dict[str, Any]) -> int:
    """Compute the CRC-32 of the pixel file and of store.json: at 1 to 6 GB/s, each opening affords it."""
    checksum = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
    with (folder / "pixels.npy").open("rb") as file:
        while chunk := file.read(_CHECKED_AT_ONCE):
            checksum = zlib.crc32(chunk, checksum)
    return checksum


def _read_store(folder: Path) -> ImageStore | None:
    """Open the store in this folder; None where there is none, or a damaged one, which is removed."""
    if not folder.exists():
        return None
    try:
        contents = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        checksum = contents.pop("checksum")
        if contents["key"] != folder.name:
            raise ValueError("it is another one's copy")
        if checksum != _compute_checksum(folder, contents):
            raise ValueError("its checksum is wrong")
        return ImageStore(
            pixels=np.load(folder / "pixels.npy", mmap_mode="r"),
            image_ids=tuple(contents["image_ids"]),
            image_size=contents["image_size"],
            key=folder.name,
            skipped=contents["skipped"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _logger.warning("the store %s is damaged (%s) and built anew", folder, error)
        aside = name_aside(folder)
        with suppress(FileNotFoundError):  # another process was quicker
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
        return None
