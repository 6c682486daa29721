"""Photos beside the places that spoke for their prediction."""

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.plots.style import DPI, EMPTY, FONT, QUIET, WIDTH_INCH, build_layout


def plot_gradcam(
    images: NDArray[np.uint8],
    heats: NDArray[np.float32],
    predictions: Predictions,
    rows: NDArray[np.int64],
    classes: tuple[str, ...],
) -> Figure:
    """Plot the examples a row a class, right predictions on the left and wrong ones on the right.

    Args:
        images: The examples' pixels (M, S, S, 3).
        heats: From `compute_gradcam` for their predicted classes, (M, S, S).
        predictions: Of all N images among which the examples were chosen.
        rows: Which of these the examples are, (M,), from `choose_examples`.
        classes: The class order.
    """
    targets, is_right = predictions.targets, predictions.predicted == predictions.targets
    occurring = np.unique(targets)
    examples = {
        (target, right): np.flatnonzero((targets[rows] == target) & (is_right[rows] == right)).tolist()
        for target in occurring
        for right in (True, False)
    }
    widths = {
        right: max(1, *(len(examples[target, right]) for target in occurring)) for right in (True, False)
    }
    columns = sum(widths.values())
    names = [_shorten(name, 46 // columns - 6) for name in classes]
    height = (WIDTH_INCH - 0.6) / columns / 2 + 0.3
    figure = Figure(figsize=(WIDTH_INCH, height * len(occurring) + 0.8), dpi=DPI, layout=build_layout())
    cells = -(-images.shape[1] // 32)  # the last stage's features, which the heat is computed from
    heading = f"Photos, and what speaks for the predicted class (Grad-CAM, {cells} x {cells} places)"
    caption = "true → predicted, and how probable the network finds that"
    figure.suptitle(f"{heading}\n{caption}", fontsize=FONT + 1)
    grid = figure.subplots(len(occurring), columns, squeeze=False)
    for line, target in zip(grid, occurring, strict=True):
        sides = {True: line[: widths[True]], False: line[widths[True] :]}
        for right, side in sides.items():
            shown = examples[target, right]
            for axes, example in zip(side, shown, strict=False):
                said = predictions.predicted[rows[example]]
                probability = predictions.probabilities[rows[example], said]
                _show_pair(axes, images[example], heats[example])
                axes.set_title(f"{names[target]} → {names[said]}, p {probability:.2f}", fontsize=FONT)
            for axes in side[len(shown) :]:
                _leave_empty(axes, "no other" if shown else "none right" if right else "none wrong")
        of_class = is_right[targets == target]
        line[0].set_ylabel(f"{names[target]}\n{of_class.sum():,} of {len(of_class):,} right", fontsize=FONT)
    return figure


def blend_heat(image: NDArray[np.uint8], heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Lay heat (S, S) over a photo (S, S, 3): the hotter, the less of the photo shines through."""
    opacity = 0.6 * heat[..., None]
    colours = 255 * colormaps["viridis"](heat)[..., :3]
    blend: NDArray[np.uint8] = np.round(image * (1 - opacity) + colours * opacity).astype(np.uint8)
    return blend


def _show_pair(axes: Axes, image: NDArray[np.uint8], heat: NDArray[np.float32]) -> None:
    gap = np.full((len(image), max(1, len(image) // 50), 3), 255, dtype=np.uint8)
    axes.imshow(np.hstack([image, gap, blend_heat(image, heat)]))
    _remove_frame(axes)


def _leave_empty(axes: Axes, note: str) -> None:
    axes.set_facecolor(EMPTY)
    where = axes.transAxes
    axes.text(0.5, 0.5, note, transform=where, ha="center", va="center", fontsize=FONT, color=QUIET)
    axes.set_box_aspect(0.5)
    _remove_frame(axes)


def _remove_frame(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _shorten(name: str, length: int) -> str:
    length = max(5, length)  # HAM10000's codes always fit
    return name if len(name) <= length else f"{name[: length - 1]}…"
