"""The pictures of the demo data: dermoscopy of seven made-up diagnoses, painted as a stack of layers.

Skin, lesion, the structures a dermatoscope shows in it, hairs, light, noise. Everything on the patient is a
function of coordinates fixed to the lesion, so that all photos show the same lesion however they are framed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

_WIDTH, _HEIGHT = 96, 72
_SKIN_TONES = ((244, 212, 194), (228, 172, 154), (216, 174, 178), (238, 194, 166), (198, 152, 126))
_HAIR = (62, 46, 42)

_Array = npt.NDArray[np.floating]
_Colour = tuple[int, int, int]
_Pattern = Callable[[np.random.Generator, _Array, _Array], _Array]


@dataclass(frozen=True, kw_only=True)
class _Structure:
    """A pattern inside a lesion, its colour, and the share of the diagnosis's lesions that have it."""

    pattern: _Pattern
    colour: _Colour
    opacity: float = 0.75
    chance: float = 1


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What lesions of a diagnosis share: size in half picture heights, raggedness and softness in radii."""

    colours: tuple[_Colour, _Colour]
    size: float
    raggedness: float
    softness: float
    structures: tuple[_Structure, ...]


def draw_photo(dx: str, lesion_rng: np.random.Generator, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Draw a photo, uint8 (72, 96, 3).

    `lesion_rng`, in the same state for all photos of a lesion, decides what is on the patient; `rng` decides
    how it is photographed.
    """
    y, x = np.mgrid[-1 : 1 : _HEIGHT * 1j, -4 / 3 : 4 / 3 : _WIDTH * 1j].astype(np.float32)
    u, v = _turn(x - rng.normal(0, 0.08), y - rng.normal(0, 0.08), rng.uniform(0, 2 * np.pi))
    zoom = rng.uniform(0.85, 1.15)
    u, v = u / zoom, v / zoom
    image = _draw_skin(lesion_rng, u, v)
    _paint_lesion(image, _LOOKS[dx], lesion_rng, u, v)
    _paint_hairs(image, lesion_rng, u, v)
    slope, _ = _turn(x, y, rng.uniform(0, 2 * np.pi))
    light = rng.normal(1, 0.04) + 0.08 * slope - rng.uniform(0.05, 0.17) * (x**2 + y**2)
    if rng.random() < 0.2:
        # Some dermatoscopes show the rim of their lens.
        light *= 1 - _rise(np.hypot(x, y), 1.35, 0.04)
    image *= light[..., None] * rng.normal(1, 0.02, 3)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def _turn(x: _Array, y: _Array, angle: float) -> tuple[_Array, _Array]:
    """Give the coordinates in a frame turned by `angle`, in radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return cos * x - sin * y, sin * x + cos * y


def _rise(values: _Array, edge: float, softness: float) -> _Array:
    """Rise smoothly from 0 below the edge to 1 above it."""
    height: _Array = np.tanh((values - edge) / softness)
    return 0.5 + 0.5 * height


def _blend(image: _Array, colour: npt.ArrayLike, opacity: _Array) -> None:
    """Paint a colour, one for all or one a pixel, over the image."""
    image += (np.asarray(colour, np.float32) - image) * opacity[..., None]


def _draw_skin(rng: np.random.Generator, u: _Array, v: _Array) -> _Array:
    """Draw skin float32 (H, W, 3), 0 to 255, of the patient's tone, finely lined and blotched with pink."""
    tone = rng.dirichlet((0.6,) * len(_SKIN_TONES)) @ np.array(_SKIN_TONES)
    texture = 1 + 0.02 * _draw_waves(rng, u, v, 4) + 0.015 * _draw_waves(rng, u, v, 22)
    image: _Array = (texture[..., None] * tone).astype(np.float32)
    _blend(image, tone * (0.94, 0.78, 0.76), 0.4 * _draw_patches(rng, u, v, frequency=3, edge=1))
    return image


