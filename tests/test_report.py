import re
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest

from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.metrics import EpochResult, Metrics
from skin_resnet.evaluation.report import (
    describe_training,
    find_overfitting_epoch,
    judge_training,
)

Curve = Callable[[int], float]
ALL_ON = TrainConfig(
    augment="strong", weights="imagenet", mixup=0.2, label_smoothing=0.1, dropout=0.2, stochastic_depth=0.1,
    class_weighting="sqrt", patience=3, grad_clip=1, lr_schedule="cosine", epochs=40,
)  # fmt: skip


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
) -> list[EpochResult]:
    """Make a history from curves over the epochs; accuracy is 0.05 above balanced accuracy."""
    generator = np.random.default_rng(seed)

    def measure(loss: float, score: float) -> Metrics:
        loss, score = loss + noise * generator.normal(), score + noise * generator.normal()
        return Metrics(loss=loss, accuracy=score + 0.05, balanced_accuracy=score, macro_auc=auc)

    return [
        EpochResult(
            epoch=epoch,
            lr=3e-4,
            seconds=9,
            images_per_s=400,
            train=measure(train_loss(epoch), train_score(epoch)),
            val=measure(val_loss(epoch), val_score(epoch)),
        )
        for epoch in range(1, length + 1)
    ]


def valley(lowest: int) -> Curve:
    """Fall to 0.8 at epoch `lowest`, then rise by 0.03 an epoch."""
    return lambda epoch: 0.8 + 0.06 * max(lowest - epoch, 0) + 0.03 * max(epoch - lowest, 0)


def best_of(history: Iterable[EpochResult]) -> int:
    return max(history, key=lambda result: result.val.balanced_accuracy).epoch


def judge(history: list[EpochResult], config: TrainConfig | None = None) -> str:
    return judge_training(history, best_of(history), config or TrainConfig(epochs=len(history)), 7)


def describe(history: list[EpochResult], config: TrainConfig | None = None) -> str:
    return describe_training(history, best_of(history), config or TrainConfig(epochs=len(history)), 7)


def suggested(report: str) -> dict[str, str]:
    return dict(re.findall(r"^- `(\w+)=(\S+)`: ", report, flags=re.MULTILINE))


HISTORIES = {
    "too_short": make_history(3),
    "never_learned": make_history(10, train_score=lambda _: 1 / 7, val_score=lambda _: 1 / 7, auc=0.5),
    "overfitting": make_history(30, val_loss=valley(10), train_score=lambda _: 0.9),
    "unstable": make_history(12, val_loss=valley(5), train_loss=valley(5)),
    "improving": make_history(20, val_score=lambda epoch: 0.3 + 0.01 * epoch),
    "levelled_off": make_history(20),
}


# The verdict


@pytest.mark.parametrize("verdict", HISTORIES)
def test_each_course_gets_its_verdict(verdict: str) -> None:
    assert judge(HISTORIES[verdict]) == verdict


@pytest.mark.parametrize("lowest", [1, 4, 10, 26])
def test_overfitting_is_dated_to_the_epoch_of_the_lowest_val_loss(lowest: int) -> None:
    history = make_history(30, val_loss=valley(lowest))
    assert find_overfitting_epoch(history) == lowest
    assert f"**Overfitting since epoch {lowest}:** val loss was lowest there (0.800)" in describe(history)


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
    histories = [make_history(length, val_loss=lambda _: 0.8, noise=noise, seed=seed) for seed in range(100)]
    assert [judge(history) for history in histories].count("levelled_off") >= 85


def test_one_wild_epoch_at_the_end_is_not_overfitting() -> None:
    def spike_at_the_end(epoch: int) -> float:
        return 3.0 if epoch == 20 else max(0.8, falling(epoch))

    assert find_overfitting_epoch(make_history(20, val_loss=spike_at_the_end)) is None


def test_a_val_loss_that_rises_with_the_train_loss_is_not_overfitting() -> None:
    history = HISTORIES["unstable"]
    assert find_overfitting_epoch(history) is None
    assert "**Unstable since epoch 5:**" in describe(history)


