"""A synthetic data set in the format of HAM10000, drawn in seconds.

Files, columns, class imbalance and images per lesion are those of HAM10000: what reads one reads the other.
The seven diagnoses differ by color, size, border, symmetry and blotches. A network with random weights learns
most of them within minutes, but not all: many melanomas look like nevi, and some nevi like melanomas.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from skin_resnet.data.store import build_folder

# To be increased whenever the images change, so that no cache has old ones under the new name.
_VERSION = 3
_LESIONS = 350
# More than HAM10000's share of the rarest class: a split by lesion needs some of each class in every split.
_FEWEST_LESIONS = 10
# Images per lesion, in turn: a quarter of the lesions has several, as in HAM10000 (26 %).
_IMAGES_PER_LESION = (1, 1, 1, 2, 1, 1, 1, 3)
_PLACES = ("back", "lower extremity", "trunk", "upper extremity", "abdomen", "face", "chest", "foot", "scalp")
_WIDTH, _HEIGHT = 96, 72
_SKIN_COLORS = ((244, 212, 194), (228, 172, 154), (216, 174, 178), (238, 194, 166), (198, 152, 126))
_HAIR_COLOR = (62, 46, 42)

_Array = npt.NDArray[np.floating]
_Color = tuple[int, int, int]


class _Look(NamedTuple):
    """A diagnosis: its share of HAM10000, the patients' mean age in years, and what its lesions look like."""

    share: float
    age: int
    bright: _Color
    dark: _Color
    radius: float  # in half image heights
    raggedness: float  # of the border, in radii
    softness: float  # of the border, in radii


_LOOKS = {
    "akiec": _Look(0.033, 67, (220, 128, 116), (196, 112, 92), 0.72, 0.18, 0.22),
    "bcc": _Look(0.051, 67, (226, 162, 154), (206, 140, 142), 0.65, 0.14, 0.18),
    "bkl": _Look(0.110, 64, (188, 130, 94), (122, 82, 64), 0.65, 0.13, 0.08),
    "df": _Look(0.011, 53, (204, 136, 112), (178, 110, 94), 0.58, 0.06, 0.28),
    "mel": _Look(0.111, 61, (158, 102, 74), (68, 42, 38), 0.66, 0.15, 0.11),
    "nv": _Look(0.670, 46, (194, 126, 90), (96, 58, 44), 0.56, 0.10, 0.16),
    "vasc": _Look(0.014, 51, (204, 62, 82), (136, 38, 72), 0.45, 0.07, 0.07),
}
# Patches inside a lesion: their color, about how many are across it, and which fraction of lesions has them.
_BLOTCHES: dict[str, list[tuple[_Color, float, float]]] = {
    "akiec": [((176, 60, 60), 9, 0.8), ((250, 236, 206), 9, 0.8)],
    "bcc": [((92, 88, 112), 4, 0.8), ((180, 40, 56), 7, 0.7)],
    "bkl": [((92, 62, 46), 8, 0.5), ((242, 228, 200), 10, 0.65)],
    "df": [((250, 230, 224), 2, 1)],
    "mel": [((32, 24, 26), 5, 0.6), ((132, 138, 164), 3, 0.5), ((170, 78, 74), 4, 0.3)],
    "nv": [((70, 42, 34), 11, 0.5), ((44, 30, 30), 4, 0.15), ((198, 122, 108), 4, 0.15)],
    "vasc": [((98, 14, 48), 6, 1), ((216, 190, 206), 4, 0.4)],
}


def open_demo(cache_dir: Path) -> Path:
    """Return the folder of the demo data, which is drawn on the first call.

    Raises:
        UserError: The cache folder cannot be written.
    """
    return build_folder(
        cache_dir / f"demo-{_VERSION}", lambda folder: folder if folder.is_dir() else None, write_demo
    )


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write metadata and images in Kaggle's layout of HAM10000; the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    lesions = _draw_lesions(rng)
    counts = np.resize(_IMAGES_PER_LESION, len(lesions))
    # Neither a file's name nor its place may reveal the diagnosis.
    order = rng.permutation(np.repeat(lesions.index, counts))
    table = lesions.loc[order].assign(image_id=[f"DEMO_{number:07}" for number in range(len(order))])
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "HAM10000_metadata.csv", index=False)
    for part, rows in enumerate(np.array_split(np.arange(len(order)), 2), 1):
        images = folder / f"HAM10000_images_part_{part}"
        images.mkdir()
        for row in table.iloc[rows].itertuples():
            pixels = draw_image(str(row.dx), np.random.default_rng((seed, int(row.Index))), rng)
            # Halved chroma, PIL's default, would wash out the colors of structures a few pixels wide.
            Image.fromarray(pixels).save(images / f"{row.image_id}.jpg", quality=92, subsampling=0)