def _paint_lesion(image: _Array, look: _Look, rng: np.random.Generator, u: _Array, v: _Array) -> None:
    """Paint a lesion with its structures, in a frame scaled to a radius of about 1."""
    size, stretch = look.size * rng.uniform(0.75, 1.2), rng.uniform(1, 1.2)
    u, v = u / size / stretch, v / size * stretch
    radius = np.hypot(u, v)
    jag = 0.85 * _draw_waves(rng, u, v, 3.5) + 0.5 * _draw_waves(rng, u, v, 9)
    border = radius + look.raggedness * rng.uniform(0.5, 1.5) * jag
    inside = 1 - _rise(border, 1, look.softness * rng.uniform(0.8, 1.6))
    bright, dark = np.array(look.colours) * rng.uniform(0.8, 1.2) + rng.normal(0, 6, 3)
    depth = rng.uniform(0.3, 0.9) + 0.25 * _draw_waves(rng, u, v, 2.5) + 0.08 * _draw_waves(rng, u, v, 14)
    depth = np.clip(depth - 0.15 * radius, 0, 1)[..., None]
    _blend(image, dark * depth + bright * (1 - depth), rng.uniform(0.8, 0.95) * inside)
    for structure in look.structures:
        opacity = structure.opacity * rng.uniform(0.6, 1.1) * (rng.random() < structure.chance)
        _blend(image, structure.colour, opacity * inside * structure.pattern(rng, u, v))


def _paint_hairs(image: _Array, rng: np.random.Generator, u: _Array, v: _Array) -> None:
    """Paint hairs on a third of the patients, each a parabola across the picture."""
    for _ in range(rng.choice((0, 0, 0, 0, 2, 4))):
        along, across = _turn(u, v, rng.uniform(0, 2 * np.pi))
        gap = across - rng.uniform(-1, 1) - rng.normal(0, 0.15) * along**2
        _blend(image, _HAIR, rng.uniform(0.4, 0.8) * np.exp(-((gap / rng.uniform(0.012, 0.022)) ** 2)))


def _draw_waves(rng: np.random.Generator, u: _Array, v: _Array, frequency: float) -> _Array:
    """Draw smooth noise of mean 0 and variance 1: plane waves of about this frequency, in all directions."""
    angle, phase, stretch = rng.uniform(size=(3, 10)).astype(np.float32)
    angle, frequencies = 2 * np.pi * angle, frequency * (0.5 + stretch)
    # One matrix product for all waves: four times as fast as broadcasting, and this is where the time goes.
    weights = (frequencies * np.cos(angle), frequencies * np.sin(angle), 2 * np.pi * phase)
    waves: _Array = np.sin(np.tensordot(weights, (u, v, np.ones_like(u)), (0, 0))).sum(0)
    return waves * math.sqrt(2 / len(phase))


def _draw_patches(rng: np.random.Generator, u: _Array, v: _Array, *, frequency: float, edge: float) -> _Array:
    """Draw blotches: where smooth noise is above the edge."""
    return _rise(_draw_waves(rng, u, v, frequency), edge, 0.5)


def _draw_lines(rng: np.random.Generator, u: _Array, v: _Array, *, frequency: float, width: float) -> _Array:
    """Draw winding, branching lines: the zero level of smooth noise, fading in and out with another."""
    line: _Array = np.exp(-((_draw_waves(rng, u, v, frequency) / width) ** 2))
    return line * _rise(_draw_waves(rng, u, v, frequency / 2), -0.2, 0.6)


def _draw_network(rng: np.random.Generator, u: _Array, v: _Array, *, frequency: float) -> _Array:
    """Draw a bent honeycomb that fades in places: the pigment network."""
    bend = 0.08 * _draw_waves(rng, u, v, 4)
    start = rng.uniform(0, np.pi)
    cells = np.zeros_like(u)
    for direction in start + np.array((0, np.pi / 3, 2 * np.pi / 3)):
        along, _ = _turn(u + bend, v - bend, direction)
        cells += np.cos(frequency * along)
    return _rise(-cells, 0.3, 0.7) * _rise(_draw_waves(rng, u, v, 3), -0.8, 0.8)


def _draw_spots(rng: np.random.Generator, u: _Array, v: _Array, *, count: int, radius: float) -> _Array:
    """Draw round spots of differing sizes, scattered over the lesion."""
    distance, angle, size = rng.uniform(size=(3, count, 1, 1)).astype(np.float32)
    distance, angle = 0.85 * distance**0.5, 2 * np.pi * angle
    gap = np.hypot(u - distance * np.cos(angle), v - distance * np.sin(angle)) / (radius * (0.5 + size))
    return 1 - _rise(gap.min(0), 1, 0.35)


def _draw_centre(rng: np.random.Generator, u: _Array, v: _Array, *, radius: float) -> _Array:
    """Draw one soft patch near the middle."""
    patch: _Array = np.exp(-((u - rng.normal(0, 0.1)) ** 2 + (v - rng.normal(0, 0.1)) ** 2) / radius**2)
    return patch


