"""The image store: images are decoded once into a uint8 array on disk, which all later runs share."""

import contextlib
import functools
import hashlib
import json
import logging
import mmap
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from filelock import FileLock
from PIL import Image

from skin_resnet.config import OnBadImage
from skin_resnet.data.decode import BadImageError, decode_image, open_image
from skin_resnet.errors import UserError, expand_cache

AUTO_IMAGE_SIZE = 224
THUMBNAIL_SIDE = 16
_STORE_VERSION = 3
_DECODED_AT_ONCE = 256  # bounds the memory: 40 MB at 224 px, 800 MB at 1024

ImageSize = int | Literal["auto"]
Pixels = npt.NDArray[np.uint8]
_Content = TypeVar("_Content")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageStore:
    """The decoded images of a table, in its order and without the skipped ones."""

    pixels: Pixels = field(repr=False)  # (N, S, S, 3), mapped read-only from disk
    thumbnails: Pixels = field(repr=False)  # gray, (N, 16, 16)
    digests: tuple[str, ...] = field(repr=False)  # a hash of each image's pixels
    image_ids: tuple[str, ...] = field(repr=False)
    image_size: int  # S
    key: str  # a hash of what the store was made from; the name of its folder
    skipped: dict[str, str]  # why an image was left out, by image id

    def find_rows(self, image_ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """Return the row of each image, int64 (len(image_ids),).

        Raises:
            KeyError: An image is not in the store, as the skipped ones are not.
        """
        wanted = pd.Index(image_ids)
        rows: npt.NDArray[np.int64] = pd.Index(self.image_ids).get_indexer(wanted).astype(np.int64)
        if (missing := rows < 0).any():
            raise KeyError(f"{wanted[missing][0]} is not among the store's {len(self.image_ids)} images")
        return rows

    def read_ahead(self, rows: npt.NDArray[np.int64]) -> None:
        """Have the system read images from disk meanwhile: 3 to 5 times as fast as page by page later."""
        mapped: object = self.pixels.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_WILLNEED"):
            size, offset = self.pixels[0].nbytes, len(mapped) - self.pixels.nbytes
            for start in (offset + rows * size).tolist():
                page = start - start % mmap.PAGESIZE
                mapped.madvise(mmap.MADV_WILLNEED, page, start + size - page)


def open_store(
    table: pd.DataFrame, image_size: ImageSize, cache_dir: Path, on_bad_image: OnBadImage
) -> ImageStore:
    """Open the store of the table's images (columns image_id, path), and build it first if there is none.

    It is kept in `cache_dir/stores/<key>/`. The key covers what is asked for and each file's image id, size
    and modification time, but not its folder. Processes may call this at once; a damaged store is built
    again. `auto` is 224, or the shorter side of the smallest good image if that is less.

    Raises:
        UserError: An image is bad (on_bad_image=stop), all are, or `cache_dir` cannot be used.
    """
    folder = expand_cache(cache_dir) / "stores" / _compute_key(table, image_size, on_bad_image)

    def build(unfinished: Path) -> None:
        if folder.exists():
            _logger.warning("the image store %s is damaged; decoding the images again", folder)
        _logger.info("decoding %d images (once; later runs reuse them)", len(table))
        started_s = time.perf_counter()
        with warnings.catch_warnings():
            # Pillow's, about images that `decode` names when it rejects them, or reads as it documents.
            warnings.simplefilter("ignore")
            _build_store(unfinished, folder.name, table, image_size, on_bad_image)
        _logger.info("decoded %d images in %.1f s", len(table), time.perf_counter() - started_s)

    store = build_folder(folder, _read_store, build)
    with contextlib.suppress(OSError):  # the cache may be read-only
        # `clean` reads from it when the store was last used; many disks record no times of access.
        os.utime(folder / "store.json", ns=(time.time_ns(), os.stat(folder / "store.json").st_mtime_ns))
    return store


def build_folder(
    folder: Path, read: Callable[[Path], _Content | None], write: Callable[[Path], None]
) -> _Content:
    """Return what `read` finds in a folder of the cache; one process at a time builds it if that is None.

    `write` fills `<folder>.tmp`, which then takes the place of `folder`: what a killed process left there is
    overwritten, and the operating system releases its lock.

    Raises:
        UserError: The folder cannot be written.
    """
    try:
        if (found := read(folder)) is not None:
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if (found := read(folder)) is None:  # else another process has built it meanwhile
                unfinished = folder.with_name(f"{folder.name}.tmp")
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                try:
                    write(unfinished)
                    shutil.rmtree(folder, ignore_errors=True)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
                if (found := read(folder)) is None:
                    raise OSError("damaged right after it was written")
        return found
    except OSError as error:
        reason = f"{error.strerror or error} at {error.filename or folder}"
        raise UserError(f"cannot use cache_dir: {reason}; make room or choose another cache_dir.") from error


def fingerprint_images(table: pd.DataFrame, store: ImageStore) -> str:
    """Return 16 hex digits that change with any of the table's image ids, diagnoses and decoded pixels."""
    digests = [store.digests[row] for row in store.find_rows(tuple(table.image_id))]
    images = sorted(zip(table.image_id, table.dx.astype(str), digests, strict=True))
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]


