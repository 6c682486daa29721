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
from matplotlib.legend import Legend
from matplotlib.text import Text
from scipy.stats import binomtest

from skin_resnet.evaluation.artifacts import list_artifacts
from skin_resnet.evaluation.assess import Assessment
from skin_resnet.evaluation.metrics import Predictions
from skin_resnet.evaluation.operating import find_positives
from skin_resnet.evaluation.plots import COLORS, HUES, build_figure
from skin_resnet.evaluation.plots.assessment import plot_confusion, plot_reliability, plot_roc
from skin_resnet.evaluation.plots.curves import plot_curves, plot_curves_of_models
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


BASELINE = {"accuracy": 0.67, "balanced_accuracy": 1 / 7}


def make_predictions(classes: int, absent: Sequence[int] = ()) -> Predictions:
    generator = np.random.default_rng(0)
    targets = generator.choice([target for target in range(classes) if target not in absent], 40 * classes)
    probabilities = generator.dirichlet(np.ones(classes), len(targets))
    probabilities[np.arange(len(targets)), targets] += 0.3
    ids = tuple(map(str, range(len(targets))))
    return Predictions(probabilities=probabilities / 1.3, targets=targets, image_ids=ids)


@pytest.fixture(scope="module")
def assessment() -> Assessment:
    """Of 7 classes; one lesion in three has three photos, ages and sites differ."""
    table = make_table(lesions_per_class=30)
    rng = np.random.default_rng(0)
    sites = rng.choice(["back", "unknown", "ear"], len(table), p=[0.6, 0.37, 0.03])
    return evaluate(table.assign(localization=sites, age=rng.choice([20, 50, np.nan], len(table))))


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
    assert_texts_are_apart(plot_curves(make_history(length), best_epoch, BASELINE, "nv"))


def test_the_best_epoch_is_marked_and_its_values_are_named() -> None:
    history = make_history(60)
    figure = plot_curves(history, 23, BASELINE, "nv")
    score, loss, accuracy, lr = figure.axes
    for axes, metric in ((score, "balanced_accuracy"), (loss, "loss"), (accuracy, "accuracy")):
        values = [history.loc[23, f"{split}/{metric}"] for split in ("val", "train")]
        assert axes.get_title(loc="left").endswith("val {:.3f}, train {:.3f}".format(*values))
        marks = [line.get_ydata()[0] for line in axes.lines if list(line.get_xdata()) == [23]]
        assert marks == values[:1]
    for axes in (score, loss, accuracy, lr):
        assert [23, 23] in [list(line.get_xdata()) for line in axes.lines]
    assert "23 of 60" in figure._suptitle.get_text()


def test_what_the_majority_class_scores_is_marked() -> None:
    figure = plot_curves(make_history(5), 3, BASELINE, "nv")
    for axes, metric in ((figure.axes[0], "balanced_accuracy"), (figure.axes[2], "accuracy")):
        (line,) = [line for line in axes.lines if "majority class nv" in str(line.get_label())]
        assert set(line.get_ydata()) == {BASELINE[metric]}


def test_each_split_has_its_color_in_every_figure(assessment: Assessment) -> None:
    assert len({*COLORS.values(), *HUES[:4]}) == 7
    panel = plot_curves(make_history(5), 3, BASELINE, "nv").axes[0]
    lines = {line.get_label(): line.get_color() for line in panel.lines}
    assert (lines["train"], lines["val"]) == (COLORS["train"], COLORS["val"])
    for split in ("val", "test"):
        files = list_artifacts(assessment, split, split)
        for figure in ("roc", "reliability"):
            panel = files[f"{split}/{figure}.png"].axes[0]
            drawn = {line.get_color() for line in panel.lines}
            assert drawn & set(COLORS.values()) == {COLORS[split]}


def test_one_wild_loss_is_named_instead_of_flattening_the_curve() -> None:
    history = make_history(12)
    assert "off" not in plot_curves(history, 9, BASELINE, "nv").axes[1].get_title(loc="left")
    history.loc[1, "val/loss"] = 38.2
    figure = plot_curves(history, 9, BASELINE, "nv")
    assert_texts_are_apart(figure)
    assert figure.axes[1].get_ylim()[1] < 4
    assert figure.axes[1].get_title(loc="left").endswith("val loss 38.2 in epoch 1")


def test_the_curves_of_several_trainings_name_each_once() -> None:
    histories = {
        f"resnet{depth} with a long name of its run": make_history(1 + depth % 7) for depth in range(7)
    }
    figure = plot_curves_of_models(histories)
    assert_texts_are_apart(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*histories]


def test_a_long_title_stays_on_the_page() -> None:
    figure = build_figure(3, f"An ensemble{' of many runs' * 12}\nSecond line")
    figure.add_subplot()
    assert_texts_are_apart(figure)
    assert figure._suptitle.get_text().endswith("\nSecond line")


def test_a_legend_hides_nothing_of_the_reliability(assessment: Assessment) -> None:
    figure = plot_reliability(assessment, "Test", COLORS["test"])
    figure.draw_without_rendering()
    (legend,) = [each for each in figure.findobj(Legend) if each.get_visible()]
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in figure.axes)


