"""Decode an image file or its bytes to the pixels a network sees, in training as in the served model."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from os import SEEK_END
from pathlib import Path
from stat import S_ISREG
from threading import BoundedSemaphore
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from skin_resnet.errors import UserError

MIN_SIDE = 16
MAX_PIXELS = 64_000_000
# Decoding one of them may take 0.8 GB: at most four at a time, however many cores there are.
_LARGE_PIXELS, _LARGE = 8_000_000, BoundedSemaphore(4)

# What cameras and data sets use. Pillow has forty more, one of which starts Ghostscript: unsafe on a server.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class BadImageError(UserError):
    """An image that cannot be decoded. The message is the reason only; the caller adds which image it is."""


def decode_image(file: Path | BinaryIO, image_size: int) -> npt.NDArray[np.uint8]:
    """Decode to RGB, uint8 (S, S, 3): upright, shorter side resized to S = `image_size`, center cropped.

    Identical to torchvision's `Resize(S)` and `CenterCrop(S)` on the PIL image. An animation gives its
    first frame, transparency becomes black (as a dermoscope's corners are), 16-bit gray is scaled to 8 bits.

    Raises:
        BadImageError: Empty, not an image of a known format, truncated, too small, too large or elongated.
    """
    with open_image(file) as image:
        width, height = image.size
        # A harmless header can hide a bomb: 16 x 1,000,000 would be resized to 224 x 14,000,000.
        if image_size**2 * max(width, height) // min(width, height) > MAX_PIXELS:
            raise BadImageError(f"{width}x{height} is too elongated for a shorter side of {image_size} px")
        with _LARGE if width * height > _LARGE_PIXELS else nullcontext():
            ImageOps.exif_transpose(image, in_place=True)
            return np.array(_crop_square(_convert_to_rgb(image), image_size))


@contextmanager
def open_image(file: Path | BinaryIO) -> Iterator[Image.Image]:
    """Open an image and check its header, without decoding it yet.

    Raises:
        BadImageError: Not a regular file, a bad header, or whatever else Pillow finds while it is open.
    """
    too_large = f"it has more than {MAX_PIXELS // 1_000_000} megapixels"
    try:
        # Opening a named pipe would wait for its writer, perhaps for ever.
        if isinstance(file, Path) and not S_ISREG(file.stat().st_mode):
            raise BadImageError("it is not a regular file")
        with file.open("rb") if isinstance(file, Path) else nullcontext(file) as stream:
            if stream.seek(0, SEEK_END) == 0:
                raise BadImageError("the file is empty")
            stream.seek(0)
            with Image.open(stream, formats=_FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise BadImageError(too_large)
                if min(image.size) < MIN_SIDE:
                    raise BadImageError(f"{image.width}x{image.height} has a side under {MIN_SIDE} px")
                yield image
    except (BadImageError, MemoryError):
        raise
    except FileNotFoundError:
        raise BadImageError("the file does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImageError(too_large) from None
    except UnidentifiedImageError:
        raise BadImageError(f"it is not an image of a known format ({', '.join(_FORMATS)})") from None
    # For a broken file Pillow raises whatever its reader trips over: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise BadImageError(f"it cannot be read ({str(error) or type(error).__name__})") from error


def _convert_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadImageError("it has 32 bits per channel and no known white level; save it with 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips all above 255 to white
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), _convert(image, "RGBA"))
    return _convert(image, "RGB")


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)  # which would copy it


def _crop_square(image: Image.Image, size: int) -> Image.Image:
    shorter = min(image.size)
    width, height = (int(size * side / shorter) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))
