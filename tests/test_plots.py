import sys
from collections.abc import Sequence
from io import BytesIO
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.operating import find_positives
from skin_resnet.evaluation.plots.assessment import (
    plot_confusion,
    plot_reliability,
    plot_roc,
)
from skin_resnet.evaluation.plots.curves import plot_curves
from skin_resnet.labels import HAM10000_CLASSES
from tests.conftest import make_table
from tests.test_assess import evaluate

SEVEN = HAM10000_CLASSES


def make_history(
    losses: Sequence[tuple[float, float]] | int, lr: float | Sequence[float] = 3e-4
) -> pd.DataFrame:
    """A history from train and val losses, or of a length, with curves that overfit."""
    if isinstance(losses, int):
        times = np.arange(losses) / losses
        losses = [*zip(2 * np.exp(-4 * times), 1.5 - 2 * times + 2.2 * times**2, strict=True)]
    history = pd.DataFrame(losses, columns=["train/loss", "val/loss"]).assign(lr=lr)
    for split in ("train", "val"):
        history[f"{split}/balanced_accuracy"] = np.exp(-history[f"{split}/loss"])
        history[f"{split}/accuracy"] = 0.5 + history[f"{split}/balanced_accuracy"] / 2
    history.index += 1
    return history.rename_axis("epoch")


def make_predictions(classes: int, absent: Sequence[int] = ()) -> Predictions:
    generator = np.random.default_rng(0)
    targets = generator.choice([target for target in range(classes) if target not in absent], 40 * classes)
    probabilities = generator.dirichlet(np.ones(classes), len(targets))
    probabilities[np.arange(len(targets)), targets] += 0.3
    ids = tuple(map(str, range(len(targets))))
    return Predictions(probabilities=probabilities / 1.3, targets=targets, image_ids=ids)


def texts_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def visible_texts(figure: Figure) -> list[Text]:
    """Return all upright texts that are drawn, with their places fixed."""
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, sorted(axes.get_ylim()))):
            ticks = zip(axis.get_majorticklocs(), axis.get_major_ticks(), strict=True)
            outside = [tick.label1 for place, tick in ticks if not low <= place <= high]
            texts = [text for text in texts if text not in outside]
    return [
        text for text in texts if text.get_rotation() % 90 == 0
    ]  # the box of a slanted one is not its ink


def assert_texts_are_apart(figure: Figure) -> None:
    boxes = [(text.get_text(), text.get_window_extent()) for text in visible_texts(figure)]
    for text, box in boxes:
        assert box.union([box, figure.bbox]).bounds == figure.bbox.bounds, f"{text!r} leaves the page"
    for (one, first), (other, second) in combinations(boxes, 2):
        # A hair's breadth is allowed: the box of a text is larger than its ink.
        assert not first.padded(-2).overlaps(second.padded(-2)), f"{one!r} lies on {other!r}"


# Curves


@pytest.mark.parametrize(
    ("length", "best_epoch"), [(1, 1), (2, 2), (8, 1), (8, 7), (60, 20), (100, 1), (100, 100)]
)
def test_no_text_of_the_curves_lies_on_another_or_leaves_the_page(length: int, best_epoch: int) -> None:
    assert_texts_are_apart(plot_curves(make_history(length), best_epoch))


def test_the_best_epoch_is_marked_with_its_val_values() -> None:
    history = make_history(60)
    figure = plot_curves(history, 23)
    best = history.loc[23]
    loss, score, lr = figure.axes
    for axes, name in ((loss, "val/loss"), (score, "val/balanced_accuracy")):
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f"epoch 23: {best[name]:.3f}" in labels
        marks = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [23]]
        assert marks == [best[name]]
    for axes in (loss, score, lr):
        assert [23, 23] in [list(line.get_xdata()) for line in axes.lines]
    title = figure._suptitle.get_text()
    for text in ("23 of 60", *(f"{best[f'{split}/balanced_accuracy']:.3f}" for split in ("val", "train"))):
        assert text in title


