"""A synthetic HAM10000 twin, drawn in seconds.

Same files, same columns, same imbalance, several photos of some lesions: what reads the one reads the other.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from skin_resnet.data.demo_photo import draw_photo
from skin_resnet.data.folders import remove_leftovers, write_aside
from skin_resnet.errors import UserError

# Counted up whenever other pictures come out, so that no cache holds old ones under the new name.
_VERSION = 1
_LESIONS = 350
# More than HAM10000's share of the rarest: a split by lesion needs some of each class in every part.
_FEWEST_LESIONS = 10
# How many photos the lesions have, in turn: a quarter has several, as in HAM10000 (26 %).
_PHOTOS = (1, 1, 1, 2, 1, 1, 1, 3)
_COLUMNS = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization")
_PLACES = (
    "back",
    "lower extremity",
    "trunk",
    "upper extremity",
    "abdomen",
    "face",
    "chest",
    "foot",
    "neck",
    "scalp",
)


@dataclass(frozen=True, kw_only=True)
class _Frequencies:
    """How often HAM10000 has a diagnosis, at what mean age in years, and how it was confirmed."""

    share: float
    age: int
    dx_types: dict[str, float]


_FREQUENCIES = {
    "akiec": _Frequencies(share=0.033, age=67, dx_types={"histo": 1}),
    "bcc": _Frequencies(share=0.051, age=67, dx_types={"histo": 1}),
    "bkl": _Frequencies(share=0.110, age=64, dx_types={"histo": 0.70, "consensus": 0.24, "confocal": 0.06}),
    "df": _Frequencies(share=0.011, age=53, dx_types={"histo": 0.48, "consensus": 0.52}),
    "mel": _Frequencies(share=0.111, age=61, dx_types={"histo": 1}),
    "nv": _Frequencies(share=0.670, age=46, dx_types={"histo": 0.37, "follow_up": 0.55, "consensus": 0.08}),
    "vasc": _Frequencies(share=0.014, age=51, dx_types={"histo": 0.47, "consensus": 0.53}),
}


def open_demo(cache_dir: Path) -> Path:
    """Give the folder of the demo data, drawn on the first call.

    It appears whole or not at all: several processes may ask for it at once, and any may be killed.

    Raises:
        UserError: The cache folder cannot be written.
    """
    folder = cache_dir / f"demo-{_VERSION}"
    if folder.is_dir():
        return folder
    try:
        remove_leftovers(cache_dir)
        with write_aside(folder) as unfinished:
            write_demo(unfinished)
    except OSError as error:
        raise UserError(
            f"cache_dir must be a folder with room for the demo data, but got {cache_dir} "
            f"({error.strerror or error}); make room or choose another cache_dir."
        ) from error
    return folder


def write_demo(folder: Path, seed: int = 0) -> None:
    """Write metadata and pictures as Kaggle lays HAM10000 out; the same seed gives the same bytes."""
    rng = np.random.default_rng(seed)
    lesions = list(_draw_lesions(rng))
    photos = [number for number in range(len(lesions)) for _ in range(_PHOTOS[number % len(_PHOTOS)])]
    # Neither a file's name nor its place may tell the diagnosis.
    rng.shuffle(photos)
    parts = [folder / f"HAM10000_images_part_{part}" for part in (1, 2)]
    for part in parts:
        part.mkdir(parents=True)
    with open(folder / "HAM10000_metadata.csv", "w", newline="", encoding="utf-8") as file:
        metadata = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        metadata.writeheader()
        for place, number in enumerate(photos):
            row = {**lesions[number], "image_id": f"DEMO_{place:07}"}
            metadata.writerow(row)
            pixels = draw_photo(row["dx"], np.random.default_rng((seed, number)), rng)
            part = parts[2 * place // len(photos)]
            # Halved chroma, PIL's default, would wash the colours out of structures a few pixels wide.
            Image.fromarray(pixels).save(part / f"{row['image_id']}.jpg", quality=92, subsampling=0)


def _draw_lesions(rng: np.random.Generator) -> Iterator[dict[str, str]]:
    """Draw what the metadata says of each lesion."""
    number = 0
    for dx, frequencies in _FREQUENCIES.items():
        for _ in range(max(_FEWEST_LESIONS, round(frequencies.share * _LESIONS))):
            age = 5 * round(rng.normal(frequencies.age, 15) / 5)
            yield {
                "lesion_id": f"LES_{number:07}",
                "dx": dx,
                "dx_type": str(rng.choice(list(frequencies.dx_types), p=list(frequencies.dx_types.values()))),
                "age": f"{min(max(age, 0), 85)}.0" if rng.random() > 0.02 else "",
                "sex": str(rng.choice(("male", "female"), p=(0.55, 0.45))),
                "localization": str(rng.choice(_PLACES)),
            }
            number += 1
