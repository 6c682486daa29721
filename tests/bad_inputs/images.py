"""Images: those that are refused, and those that are read as `skin_resnet.data.decode` documents."""

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.bad_inputs import BadInput, Options
from tests.bad_inputs.tables import SIZE, draw, format_table, write_images

Content = Image.Image | bytes


def with_image(
    make_image: Callable[[], Content], name: str = "photo_11.png", **save: object
) -> Callable[[Path], Options]:
    """Put another image, or bytes, in the place of the last one."""

    def make(folder: Path) -> Options:
        rows = write_images(folder)
        (folder / "photo_11.png").unlink()
        rows[-1]["path"] = name
        image = make_image()
        (folder / name).write_bytes(image if isinstance(image, bytes) else encode(image, name, **save))
        (folder / "list.csv").write_text(format_table(rows))
        return {"data": str(folder / "list.csv")}

    return make


def encode(image: Image.Image, name: str, **save: object) -> bytes:
    file = io.BytesIO()
    image.save(file, Image.registered_extensions()[Path(name).suffix], **save)
    return file.getvalue()


def cut(image: Image.Image, name: str) -> bytes:
    whole = encode(image, name)
    return whole[: len(whole) // 2]


def build_png(width: int, height: int, data: bytes) -> bytes:
    """A PNG of one bit a pixel, whatever its header says."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", data),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def flip_bits() -> bytes:
    whole = bytearray(encode(draw(11), "x.png"))
    whole[len(whole) // 2] ^= 0xFF
    return bytes(whole)


def with_class_folders(put: Callable[[Path], object]) -> Callable[[Path], Options]:
    """Write a folder per class, and put something that is not a file among the images."""

    def make(folder: Path) -> Options:
        for number in range(8):
            dx = ("mole", "wart")[number % 2]
            (folder / "data" / dx).mkdir(parents=True, exist_ok=True)
            draw(number).save(folder / "data" / dx / f"{dx}_{number}.png")
        put(folder / "data" / "mole" / "photo_11.png")
        return {"data": str(folder / "data")}

    return make


def with_long_and_thin(folder: Path) -> Options:
    options = with_image(lambda: build_png(16, 3_000_000, b""))(folder)
    return {**options, "image_size": "32"}  # auto would be 16 px, for which it is not too long


def with_nothing_readable(folder: Path) -> Options:
    rows = write_images(folder)
    for row in rows:
        (folder / row["path"]).write_bytes(b"")
    (folder / "list.csv").write_text(format_table(rows))
    return {"data": str(folder / "list.csv"), "on_bad_image": "skip"}


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n"

# The first message of `told` names the image, the second the reason, which is also what a skip lists.
BAD_IMAGES = [
    BadInput(name=name, make=make, told=("cannot read image photo_11", reason), command="audit")
    for name, make, reason in [
        ("zero bytes", with_image(lambda: b""), "the file is empty"),
        ("one byte", with_image(lambda: b"\xff", "photo_11.jpg"), "not an image of a known format"),
        ("JPEG cut off", with_image(lambda: cut(draw(11), "x.jpg"), "photo_11.jpg"), "cannot be read"),
        ("PNG cut off", with_image(lambda: cut(draw(11), "x.png")), "cannot be read"),
        ("WebP cut off", with_image(lambda: cut(draw(11), "x.webp"), "photo_11.webp"), "cannot be read"),
        ("TIFF cut off", with_image(lambda: cut(draw(11), "x.tif"), "photo_11.tif"), "cannot be read"),
        ("PNG with flipped bits", with_image(flip_bits), "cannot be read"),
        (
            "text named jpg",
            with_image(lambda: b"<html>404</html>", "photo_11.jpg"),
            "not an image of a known",
        ),
        ("PostScript", with_image(lambda: EPS, "photo_11.jpg"), "not an image of a known format"),
        ("100 megapixels", with_image(lambda: build_png(10_000, 10_000, b"")), "more than 64 megapixels"),
        ("400 megapixels", with_image(lambda: build_png(20_000, 20_000, b"")), "more than 64 megapixels"),
        ("broken EXIF", with_image(lambda: draw(11), exif=b"Exif\0\0II*\0\xff"), "cannot be read"),
        ("1 px", with_image(lambda: Image.new("RGB", (1, 1))), "1x1 has a side under 16 px"),
        ("0 px", with_image(lambda: build_png(0, 0, b"")), "photo_11"),
        (
            "32 bits a pixel",
            with_image(lambda: Image.new("F", (SIZE, SIZE)), "photo_11.tif"),
            "32 bits per",
        ),
        ("link to nowhere", with_class_folders(lambda path: path.symlink_to("gone.png")), "does not exist"),
        ("named pipe", with_class_folders(os.mkfifo), "not a regular file"),
    ]
]

STOPPING = [
    BadInput(name="nothing readable", make=with_nothing_readable, told=("none of 12",)),
    BadInput(name="long and thin", make=with_long_and_thin, told=("photo_11", "16x3000000 is too elongated")),
]
