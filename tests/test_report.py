import re
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.report import describe_training, judge_training

Curve = Callable[[int], float]


def falling(epoch: int) -> float:
    return 2 * float(np.exp(-epoch / 8))


def make_history(
    length: int,
    *,
    train_loss: Curve = falling,
    val_loss: Curve = falling,
    train_score: Curve = lambda epoch: 0.65,
    val_score: Curve = lambda epoch: 0.6,
    auc: float = 0.8,
    noise: float = 0,
    seed: int = 0,
) -> pd.DataFrame:
    """Make a history from curves over the epochs; accuracy is 0.05 above balanced accuracy."""
    generator = np.random.default_rng(seed)
    history = pd.DataFrame(index=pd.RangeIndex(1, length + 1, name="epoch"))
    for split, loss, score in (("train", train_loss, train_score), ("val", val_loss, val_score)):
        for name, curve in (("loss", loss), ("balanced_accuracy", score)):
            values = np.array([curve(epoch) for epoch in history.index], dtype=float)
            history[f"{split}/{name}"] = values + noise * generator.normal(size=length)
        history[f"{split}/accuracy"] = history[f"{split}/balanced_accuracy"] + 0.05
        history[f"{split}/macro_auc"] = auc
    return history.assign(gap=history["train/balanced_accuracy"] - history["val/balanced_accuracy"])


def valley(lowest: int) -> Curve:
    """Fall to 0.8 at epoch `lowest`, then rise by 0.03 an epoch."""
    return lambda epoch: 0.8 + 0.06 * max(lowest - epoch, 0) + 0.03 * max(epoch - lowest, 0)


def best_of(history: pd.DataFrame) -> int:
    return int(history["val/balanced_accuracy"].idxmax())


def judge(history: pd.DataFrame, num_classes: int = 7) -> str:
    return judge_training(history, best_of(history), TrainConfig(epochs=len(history)), num_classes)


def describe(history: pd.DataFrame, config: TrainConfig | None = None) -> str:
    return describe_training(history, best_of(history), config or TrainConfig(epochs=len(history)), 7)


def find_overfitting_epoch(history: pd.DataFrame) -> int | None:
    found = re.search(r"Overfitting since epoch (\d+):", describe(history))
    return int(found[1]) if found else None


def stay(value: float) -> Curve:
    return lambda _: value


def at_chance(auc: float = 0.5) -> pd.DataFrame:
    loss, score = stay(1.9), stay(1 / 7)
    return make_history(10, train_loss=loss, val_loss=loss, train_score=score, val_score=score, auc=auc)


HISTORIES = {
    "too_short": make_history(3),
    "never_learned": at_chance(),
    "overfitting": make_history(30, val_loss=valley(10), train_score=lambda _: 0.9),
    "unstable": make_history(12, val_loss=valley(5), train_loss=valley(5)),
    "improving": make_history(20, val_score=lambda epoch: 0.3 + 0.01 * epoch),
    "leveled_off": make_history(20),
}


@pytest.mark.parametrize("verdict", HISTORIES)
def test_each_course_gets_its_verdict(verdict: str) -> None:
    assert judge(HISTORIES[verdict]) == verdict


@pytest.mark.parametrize("lowest", [1, 4, 10, 26])
def test_overfitting_is_dated_to_the_epoch_of_the_lowest_val_loss(lowest: int) -> None:
    history = make_history(30, val_loss=valley(lowest))
    assert find_overfitting_epoch(history) == lowest


def test_three_epochs_after_the_lowest_val_loss_are_needed_to_speak_of_overfitting() -> None:
    def cliff(epoch: int) -> float:
        return 1 - 0.04 * epoch if epoch <= 5 else 2.0

    assert find_overfitting_epoch(make_history(7, val_loss=cliff)) is None
    assert find_overfitting_epoch(make_history(8, val_loss=cliff)) == 5


def test_noise_on_the_losses_moves_the_date_of_overfitting_little() -> None:
    histories = [make_history(40, val_loss=valley(15), noise=0.02, seed=seed) for seed in range(50)]
    found = [find_overfitting_epoch(history) or 0 for history in histories]
    assert np.abs(np.array(found) - 15).max() <= 3


