"""Whether probabilities mean what they say, before and after temperature."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from skin_resnet.evaluation.calibration import apply_temperature, compute_ece, compute_reliability
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.plots.style import (
    BLUE,
    DPI,
    FONT,
    ORANGE,
    QUIET,
    WIDTH_INCH,
    build_layout,
    style_axes,
)

_FEW = 10  # images: the accuracy of fewer says next to nothing


def plot_reliability(predictions: Predictions, temperature: float, title: str, bins: int = 15) -> Figure:
    """Plot accuracy over confidence, as predicted and with a temperature, above how many images each bin has.

    Raises:
        UserError: There is no image, or a probability is not finite.
    """
    figure = Figure(figsize=(WIDTH_INCH, 6), dpi=DPI, layout=build_layout())
    images = f"{len(predictions.targets):,} images"
    figure.suptitle(f"{title}: {images} (pale: fewer than {_FEW} in a bin)", fontsize=FONT + 2)
    panels = figure.subplots(2, 2, sharex=True, sharey="row", height_ratios=[3, 1])
    calibrated = apply_temperature(predictions, temperature)
    heads = ("As predicted", f"Temperature {temperature:.2f}")
    for (upper, lower), head, shown in zip(panels.T, heads, (predictions, calibrated), strict=True):
        style_axes(upper, f"{head}: ECE {compute_ece(shown, bins):.3f}")
        style_axes(lower, "")
        _draw_bins(upper, lower, shown, bins)
    panels[0, 0].set_ylabel("Bars: accuracy, dots: mean confidence", fontsize=FONT)
    panels[1, 0].set_ylabel("Images", fontsize=FONT)
    return figure


def _draw_bins(upper: Axes, lower: Axes, predictions: Predictions, bins: int) -> None:
    table = compute_reliability(predictions, bins)
    filled = table[table.images > 0]
    upper.plot([0, 1], [0, 1], color=QUIET, linewidth=1, linestyle="--", zorder=1)
    for is_few, rows in filled.groupby(filled.images < _FEW):
        shade = 0.3 if is_few else 1
        upper.bar(rows.low, rows.accuracy, 1 / bins, align="edge", color=BLUE, edgecolor="white", alpha=shade)
        # The gap is drawn where the images are, which is rarely the middle of a bin.
        upper.vlines(rows.confidence, rows.accuracy, rows.confidence, color=ORANGE, linewidth=2, alpha=shade)
        upper.plot(rows.confidence, rows.confidence, "o", color=ORANGE, markersize=5, alpha=shade)
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    lower.bar(table.low, table.images, 1 / bins, align="edge", color=QUIET, edgecolor="white")
    lower.set_ylim(0, 1.25 * table.images.max())
    for row in filled.itertuples():
        middle = (row.low + row.high) / 2
        lower.annotate(
            f"{row.images}",  # a comma would make neighbours touch
            (middle, row.images),
            xytext=(0, 2),
            textcoords="offset points",
            fontsize=FONT - 4,
            ha="center",
        )
    lower.set_xlabel("Confidence (highest probability)", fontsize=FONT)