def test_a_score_that_rises_after_the_lowest_val_loss_is_told_from_one_that_falls() -> None:
    rising = make_history(30, val_loss=valley(10), val_score=lambda epoch: min(0.3 + 0.02 * epoch, 0.7))
    assert "rose until epoch 20, though: it grew too sure" in describe(rising)
    assert next(iter(suggested(describe(rising)))) == "label_smoothing"
    assert "it grew too sure" not in describe(HISTORIES["overfitting"])
    falling_score = make_history(30, val_loss=valley(10), val_score=lambda epoch: 0.7 - 0.01 * epoch)
    assert "it grew too sure" not in describe(falling_score)
    one_lucky_epoch = make_history(30, val_loss=valley(10), noise=0.02)
    assert "it grew too sure" not in describe(one_lucky_epoch)


def test_the_metric_that_chooses_the_best_epoch_decides_whether_it_still_improves() -> None:
    history = make_history(20)
    by_loss = TrainConfig(epochs=20, best_by="loss")
    assert judge_training(history, 20, by_loss, 7) == "improving"
    assert judge_training(history, 20, TrainConfig(epochs=20), 7) == "levelled_off"
    assert "**Still improving at the end:** val loss went from" in describe_training(history, 20, by_loss, 7)


def test_memorised_train_images_are_overfitting_though_train_loss_can_fall_no_more() -> None:
    history = make_history(20, val_loss=valley(8), train_loss=lambda epoch: 0.001 if epoch > 5 else 1.0)
    assert find_overfitting_epoch(history) == 8


def test_chance_depends_on_how_many_classes_there_are() -> None:
    history = make_history(10, train_score=lambda _: 0.5, val_score=lambda _: 0.5)
    assert judge_training(history, 1, TrainConfig(), 2) == "never_learned"
    assert judge_training(history, 1, TrainConfig(), 7) == "levelled_off"


def test_never_learning_is_told_from_leaning_to_one_class() -> None:
    assert "leans to one class" not in describe(HISTORIES["never_learned"])
    ranking = make_history(10, val_score=lambda _: 1 / 7, train_score=lambda _: 1 / 7, auc=0.78)
    assert "rank (macro AUC 0.780): it leans to one class" in describe(ranking)
    unknown = make_history(10, val_score=lambda _: 1 / 7, train_score=lambda _: 1 / 7, auc=float("nan"))
    assert "stayed at chance, 0.143." in describe(unknown)


def test_levelling_off_with_train_far_ahead_is_met_with_remedies_and_else_with_a_larger_network() -> None:
    close, far = HISTORIES["levelled_off"], make_history(20, train_score=lambda _: 0.9)
    assert "train is not far ahead" in describe(close)
    assert "arch" in suggested(describe(close))
    assert "but train is far ahead" in describe(far)
    assert list(suggested(describe(far)))[:2] == ["augment", "weights"]


def test_no_network_is_larger_than_the_largest_or_fits_a_file_of_weights_of_another() -> None:
    history = HISTORIES["levelled_off"]
    assert suggested(describe(history, TrainConfig(arch="resnet101")))["arch"] == "resnet152"
    for config in (TrainConfig(arch="resnet152"), TrainConfig(weights="mine.pth")):
        assert "arch" not in suggested(describe(history, config))


# What to try next


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        ("too_short", {"epochs": "20"}),
        ("never_learned", {"lr": "5e-05", "weights": "imagenet", "epochs": "20"}),
        ("overfitting", {"augment": "strong", "patience": "5", "weights": "imagenet"}),
        ("unstable", {"lr": "0.0002"}),
        ("improving", {"epochs": "40"}),
        ("levelled_off", {"arch": "resnet101", "patience": "5"}),
    ],
)
def test_each_course_gets_its_advice(verdict: str, expected: dict[str, str]) -> None:
    assert suggested(describe(HISTORIES[verdict])) == expected