@pytest.mark.parametrize("length", [5, 12, 40])
@pytest.mark.parametrize("noise", [0.005, 0.02, 0.08])
def test_curves_that_only_waver_are_rarely_taken_for_a_trend(length: int, noise: float) -> None:
    histories = [make_history(length, val_loss=stay(0.8), noise=noise, seed=seed) for seed in range(100)]
    assert [judge(history) for history in histories].count("leveled_off") >= 85


def test_the_metric_that_chooses_the_best_epoch_decides_whether_it_still_improves() -> None:
    history = make_history(20)
    by_accuracy = TrainConfig(epochs=20, best_by="balanced_accuracy")
    assert judge_training(history, 20, by_accuracy, 7) == "leveled_off"
    assert judge_training(history, 20, TrainConfig(epochs=20, best_by="loss"), 7) == "improving"


def test_memorized_train_images_are_overfitting_though_train_loss_can_fall_no_more() -> None:
    history = make_history(20, val_loss=valley(8), train_loss=lambda epoch: 0.001 if epoch > 5 else 1.0)
    assert find_overfitting_epoch(history) == 8


def test_chance_depends_on_how_many_classes_there_are() -> None:
    half = stay(0.5)
    history = make_history(10, val_loss=stay(0.7), train_loss=stay(0.7), train_score=half, val_score=half)
    assert judge(history, 2) == "never_learned"
    assert judge(history, 7) == "leveled_off"


@pytest.mark.parametrize("scores", [(0.143, 0.235, 0.143, 0.15, 0.2), (0.143, 0.143, 0.143, 0.143, 0.235)])
def test_a_best_epoch_above_chance_is_never_said_not_to_have_learned(scores: tuple[float, ...]) -> None:
    history = make_history(
        5, val_score=lambda epoch: scores[epoch - 1], val_loss=stay(1.9), train_loss=stay(1.9)
    )
    assert judge(history) != "never_learned"
    assert "chance" not in describe(history)


@pytest.mark.parametrize("falls", ["train_loss", "val_loss"])
def test_a_training_whose_loss_falls_is_never_said_not_to_have_learned(falls: str) -> None:
    losses = {"train_loss": stay(1.9), "val_loss": stay(1.9)} | {falls: falling}
    history = make_history(10, val_score=stay(1 / 7), train_score=stay(1 / 7), auc=0.5, **losses)
    assert judge(history) != "never_learned"
    assert "no better than chance (0.143)" in describe(history)


def test_never_learning_is_distinguished_from_collapsing_to_few_classes() -> None:
    assert "collapse" not in describe(at_chance())
    assert "macro AUC is 0.780: predictions collapse" in describe(at_chance(auc=0.78))
    assert "no better than chance (0.143)" in describe(at_chance(auc=float("nan")))


def test_a_training_that_has_leveled_off_says_how_large_the_gap_is() -> None:
    assert "gap is small (" in describe(HISTORIES["leveled_off"])
    assert "gap is large (+" in describe(make_history(20, train_score=stay(0.9)))


def test_a_training_that_stopped_early_says_how_long_it_could_have_been() -> None:
    report = describe(HISTORIES["improving"], TrainConfig(epochs=50, patience=4))
    assert "20 of 20** (at most 50)" in report


def test_the_report_gives_the_metrics_of_the_best_and_the_last_epoch_and_the_gap() -> None:
    history = make_history(30, val_loss=valley(10), train_score=lambda epoch: 0.6 + 0.01 * epoch)
    report = describe_training(history, 10, TrainConfig(epochs=30), 7)
    assert 10 <= len(report.splitlines()) <= 25
    cells = [re.findall(r"[^|\s][^|]*[^|\s]", line) for line in report.splitlines() if line.startswith("|")]
    assert cells[0] == ["train, epoch 10", "val, epoch 10", "train, epoch 30", "val, epoch 30"]
    assert ["balanced accuracy", "0.700", "0.600", "0.900", "0.600"] in cells
    assert ["loss", "0.573", "0.800", "0.047", "1.400"] in cells
    assert ["train-val gap", "+0.100", "+0.300"] in cells


def test_a_single_epoch_is_reported_once() -> None:
    report = describe(make_history(1))
    assert "Too few epochs" in report
    assert report.count("epoch 1 ") == 3


def test_train_metrics_of_mixed_images_are_said_to_be_lower() -> None:
    history = make_history(10)
    assert "augmented images" not in describe(history)
    assert "augmented images" in describe(history, TrainConfig(mixup=0.2))
    assert "augmented images" in describe(make_history(10, train_score=stay(0.5)))