# The structures are those that dermatologists go by (Kittler et al., J Am Acad Dermatol 74:1093, 2016). How
# often and how strongly they show is set so that a ResNet-50 learns most from nothing within minutes, but not
# all: some melanomas lack every sign, some nevi are blotched.
_LOOKS = {
    "akiec": _Look(  # scales on a red network
        colours=((220, 128, 116), (196, 112, 92)),
        size=0.72,
        raggedness=0.18,
        softness=0.22,
        structures=(
            _Structure(
                pattern=partial(_draw_lines, frequency=9, width=0.35), colour=(176, 60, 60), chance=0.7
            ),
            _Structure(
                pattern=partial(_draw_patches, frequency=9, edge=0.9), colour=(250, 236, 206), chance=0.7
            ),
            _Structure(pattern=partial(_draw_spots, count=8, radius=0.07), colour=(120, 62, 48), chance=0.3),
        ),
    ),
    "bcc": _Look(  # tree-like vessels and blue-grey nests on pearly ground
        colours=((226, 162, 154), (206, 140, 142)),
        size=0.65,
        raggedness=0.14,
        softness=0.18,
        structures=(
            _Structure(pattern=partial(_draw_spots, count=5, radius=0.2), colour=(92, 88, 112), chance=0.6),
            _Structure(
                pattern=partial(_draw_lines, frequency=6, width=0.2), colour=(180, 40, 56), chance=0.7
            ),
            _Structure(pattern=partial(_draw_spots, count=2, radius=0.14), colour=(112, 34, 34), chance=0.3),
        ),
    ),
    "bkl": _Look(  # sharp border, furrows, milky cysts
        colours=((188, 130, 94), (122, 82, 64)),
        size=0.65,
        raggedness=0.13,
        softness=0.08,
        structures=(
            _Structure(
                pattern=partial(_draw_lines, frequency=8, width=0.3), colour=(92, 62, 46), chance=0.55
            ),
            _Structure(
                pattern=partial(_draw_spots, count=12, radius=0.08), colour=(242, 228, 200), chance=0.55
            ),
        ),
    ),
    "df": _Look(  # a white scar within a fine network
        colours=((204, 136, 112), (178, 110, 94)),
        size=0.58,
        raggedness=0.06,
        softness=0.28,
        structures=(
            _Structure(
                pattern=partial(_draw_network, frequency=22), colour=(136, 84, 66), opacity=0.6, chance=0.8
            ),
            _Structure(
                pattern=partial(_draw_centre, radius=0.5), colour=(250, 230, 224), opacity=0.8, chance=0.85
            ),
        ),
    ),
    "mel": _Look(  # several colours, ragged, black blotches under a blue-white veil
        colours=((158, 102, 74), (68, 42, 38)),
        size=0.66,
        raggedness=0.14,
        softness=0.11,
        structures=(
            _Structure(
                pattern=partial(_draw_network, frequency=18), colour=(44, 28, 26), opacity=0.6, chance=0.6
            ),
            _Structure(
                pattern=partial(_draw_patches, frequency=5, edge=0.6), colour=(32, 24, 26), chance=0.5
            ),
            _Structure(pattern=partial(_draw_patches, frequency=4, edge=1), colour=(170, 78, 74), chance=0.3),
            _Structure(
                pattern=partial(_draw_patches, frequency=3, edge=0.7), colour=(132, 138, 164), chance=0.45
            ),
        ),
    ),
    "nv": _Look(  # round, brown, an even network or globules
        colours=((194, 126, 90), (96, 58, 44)),
        size=0.56,
        raggedness=0.1,
        softness=0.16,
        structures=(
            _Structure(
                pattern=partial(_draw_network, frequency=22), colour=(72, 42, 32), opacity=0.6, chance=0.7
            ),
            _Structure(pattern=partial(_draw_spots, count=14, radius=0.08), colour=(70, 42, 34), chance=0.3),
            _Structure(
                pattern=partial(_draw_patches, frequency=4, edge=0.9), colour=(44, 30, 30), chance=0.2
            ),
            _Structure(
                pattern=partial(_draw_patches, frequency=4, edge=0.9), colour=(198, 122, 108), chance=0.15
            ),
        ),
    ),
    "vasc": _Look(  # red to purple lakes
        colours=((204, 62, 82), (136, 38, 72)),
        size=0.45,
        raggedness=0.07,
        softness=0.07,
        structures=(
            _Structure(pattern=partial(_draw_spots, count=10, radius=0.2), colour=(98, 14, 48)),
            _Structure(
                pattern=partial(_draw_patches, frequency=4, edge=0.8), colour=(216, 190, 206), chance=0.4
            ),
            _Structure(
                pattern=partial(_draw_patches, frequency=3, edge=0.6), colour=(52, 28, 70), chance=0.3
            ),
        ),
    ),
}
