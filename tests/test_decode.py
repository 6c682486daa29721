"""Run with `python -m pytest tests/test_decode.py`."""

import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageFile
from torchvision.transforms import InterpolationMode, v2

from skin_resnet.data import decode as decode_module
from skin_resnet.data.decode import BadImageError, decode_image


def draw(width: int, height: int) -> Image.Image:
    """Draw an image in which every spot is different, smooth enough to survive JPEG."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = (x, y, np.abs(np.sin(9 * x * y)))
    return Image.fromarray(
        np.stack([np.rint(255 * channel).astype(np.uint8) for channel in channels], axis=-1)
    )


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> BytesIO:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    buffer.seek(0)
    return buffer


def decode(
    image: Image.Image, size: int = 32, file_format: str = "PNG", **options: Any
) -> npt.NDArray[np.uint8]:
    return decode_image(encode(image, file_format, **options), size)


@pytest.mark.parametrize("sides", [(60, 45), (45, 60), (61, 47), (33, 100), (32, 32), (20, 30), (101, 99)])
@pytest.mark.parametrize("size", [31, 32])
def test_pixels_equal_torchvisions_resize_and_center_crop(sides: tuple[int, int], size: int) -> None:
    image = draw(*sides)
    oracle = v2.Compose([v2.Resize(size, InterpolationMode.BILINEAR), v2.CenterCrop(size)])
    np.testing.assert_array_equal(decode(image, size), np.asarray(oracle(image)))


def test_a_file_and_its_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    path.write_bytes(encode(draw(60, 45), "JPEG").getvalue())
    with path.open("rb") as file:
        file.read()  # wherever the stream stands
        np.testing.assert_array_equal(decode_image(file, 32), decode_image(path, 32))


# What a camera must do to the upright image so that the EXIF orientation undoes it.
CAMERA_TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", CAMERA_TURNS)
def test_every_exif_orientation_gives_the_upright_image(orientation: int) -> None:
    upright, turn = draw(60, 45), CAMERA_TURNS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if turn is None else upright.transpose(turn)
    np.testing.assert_array_equal(decode(stored, exif=exif), decode(upright))


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_scaled_to_eight_bits(file_format: str) -> None:
    gray = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    pixels = decode(Image.fromarray(gray), file_format=file_format)
    expected = (gray.astype(np.float64) * 255 / 65535).round().astype(np.uint8)
    np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("P", "PNG"),
        ("P", "BMP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
    ],
)
def test_other_color_modes_become_rgb(mode: str, file_format: str) -> None:
    encoded = encode(draw(48, 48).convert(mode), file_format)
    oracle = np.asarray(Image.open(encoded).convert("RGB").resize((32, 32), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(encoded, 32), oracle)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "TIFF"])
def test_transparency_becomes_black(file_format: str) -> None:
    image = draw(32, 32).convert("RGBA")
    image.putalpha(
        Image.fromarray(
            np.repeat(np.array([[0], [255]], dtype=np.uint8), [16, 16], axis=0).repeat(32, axis=1)
        )
    )
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = decode(image, file_format=file_format, **options)
    assert not pixels[:16].any()
    np.testing.assert_array_equal(pixels[16:], np.asarray(draw(32, 32))[16:])


def test_a_palettes_transparent_color_becomes_black() -> None:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 250, 120, 60])
    assert (decode(image)[0, 0] == (250, 120, 60)).all()
    assert not decode(image, transparency=1).any()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP"])
def test_an_animation_gives_its_first_frame(file_format: str) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "green", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    pixels = decode(frames[0], file_format=file_format, save_all=True, append_images=frames[1:], **options)
    assert (pixels == (255, 0, 0)).all()


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_a_truncated_image_is_refused(file_format: str) -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    whole = encode(draw(60, 45), file_format).getvalue()
    for kept_fraction in (0.3, 0.6, 0.9):
        with pytest.raises(BadImageError):
            decode_image(BytesIO(whole[: int(kept_fraction * len(whole))]), 32)


@pytest.mark.parametrize("sides", [(1, 1), (15, 400), (400, 15)])
def test_a_side_under_16_px_is_refused(sides: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match=f"{sides[0]}x{sides[1]} has a side under 16 px"):
        decode(draw(*sides))


@pytest.mark.parametrize("side", [8_001, 10_000, 14_000])
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_over_64_megapixels_are_refused_from_the_header(side: int, action: Any) -> None:
    header = BytesIO(encode(Image.new("1", (side, side))).getvalue()[:64])
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(BadImageError, match="more than 64 megapixels"):
            decode_image(header, 32)


def test_an_image_that_resizing_would_blow_up_is_refused() -> None:
    with pytest.raises(BadImageError, match="16x100000 is too elongated for a shorter side of 224 px"):
        decode(Image.new("1", (16, 100_000)), 224)


def test_few_large_images_are_decoded_at_a_time_however_many_threads_there_are(monkeypatch) -> None:
    running, most = [], []

    def convert(image: Image.Image) -> Image.Image:
        running.append(image)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(image)
        return image

    monkeypatch.setattr(decode_module, "_convert_to_rgb", convert)
    with ThreadPoolExecutor(12) as pool:
        for limit, expected in ((399, 4), (400, 12)):
            monkeypatch.setattr(decode_module, "_LARGE_PIXELS", limit)
            most.clear()
            list(pool.map(lambda _: decode_image(encode(Image.new("RGB", (20, 20))), 16), range(24)))
            assert max(most) <= expected
    assert max(most) > 4, "small images do not wait"


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="does not exist"):
        decode_image(tmp_path / "none.jpg", 16)
