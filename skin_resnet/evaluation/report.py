"""A training in words: what it reached, and whether it overfitted."""

from typing import Literal

import numpy as np
import pandas as pd

from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.metrics import Floats
from skin_resnet.evaluation.page import format_score, format_table, spell_metric

Verdict = Literal["too_short", "never_learned", "overfitting", "unstable", "improving", "leveled_off"]

_SHORTEST = 4  # epochs: in fewer, a trend cannot be distinguished from noise
_WIDE_GAP = 0.1


def describe_training(history: pd.DataFrame, best_epoch: int, config: TrainConfig, num_classes: int) -> str:
    """Describe a training in some 12 lines of Markdown.

    Args:
        history: All its epochs, as `engine.to_frame` returns them.
        best_epoch: The epoch that `config.best_by` chose.
        config: What it was trained with.
        num_classes: How many classes occur in val: chance has a balanced accuracy of one divided by it.
    """
    last = history.index[-1]
    limit = f" (at most {config.epochs})" if last < config.epochs else ""
    text = (
        f"{_explain(history, best_epoch, config, num_classes)}\n\n"
        f"**Best epoch {best_epoch} of {last}**{limit}, chosen by val {spell_metric(config.best_by)}.\n\n"
        f"{_format_metrics(history, best_epoch)}"
    )
    if history.gap[best_epoch] < 0 or config.mixup or config.cutmix:
        text += (
            "\n\nTrain is measured on augmented images and while the network learns, so train metrics are "
            "lower than in an evaluation."
        )
    return text


def judge_training(history: pd.DataFrame, best_epoch: int, config: TrainConfig, num_classes: int) -> Verdict:
    """Classify the course of a training; changes within the noise of its curves do not count."""
    if len(history) < _SHORTEST:
        return "too_short"
    train, val = history["train/loss"].to_numpy(), history["val/loss"].to_numpy()
    if _is_at_chance(history, num_classes) and not (_fell(train) or _fell(val)):
        return "never_learned"
    lowest = int(val.argmin())
    if _rose(val, lowest):
        return "unstable" if _rose(train, lowest) else "overfitting"
    values = history[f"val/{config.best_by}"].to_numpy()
    before, after, length = _compare_ends(values)
    gain = before - after if config.best_by == "loss" else after - before
    is_better = gain > max(0.01 * before, 2.5 * _estimate_noise(values) / np.sqrt(length))
    return "improving" if is_better and best_epoch > history.index[-1] - length else "leveled_off"


def _is_at_chance(history: pd.DataFrame, num_classes: int) -> bool:
    """Return whether no epoch's val balanced accuracy is more than noise above chance."""
    scores = history["val/balanced_accuracy"].to_numpy()
    # Noise counts up to a limit only: a score that the table shows far above chance is no noise.
    return bool(scores.max() < 1 / num_classes + np.clip(2.5 * _estimate_noise(scores), 0.02, 0.05))


def _rose(losses: Floats, since: int) -> bool:
    """Return whether losses end above index `since`, by over 2 % and more than noise."""
    if len(losses) - since <= 3:
        return False
    # Medians, so that no single epoch decides.
    before = np.median(losses[max(since - 1, 0) : since + 2])
    end = np.median(losses[-max(3, len(losses) // 5) :])
    return bool(end - before > max(0.02 * before, 3 * _estimate_noise(losses)))


def _fell(losses: Floats) -> bool:
    """Return whether losses end below their start, by over 2 % and more than noise."""
    before, end = np.median(losses[:2]), np.median(losses[-max(2, len(losses) // 5) :])
    return bool(before - end > max(0.02 * before, 3 * _estimate_noise(losses)))


def _estimate_noise(values: Floats) -> float:
    """Estimate the standard deviation about a smooth curve from second differences.

    Source: Gasser, Sroka, Jennen-Steinmetz, Biometrika 73:625 (1986); here with the median, for outliers.
    """
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / np.sqrt(6))


def _compare_ends(values: Floats) -> tuple[float, float, int]:
    """Return the medians of the last two fifths of the epochs, and how many epochs a fifth is."""
    length = max(2, len(values) // 5)
    return float(np.median(values[-2 * length : -length])), float(np.median(values[-length:])), length


def _explain(history: pd.DataFrame, best_epoch: int, config: TrainConfig, num_classes: int) -> str:
    verdict = judge_training(history, best_epoch, config, num_classes)
    if verdict == "too_short":
        return f"**Too few epochs to judge** (at least {_SHORTEST} are needed)."
    losses, metric = history["val/loss"], f"val {spell_metric(config.best_by)}"
    since, gap = losses.idxmin(), history.gap[best_epoch]
    rise = f"val loss was lowest there, {losses.min():.3f}, and ended at {losses.iloc[-1]:.3f}"
    before, after, length = _compare_ends(history[f"val/{config.best_by}"].to_numpy())
    size = "large" if gap > _WIDE_GAP else "small"
    text = {
        "never_learned": "**Never learned:** the loss did not fall.",
        "overfitting": f"**Overfitting since epoch {since}:** {rise}, while train loss did not rise.",
        "unstable": f"**Unstable since epoch {since}:** {rise}, and train loss rose, too.",
        "improving": f"**Still improving at the end:** {metric} went from {before:.3f} to {after:.3f} "
        f"(medians of {length} epochs).",
        "leveled_off": f"**Leveled off** at a {metric} of {after:.3f}; val loss did not rise, and the "
        f"train-val gap is {size} ({gap:+.2f}).",
    }[verdict]
    if _is_at_chance(history, num_classes):
        text += f" Val balanced accuracy is no better than chance ({1 / num_classes:.3f})."
        auc = history["val/macro_auc"][best_epoch]
        if auc > 0.65:
            text += (
                f" Val macro AUC is {auc:.3f}: predictions collapse to few classes, but their ranking is "
                "better than chance."
            )
    return text


def _format_metrics(history: pd.DataFrame, best_epoch: int) -> str:
    """Write a table of the best and the last epoch; the gap is train minus val balanced accuracy."""
    names = ("balanced_accuracy", "accuracy", "macro_auc", "loss")
    table = {"": [*map(spell_metric, names), "train-val gap"]}
    for epoch in (best_epoch, history.index[-1]):
        for split, gap in (("train", f"{history.gap[epoch]:+.3f}"), ("val", "")):
            scores = [format_score(history.loc[epoch].get(f"{split}/{name}", np.nan)) for name in names]
            table[f"{split}, epoch {epoch}"] = [*scores, gap]
    return format_table([*table], [*zip(*table.values(), strict=True)])