@pytest.mark.parametrize("verdict", HISTORIES)
@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(mixup=1, augment="strong"), ALL_ON], ids=str)
def test_advice_is_short_is_a_valid_option_and_changes_something(verdict: str, config: TrainConfig) -> None:
    history = HISTORIES[verdict]
    for epochs in (len(history), 500):
        given = config.with_changes(epochs=epochs)
        advice = suggested(describe(history, given))
        assert len(advice) <= 3
        for name, text in advice.items():
            kind = type(getattr(given, name))
            assert given.with_changes(**{name: kind(text)}) != given


def test_options_that_are_on_are_not_suggested() -> None:
    history = HISTORIES["overfitting"]
    assert "Next, try" not in describe(history, ALL_ON)
    for name, off in (("dropout", 0.0), ("mixup", 0.0), ("augment", "light"), ("weights", "none")):
        assert list(suggested(describe(history, ALL_ON.with_changes(**{name: off})))) == [name]


def test_no_more_epochs_are_suggested_than_the_config_allows() -> None:
    last = make_history(1)[0]
    longest = TrainConfig(epochs=10_000)
    history = [replace(last, epoch=epoch) for epoch in (9_999, 10_000)]
    assert "epochs" not in suggested(describe_training(history, 10_000, longest, 7))


def test_a_training_that_patience_stopped_while_it_improved_gets_more_patience() -> None:
    report = describe(HISTORIES["improving"], TrainConfig(epochs=50, patience=4))
    assert "**Best epoch 20 of 20** (at most 50)" in report
    assert suggested(report) == {"patience": "8"}


def test_class_weighting_is_suggested_where_balanced_accuracy_is_far_below_accuracy() -> None:
    lopsided = Metrics(loss=0.5, accuracy=0.8, balanced_accuracy=0.6, macro_auc=0.8)
    history = [replace(result, val=lopsided) for result in make_history(5)]
    report = describe(history, TrainConfig(class_weighting="none"))
    assert suggested(report)["class_weighting"] == "sqrt"
    assert "balanced accuracy is 0.20 below accuracy" in report
    assert "class_weighting" not in describe(history, TrainConfig(class_weighting="balanced"))


def test_a_learning_rate_that_is_tiny_is_raised_where_nothing_was_learned() -> None:
    history = HISTORIES["never_learned"]
    assert suggested(describe(history, TrainConfig(lr=1e-6)))["lr"] == "1e-05"
    assert suggested(describe(history, TrainConfig(lr=1e-3)))["lr"] == "0.0001"


# The text


def test_the_report_gives_the_figures_of_the_best_and_the_last_epoch_and_how_far_the_splits_part() -> None:
    history = make_history(30, val_loss=valley(10), train_score=lambda epoch: 0.6 + 0.01 * epoch)
    report = describe_training(history, 10, TrainConfig(epochs=30), 7)
    assert 10 <= len(report.splitlines()) <= 25
    assert "**Best epoch 10 of 30**, chosen by val balanced accuracy." in report
    assert (
        "|                   | train, epoch 10 | val, epoch 10 | train, epoch 30 | val, epoch 30 |" in report
    )
    assert (
        "| balanced accuracy |           0.700 |         0.600 |           0.900 |         0.600 |" in report
    )
    assert (
        "| loss              |           0.573 |         0.800 |           0.047 |         1.400 |" in report
    )
    assert "+0.100 in epoch 10 and +0.300 in epoch 30; val loss is 1.4 and 29.8 times train loss." in report


def test_a_single_epoch_is_reported_once() -> None:
    report = describe(make_history(1))
    assert "**Too short to tell**" in report
    assert report.count("epoch 1 ") == 3
    assert "+0.050 in epoch 1; val loss is 1.0 times train loss." in report


def test_a_train_loss_of_zero_does_not_break_the_report() -> None:
    history = make_history(5, train_loss=lambda _: 0.0, val_loss=lambda _: 0.5)
    assert "val loss is over 100 and over 100 times train loss" in describe(history)


def test_train_figures_of_mixed_images_are_said_to_look_worse() -> None:
    history = make_history(10)
    assert "altered images" not in describe(history)
    assert "altered images" in describe(history, TrainConfig(mixup=0.2))
    assert "altered images" in describe(make_history(10, train_score=lambda _: 0.5))


# Tables and scores