# Confusion


@pytest.mark.parametrize(
    "classes",
    [
        ("benign", "malignant melanoma of the skin of the trunk"),
        SEVEN,
        tuple(f"class number {index}" for index in range(12)),
    ],
)
def test_no_text_of_the_confusion_lies_on_another_or_leaves_the_page(classes: tuple[str, ...]) -> None:
    assert_texts_are_apart(plot_confusion(make_predictions(len(classes)), classes, "Test"))


def test_each_cell_says_how_many_images_and_which_share_of_the_row() -> None:
    targets = np.array([0] * 4 + [1] * 1000 + [3] * 2)
    predicted = np.array([0, 0, 0, 2] + [1] * 998 + [2] * 2 + [1] * 2)
    predictions = Predictions(
        probabilities=np.eye(4)[predicted], targets=targets, image_ids=tuple(map(str, range(1006)))
    )
    axes = plot_confusion(predictions, ("a", "b", "c", "d"), "Val").axes[0]
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    cells = {place: text for place, text in texts.items() if "%" in text}
    missed = {(1, 3): "2\n100%", (3, 3): "0\n0%"}
    assert cells == {(0, 0): "3\n75%", (2, 0): "1\n25%", (1, 1): "998\n100%", (2, 1): "2\n<1%"} | missed
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["a, n = 4", "b, n = 1,000", "c, n = 0", "d, n = 2"]
    assert "no images" in texts_of(axes)


def test_the_seven_diagnoses_have_their_full_names_and_the_baseline_is_named(assessment: Assessment) -> None:
    figure = list_artifacts(assessment, "test", "Test")["test/confusion.png"]
    assert_texts_are_apart(figure)
    names = [" ".join(label.get_text().split()) for label in figure.axes[0].get_yticklabels()]
    count = (assessment.predictions.targets == 4).sum()
    assert names[0].startswith("Actinic keratosis / Bowen's disease (akiec)")
    assert names[4] == f"Melanoma (mel), n = {count}"
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [*SEVEN]
    baseline = f"{assessment.get('baseline_balanced_accuracy').value:.3f}"
    assert f"always {assessment.baseline_class} {baseline}" in figure._suptitle.get_text()


# The other figures of an evaluation


def test_the_reliability_plot_carries_both_errors_and_every_bins_accuracy_and_count(
    assessment: Assessment,
) -> None:
    figure = plot_reliability(assessment, "Test", COLORS["test"])
    assert_texts_are_apart(figure)
    upper, lower = figure.axes
    for name in ("ece_before_temperature", "ece"):
        assert f"{assessment.get(name).value:.3f}" in upper.get_title(loc="left")
    bins = assessment.reliability.iloc[len(assessment.reliability) // 2 :]
    bins = bins[bins.images > 0]
    (dots,) = [line for line in upper.lines if line.get_marker() == "o"]
    np.testing.assert_array_equal(dots.get_xydata(), bins[["confidence", "accuracy"]])
    (bars,) = [bars for bars in upper.collections if bars.get_color()[0] is not None]
    for (low, high), row in zip(bars.get_segments(), bins.itertuples(), strict=True):
        right = round(row.accuracy * row.images)
        expected = binomtest(right, row.images).proportion_ci(method="wilson")
        np.testing.assert_allclose((low[1], high[1]), expected, atol=1e-9)
    assert [int(text.get_text()) for text in lower.texts] == bins.images.tolist()


def test_the_roc_marks_what_each_threshold_reaches(assessment: Assessment) -> None:
    figure = plot_roc(assessment, "Test", COLORS["test"])
    assert_texts_are_apart(figure)
    panels = figure.axes
    for axes, name in zip(panels, find_positives(SEVEN), strict=True):
        drawn = [
            (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if line.get_marker() in "os"
        ]
        rows = [
            [assessment.get(f"{name}_at_{goal}_{metric}").value for metric in ("specificity", "sensitivity")]
            for goal in ("0.90", "0.95")
        ]
        assert drawn == [(1 - specificity, sensitivity) for specificity, sensitivity in rows]


def test_a_roc_is_drawn_only_where_there_are_enough_images_of_both_kinds() -> None:
    table = make_table(lesions_per_class=5)
    few = pd.concat([table[table.dx == "mel"].head(4), table[table.dx == "nv"]], ignore_index=True)
    assert "test/roc.png" not in list_artifacts(evaluate(few), "test", "Test")
    assert "test/roc.png" not in list_artifacts(evaluate(table[table.dx == "mel"]), "test", "Test")
    # All are malignant, some are melanomas.
    some = evaluate(table[table.dx.isin(["mel", "bcc"])].reset_index(drop=True))
    (panel,) = list_artifacts(some, "test", "Test")["test/roc.png"].axes
    assert panel.get_title(loc="left").startswith("Melanoma")


def test_plotting_needs_no_pyplot_and_changes_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)  # another test may have loaded it
    before = dict(rcParams.copy())
    file = BytesIO()
    plot_curves(make_history(3), 1, BASELINE, "nv").savefig(file, format="png")
    assert file.getvalue().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules
    assert dict(rcParams.copy()) == before
