"""Figures of images: Grad-CAM examples, and the gallery of missed melanomas."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.plots.style import (
    EMPTY,
    FONT,
    WIDTH_INCH,
    build_figure,
    literal,
    name_classes,
    shorten,
)

_COLUMNS = 6  # of the gallery


def plot_gradcam(
    images: NDArray[np.uint8],
    heats: NDArray[np.float32],
    predictions: Predictions,
    rows: NDArray[np.int64],
    classes: tuple[str, ...],
) -> Figure:
    """Plot the examples, a row per class, right predictions on the left and wrong ones on the right.

    Args:
        images: The examples' pixels (M, S, S, 3).
        heats: From `compute_gradcam` for their predicted classes, (M, S, S).
        predictions: Of all N images among which the examples were chosen.
        rows: Which of these the examples are, (M,), from `choose_examples`.
        classes: The class order.
    """
    is_right = predictions.predicted == predictions.targets
    lines: dict[int, dict[bool, list[int]]] = {}
    for example, row in enumerate(rows):
        line = lines.setdefault(predictions.targets[row], {True: [], False: []})
        line[is_right[row]].append(example)
    widths = {right: max(1, *(len(line[right]) for line in lines.values())) for right in (True, False)}
    columns = sum(widths.values())
    names = name_classes(classes, max(5, 46 // columns - 6))
    cells = -(-images.shape[1] // 32)  # the last stage's features, from which the map is computed
    heading = (
        f"Images, and the regions that support the predicted class (Grad-CAM, {cells} x {cells})\n"
        "true → predicted, with its probability"
    )
    height = (WIDTH_INCH - 0.6) / columns / 2 + 0.3
    figure = build_figure(height * len(lines) + 0.8, heading)
    grid = figure.subplots(len(lines), columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], facecolor=EMPTY)
        axes.set_box_aspect(0.5)
        axes.spines[:].set_visible(False)
    for panels, (target, line) in zip(grid, lines.items(), strict=True):
        of_class = is_right[predictions.targets == target]
        panels[0].set_ylabel(f"{names[target]}\n{of_class.sum():,} of {len(of_class):,} right", fontsize=FONT)
        for axes, example in (
            *zip(panels, line[True], strict=False),
            *zip(panels[widths[True] :], line[False], strict=False),
        ):
            predicted = predictions.predicted[rows[example]]
            p = predictions.probabilities[rows[example], predicted]
            _show_pair(axes, images[example], heats[example])
            axes.set_title(f"{names[target]} → {names[predicted]}, p {p:.2f}", fontsize=FONT)
    return figure


def _show_pair(axes: Axes, image: NDArray[np.uint8], heat: NDArray[np.float32]) -> None:
    """Show an image beside itself under its heat: the hotter, the less of the image shines through."""
    opacity = 0.6 * heat[..., None]
    colours = 255 * colormaps["viridis"](heat)[..., :3]
    blend = np.round(image * (1 - opacity) + colours * opacity).astype(np.uint8)
    gap = np.full((len(image), max(1, len(image) // 50), 3), 255, dtype=np.uint8)
    axes.imshow(np.hstack([image, gap, blend]))


def plot_gallery(images: NDArray[np.uint8], captions: Sequence[str], title: str) -> Figure:
    """Show images in a grid, each under its caption; captions beyond the last image are counted in the title.

    Args:
        images: uint8 (M, S, S, 3).
        captions: One per image and for those not shown, all of as many lines.
        title: What they are; their number is added.
    """
    shown, total = len(images), len(captions)
    rows = -(-shown // _COLUMNS)
    lines = captions[0].count("\n") + 1 if shown else 0
    count = f"{shown} of {total:,}" if total > shown else f"{shown or 'none'}"
    figure = build_figure(0.6 + (1.5 + 0.2 * lines) * rows, f"{title}: {count}")
    if not shown:
        return figure
    for axes in figure.subplots(rows, _COLUMNS, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):
        axes.imshow(image)
        short = "\n".join(shorten(line, 19) for line in caption.splitlines())
        axes.set_title(literal(short), fontsize=FONT - 2)
    return figure