def test_one_wild_loss_is_named_instead_of_flattening_the_curve() -> None:
    history = make_history(12)
    assert not plot_curves(history, 9).axes[0].get_title(loc="right")
    history.loc[1, "val/loss"] = 38.2
    loss = plot_curves(history, 9).axes[0]
    assert loss.get_ylim()[1] < 4
    assert loss.get_title(loc="right").endswith("val loss 38.2 in epoch 1")


# Confusion


@pytest.mark.parametrize(
    "classes",
    [
        ("benign", "malignant melanoma of the skin of the trunk"),
        SEVEN,
        tuple(f"class number {index}" for index in range(20)),
    ],
)
def test_no_text_of_the_confusion_lies_on_another_or_leaves_the_page(classes: tuple[str, ...]) -> None:
    assert_texts_are_apart(plot_confusion(make_predictions(len(classes)), classes, "Test"))


def test_each_cell_says_how_many_images_and_which_share_of_the_row() -> None:
    targets = np.array([0] * 4 + [1] * 1000)
    predicted = np.array([0, 0, 0, 2] + [1] * 998 + [2] * 2)
    predictions = Predictions(
        probabilities=np.eye(3)[predicted], targets=targets, image_ids=tuple(map(str, range(1004)))
    )
    axes = plot_confusion(predictions, ("a", "b", "c"), "Val").axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    cells = {place: text for place, text in texts.items() if "%" in text}
    assert cells == {(0, 0): "3\n75%", (2, 0): "1\n25%", (1, 1): "998\n100%", (2, 1): "2\n<1%"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (4)", "b (1,000)", "c (0)"]
    assert "no images" in texts_of(axes)
    assert "Val: 1,004 images, balanced accuracy 0.874" in axes.get_title(loc="left")


# The other figures of an evaluation


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    """Of 7 classes; one lesion in three has three photos, ages and sites differ."""
    table = make_table(lesions_per_class=30)
    rng = np.random.default_rng(0)
    sites = rng.choice(["back", "unknown", "ear"], len(table), p=[0.6, 0.37, 0.03])
    return evaluate(table.assign(localization=sites, age=rng.choice([20, 50, np.nan], len(table))))


def test_the_reliability_plot_carries_both_errors_and_every_bins_count(assessment: Assessment) -> None:
    before, after, *counts = plot_reliability(assessment, "Test").axes
    for axes, name in ((before, "ece_before_temperature"), (after, "ece")):
        assert axes.get_title(loc="left").endswith(f"ECE {assessment.get(name).value:.3f}")
    for axes, (_, bins) in zip(
        counts, assessment.reliability.groupby("temperature", sort=False), strict=True
    ):
        assert [int(text.get_text()) for text in axes.texts] == bins.images[bins.images > 0].tolist()


def test_the_roc_marks_what_each_threshold_reaches(assessment: Assessment) -> None:
    panels = plot_roc(assessment, "Test").axes
    for axes, name in zip(panels, find_positives(SEVEN), strict=True):
        drawn = [
            (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in "os"
        ]
        rows = [
            [assessment.get(f"{name}_at_{goal}_{metric}").value for metric in ("specificity", "sensitivity")]
            for goal in ("0.90", "0.95")
        ]
        assert drawn == [(1 - specificity, sensitivity) for specificity, sensitivity in rows]


def test_a_roc_without_images_of_both_kinds_says_so() -> None:
    table = make_table(lesions_per_class=5)
    table = table[table.dx == "mel"].reset_index(drop=True)
    axes = plot_roc(evaluate(table), "Test").axes[0]
    assert texts_of(axes) == ["needs positive and negative images"]


def test_plotting_needs_no_pyplot_and_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have loaded it
    before = dict(rcParams.copy())
    file = BytesIO()
    plot_curves(make_history(3), 1).savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(rcParams.copy()) == before