def describe_image(pixels: Pixels) -> tuple[str, Pixels]:
    """Return the digest of an image's pixels (S, S, 3), and its thumbnail, gray (16, 16)."""
    small = Image.fromarray(pixels).convert("L")
    small = small.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    return hashlib.blake2b(pixels.tobytes(), digest_size=16).hexdigest(), np.array(small)


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
    except BadImageError:  # decoding will name it
        return AUTO_IMAGE_SIZE


def _build_store(
    folder: Path, key: str, table: pd.DataFrame, image_size: ImageSize, on_bad_image: OnBadImage
) -> None:
    size = _choose_image_size(table["path"]) if image_size == "auto" else image_size
    contents = _write_images(folder, table, size, on_bad_image)
    # A small image with a good header and a broken body must not shrink all others.
    if contents["skipped"] and image_size == "auto":
        good = table[~table["image_id"].isin(list(contents["skipped"]))]
        if (larger := _choose_image_size(good["path"])) > size:
            contents = _write_images(folder, table, larger, on_bad_image)
    contents["key"] = key
    pixels, thumbnails = _open_arrays(folder)
    contents["checksum"] = _compute_checksum(contents, pixels, thumbnails)
    with (folder / "store.json").open("w", encoding="utf-8") as file:
        json.dump(contents, file)
        file.flush()
        os.fsync(file.fileno())


def _write_images(
    folder: Path, table: pd.DataFrame, image_size: int, on_bad_image: OnBadImage
) -> dict[str, Any]:
    """Decode the images, in order, into .npy files; return what store.json says of them."""
    image_ids, paths = list(table["image_id"]), list(table["path"])
    skipped: dict[str, str] = {}
    digests, thumbnails = [], []

    def decode(path: str) -> tuple[Pixels, str, Pixels] | BadImageError:
        try:
            pixels = decode_image(Path(path), image_size)
        except BadImageError as error:
            return error
        return pixels, *describe_image(pixels)

    # Written, not mapped: on a full disk a write raises, where a map ends the process (SIGBUS).
    with (folder / "pixels.npy").open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        _write_npy_header(file, len(paths), image_size)
        for start in range(0, len(paths), _DECODED_AT_ONCE):
            block = slice(start, start + _DECODED_AT_ONCE)
            decoded = pool.map(decode, paths[block])
            for image_id, path, result in zip(image_ids[block], paths[block], decoded, strict=True):
                if isinstance(result, BadImageError):
                    if on_bad_image == "stop":
                        raise UserError(
                            f"cannot read image {image_id} ({path}): {result}; repair or remove it, or pass "
                            "on_bad_image=skip."
                        )
                    skipped[image_id] = str(result)
                    continue
                pixels, digest, thumbnail = result
                file.write(pixels.data)
                digests.append(digest)
                thumbnails.append(thumbnail)
        if not digests:
            reason = next(iter(skipped.values()), "there is none")
            raise UserError(
                f"none of {len(paths)} images can be read (the first: {reason}); check that the data was "
                "copied completely."
            )
        file.seek(0)
        _write_npy_header(file, len(digests), image_size)
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "thumbnails.npy", np.stack(thumbnails))
    good = [image_id for image_id in image_ids if image_id not in skipped]
    return {"image_size": image_size, "image_ids": good, "skipped": skipped, "digests": digests}


def _write_npy_header(file: BinaryIO, rows: int, image_size: int) -> None:
    # numpy leaves room for the first axis to grow, so the final header is as long as the one it replaces.
    header = {"descr": "|u1", "fortran_order": False, "shape": (rows, image_size, image_size, 3)}
    np.lib.format.write_array_header_1_0(file, header)


def _open_arrays(folder: Path) -> tuple[Pixels, Pixels]:
    return np.load(folder / "pixels.npy", mmap_mode="r"), np.load(folder / "thumbnails.npy")


def _compute_checksum(contents: dict[str, Any], pixels: Pixels, thumbnails: Pixels) -> int:
    """Compute the CRC-32 of store.json and the arrays, at 1 to 6 GB/s."""
    checksum = zlib.crc32(json.dumps(contents, sort_keys=True).encode())
    for array in (thumbnails, pixels):
        checksum = zlib.crc32(array.data, checksum)
    return checksum


def _read_store(folder: Path) -> ImageStore | None:
    """Open the store in this folder; None if there is none, or a damaged one."""
    try:
        files = [os.stat(folder / name) for name in ("store.json", "thumbnails.npy", "pixels.npy")]
        return _read_checked(folder, tuple((file.st_ino, file.st_size, file.st_mtime_ns) for file in files))
    except Exception:  # for a damaged file, numpy and json raise whatever they trip over
        return None


# With the files' inodes, sizes and times, a process checks only what was written since it last looked.
@functools.lru_cache(maxsize=8)
def _read_checked(folder: Path, stamps: tuple[tuple[int, int, int], ...]) -> ImageStore:
    contents: dict[str, Any] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    checksum = contents.pop("checksum")
    pixels, thumbnails = _open_arrays(folder)
    if contents["key"] != folder.name or checksum != _compute_checksum(contents, pixels, thumbnails):
        raise ValueError(f"{folder} is damaged")
    return ImageStore(
        **{**contents, "digests": tuple(contents["digests"]), "image_ids": tuple(contents["image_ids"])},
        pixels=pixels,
        thumbnails=thumbnails,
    )