def _draw_lesions(rng: np.random.Generator) -> pd.DataFrame:
    """Draw the metadata of each lesion."""
    counts = [max(_FEWEST_LESIONS, round(look.share * _LESIONS)) for look in _LOOKS.values()]
    ages = np.repeat([look.age for look in _LOOKS.values()], counts)
    size = len(ages)
    drawn_ages = (5 * (rng.normal(ages, 15) / 5).round()).clip(0, 85)
    return pd.DataFrame(
        {
            "lesion_id": [f"LES_{number:07}" for number in range(size)],
            "dx": np.repeat(list(_LOOKS), counts),
            "dx_type": "histo",
            "age": np.where(rng.random(size) < 0.02, np.nan, drawn_ages),
            "sex": rng.choice(("male", "female"), size, p=(0.55, 0.45)),
            "localization": rng.choice(_PLACES, size),
        }
    )


def draw_image(dx: str, lesion_rng: np.random.Generator, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw an image, uint8 (72, 96, 3).

    `lesion_rng`, in the same state for all images of a lesion, decides what is on the patient; `rng` decides
    how it is photographed. What is on the patient is a function of coordinates (u, v) fixed to the lesion.
    """
    y, x = np.mgrid[-1 : 1 : _HEIGHT * 1j, -4 / 3 : 4 / 3 : _WIDTH * 1j].astype(np.float32)
    u, v = _turn(x - rng.normal(0, 0.08), y - rng.normal(0, 0.08), rng.uniform(0, 2 * np.pi))
    zoom = rng.uniform(0.85, 1.15)
    u, v = u / zoom, v / zoom
    skin = lesion_rng.dirichlet((0.6,) * len(_SKIN_COLORS)) @ np.array(_SKIN_COLORS)
    image: _Array = ((1 + 0.02 * _draw_waves(lesion_rng, u, v, 4))[..., None] * skin).astype(np.float32)
    _paint_lesion(image, dx, lesion_rng, u, v)
    for _ in range(lesion_rng.choice((0, 0, 0, 0, 2, 4))):  # hairs: parabolas across the image
        along, across = _turn(u, v, lesion_rng.uniform(0, 2 * np.pi))
        gap = across - lesion_rng.uniform(-1, 1) - lesion_rng.normal(0, 0.15) * along**2
        _blend(image, _HAIR_COLOR, 0.6 * np.exp(-((gap / 0.016) ** 2)))
    slope, _ = _turn(x, y, rng.uniform(0, 2 * np.pi))
    light = rng.normal(1, 0.04) + 0.08 * slope - rng.uniform(0.05, 0.17) * (x**2 + y**2)
    image *= light[..., None] * rng.normal(1, 0.02, 3)
    noisy: npt.NDArray[np.uint8] = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
    return noisy


def _paint_lesion(image: _Array, dx: str, rng: np.random.Generator, u: _Array, v: _Array) -> None:
    """Paint a lesion with its blotches, in coordinates scaled to a radius of about 1."""
    look = _LOOKS[dx]
    size, stretch = look.radius * rng.uniform(0.75, 1.2), rng.uniform(1, 1.2)
    u, v = u / size / stretch, v / size * stretch
    radius = np.hypot(u, v)
    jag = 0.85 * _draw_waves(rng, u, v, 3.5) + 0.5 * _draw_waves(rng, u, v, 9)
    border = radius + look.raggedness * rng.uniform(0.5, 1.5) * jag
    inside = 1 - _rise(border, 1, look.softness * rng.uniform(0.8, 1.6))
    bright, dark = np.array((look.bright, look.dark)) * rng.uniform(0.8, 1.2) + rng.normal(0, 6, 3)
    depth = rng.uniform(0.3, 0.9) + 0.25 * _draw_waves(rng, u, v, 2.5) - 0.15 * radius
    depth = np.clip(depth, 0, 1)[..., None]
    _blend(image, dark * depth + bright * (1 - depth), rng.uniform(0.8, 0.95) * inside)
    for color, frequency, fraction in _BLOTCHES[dx]:
        where = _rise(_draw_waves(rng, u, v, frequency), 0.7, 0.5)
        opacity = rng.uniform(0.45, 0.85) * (rng.random() < fraction)
        _blend(image, color, opacity * inside * where)


def _turn(x: _Array, y: _Array, angle: float) -> tuple[_Array, _Array]:
    """Return the coordinates in a frame turned by `angle`, in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _rise(values: _Array, edge: float, softness: float) -> _Array:
    """Rise smoothly from 0 below the edge to 1 above it."""
    height: _Array = np.tanh((values - edge) / softness)
    return 0.5 + 0.5 * height


def _blend(image: _Array, color: npt.ArrayLike, opacity: _Array) -> None:
    """Paint a color, one for all pixels or one for each, over the image."""
    image += (np.asarray(color, np.float32) - image) * opacity[..., None]


def _draw_waves(rng: np.random.Generator, u: _Array, v: _Array, frequency: float) -> _Array:
    """Draw smooth noise of mean 0 and variance 1: plane waves of about this frequency, in all directions."""
    angle, phase, stretch = rng.uniform(size=(3, 10)).astype(np.float32)
    angle, frequencies = 2 * np.pi * angle, frequency * (0.5 + stretch)
    # One matrix product for all waves: four times as fast as broadcasting, and this takes most of the time.
    weights = (frequencies * np.cos(angle), frequencies * np.sin(angle), 2 * np.pi * phase)
    waves: _Array = np.sin(np.tensordot(weights, (u, v, np.ones_like(u)), (0, 0))).sum(0)
    return waves * math.sqrt(2 / len(phase))
