"""A training in words: what it reached, whether it overfitted, and which options to try next."""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from skin_resnet.config import TrainConfig
from skin_resnet.evaluation.formatting import format_score, format_table, spell_metric
from skin_resnet.evaluation.metrics import EpochResult, Floats
from skin_resnet.options import format_value

Verdict = Literal["too_short", "never_learned", "overfitting", "unstable", "improving", "levelled_off"]
Option = tuple[str, object, str]  # a field of TrainConfig, the value to try, and why

_SHORTEST = 4  # epochs: in fewer, nothing tells a trend from noise
_WIDE_GAP = 0.1
_REMEDIES: tuple[Option, ...] = (
    ("augment", "strong", "training images that vary more."),
    ("weights", "imagenet", "starts from features that took a million images to learn."),
    ("mixup", 0.2, "blends of two images are harder to memorise."),
    ("label_smoothing", 0.1, "being too sure no longer pays."),
    ("dropout", 0.2, "the head cannot lean on single features."),
    ("stochastic_depth", 0.1, "the blocks cannot lean on each other."),
)


def describe_training(
    history: Sequence[EpochResult], best_epoch: int, config: TrainConfig, num_classes: int
) -> str:
    """Describe a training in some 15 lines of markdown.

    Args:
        history: All its epochs, in order.
        best_epoch: The epoch that `config.best_by` chose.
        config: What it was trained with; no option that is on already is suggested.
        num_classes: How many classes occur in val: chance gives a balanced accuracy of one divided by it.
    """
    best, last = next(result for result in history if result.epoch == best_epoch), history[-1]
    verdict = judge_training(history, best_epoch, config, num_classes)
    chosen_by = spell_metric(config.best_by)
    limit = f" (at most {config.epochs})" if last.epoch < config.epochs else ""
    options = [
        f"- `{name}={format_value(value)}`: {why}"
        for name, value, why in _suggest(verdict, history, best, config)
    ]
    return "\n".join(
        [
            f"**Best epoch {best_epoch} of {last.epoch}**{limit}, chosen by val {chosen_by}.",
            "",
            _format_results(best, last),
            "",
            f"- {_explain(verdict, history, best, config, num_classes)}",
            f"- {_compare_splits(best, last, config)}",
            *(["", "**Next, try**", "", *options] if options else []),
        ]
    )


def judge_training(
    history: Sequence[EpochResult], best_epoch: int, config: TrainConfig, num_classes: int
) -> Verdict:
    """Put the course of a training into one word; changes within the noise of its curves do not count."""
    if len(history) < _SHORTEST:
        return "too_short"
    scores = _values(history, "val", "balanced_accuracy")
    highest = max(_middle(scores, index) for index in range(1, len(scores) - 1))
    if highest < 1 / num_classes + max(0.02, 2.5 * _estimate_noise(scores)):
        return "never_learned"
    losses = _values(history, "val", "loss")
    if _rose(losses, int(losses.argmin())):
        return "overfitting" if find_overfitting_epoch(history) else "unstable"
    values, length = _values(history, "val", config.best_by), _end_length(history)
    before, after = _compare_ends(values, length)
    gain = before - after if config.best_by == "loss" else after - before
    is_better = gain > max(0.01 * before, 2.5 * _estimate_noise(values) / np.sqrt(length))
    return "improving" if is_better and best_epoch > history[-1].epoch - length else "levelled_off"


def find_overfitting_epoch(history: Sequence[EpochResult]) -> int | None:
    """Find the epoch of the lowest val loss, if val loss rose from there and train loss did not.

    Returns:
        That epoch, or None if it did not come to that, or if too few epochs followed to tell.
    """
    train, val = _values(history, "train", "loss"), _values(history, "val", "loss")
    lowest = int(val.argmin())
    return history[lowest].epoch if _rose(val, lowest) and not _rose(train, lowest) else None


def _rose(losses: Floats, since: int) -> bool:
    """Tell whether losses end above what they were at index `since`, by over 2 % and more than noise."""
    if len(losses) - since <= 3:
        return False
    # Medians, so that neither one lucky epoch nor one wild one decides.
    before, end = _middle(losses, since), np.median(losses[-max(3, len(losses) // 5) :])
    return bool(end - before > max(0.02 * before, 3 * _estimate_noise(losses)))


def _values(history: Sequence[EpochResult], split: str, name: str) -> Floats:
    return np.array([getattr(getattr(result, split), name) for result in history])


def _middle(values: Floats, index: int) -> float:
    return float(np.median(values[max(index - 1, 0) : index + 2]))


def _estimate_noise(values: Floats) -> float:
    """Estimate the standard deviation about a smooth curve: how far are values off their neighbours' mean?

    Source: Gasser, Sroka, Jennen-Steinmetz, Biometrika 73:625 (1986); here with the median, for outliers.
    """
    return float(1.4826 * np.median(np.abs(np.diff(values, 2))) / np.sqrt(6))


def _end_length(history: Sequence[EpochResult]) -> int:
    return max(2, len(history) // 5)


def _compare_ends(values: Floats, length: int) -> tuple[float, float]:
    """Give the median of the last `length` values, and of as many before them, earlier first."""
    return float(np.median(values[-2 * length : -length])), float(np.median(values[-length:]))


def _explain(
    verdict: Verdict,
    history: Sequence[EpochResult],
    best: EpochResult,
    config: TrainConfig,
    num_classes: int,
) -> str:
    last, lowest = history[-1], min(history, key=lambda result: result.val.loss)
    rise = f"val loss was lowest there ({lowest.val.loss:.3f}) and ended at {last.val.loss:.3f}"
    if verdict == "too_short":
        return f"**Too short to tell** how it would go on: that takes {_SHORTEST} epochs."
    if verdict == "never_learned":
        text = f"**Never learned:** val balanced accuracy stayed at chance, {1 / num_classes:.3f}."
        auc = f" Yet its probabilities rank (macro AUC {best.val.macro_auc:.3f}): it leans to one class."
        return text + (auc if best.val.macro_auc > 0.65 else "")
    if verdict == "overfitting":
        fall = f"train loss went from {lowest.train.loss:.3f} to {last.train.loss:.3f}"
        sure = f" Val balanced accuracy rose until epoch {best.epoch}, though: it grew too sure, not worse."
        text = f"**Overfitting since epoch {lowest.epoch}:** {rise}, while {fall}."
        return text + (sure if _grew_too_sure(history, best) else "")
    if verdict == "unstable":
        return f"**Unstable since epoch {lowest.epoch}:** {rise}, and train loss rose, too."
    before, after = _compare_ends(_values(history, "val", config.best_by), _end_length(history))
    if verdict == "improving":
        change = f"val {spell_metric(config.best_by)} went from {before:.3f} to {after:.3f}"
        return f"**Still improving at the end:** {change} (medians of {_end_length(history)} epochs)."
    ahead = ", but train is far ahead" if best.gap > _WIDE_GAP else ", and train is not far ahead"
    level = f"a val {spell_metric(config.best_by)} of {format_score(after)}"
    return f"**Levelled off** at {level}; val loss did not turn up{ahead}."


def _grew_too_sure(history: Sequence[EpochResult], best: EpochResult) -> bool:
    """Tell whether val balanced accuracy rose, beyond noise, after val loss had been lowest."""
    lowest = min(history, key=lambda result: result.val.loss)
    noise = _estimate_noise(_values(history, "val", "balanced_accuracy"))
    gain = best.val.balanced_accuracy - lowest.val.balanced_accuracy
    return best.epoch > lowest.epoch and gain > max(0.01, 3 * noise)


def _compare_splits(best: EpochResult, last: EpochResult, config: TrainConfig) -> str:
    results = {result.epoch: result for result in (best, last)}.values()
    gaps = " and ".join(f"{result.gap:+.3f} in epoch {result.epoch}" for result in results)
    ratios = " and ".join(_format_ratio(result.val.loss, result.train.loss) for result in results)
    text = f"Train minus val balanced accuracy: {gaps}; val loss is {ratios} times train loss."
    if best.gap >= 0 and not config.mixup and not config.cutmix:
        return text
    return f"{text} Train is measured on altered images and while it learns: it looks worse than it is."


def _format_ratio(val: float, train: float) -> str:
    return f"{val / train:.1f}" if val < 100 * train else "over 100"


def _suggest(
    verdict: Verdict, history: Sequence[EpochResult], best: EpochResult, config: TrainConfig
) -> list[Option]:
    """Give at most three options worth a try, the most promising first."""
    off = ("none", "light", "standard", 0)
    remedies = [option for option in _REMEDIES if getattr(config, option[0]) in off]
    if verdict == "overfitting" and _grew_too_sure(history, best):
        remedies.sort(key=lambda option: option[0] != "label_smoothing")
    informed = [option for option in remedies if option[0] == "weights"]
    imbalance, longer = _weigh_classes(best, config), _train_longer(history[-1], config)
    shorter = _stop_early(history[-1], best, config)
    memorises = best.gap > _WIDE_GAP
    options = {
        "too_short": longer,
        "never_learned": remedies
        if memorises
        else [*_change_lr(verdict, config), *informed, *imbalance, *longer],
        "overfitting": [*remedies[:1], *imbalance, *shorter, *remedies[1:]],
        "unstable": [*_change_lr(verdict, config), *_steady_steps(config)],
        "improving": [*longer, *imbalance],
        "levelled_off": [*imbalance, *(remedies[:2] if memorises else _enlarge(config)), *shorter],
    }
    return options[verdict][:3]


def _weigh_classes(best: EpochResult, config: TrainConfig) -> list[Option]:
    behind = best.val.accuracy - best.val.balanced_accuracy
    if config.class_weighting != "none" or behind < 0.15:
        return []
    why = f"rare classes lag: balanced accuracy is {behind:.2f} below accuracy."
    return [("class_weighting", "sqrt", why)]


def _train_longer(last: EpochResult, config: TrainConfig) -> list[Option]:
    if last.epoch == config.epochs <= 5_000:
        return [("epochs", max(20, 2 * config.epochs), "more time to learn.")]
    if config.patience > 0:
        return [("patience", 2 * config.patience, "it was stopped early.")]
    return []


def _stop_early(last: EpochResult, best: EpochResult, config: TrainConfig) -> list[Option]:
    idle = last.epoch - best.epoch
    if config.patience > 0 or idle < 5:
        return []
    return [("patience", 5, f"saves time: {idle} epochs came after the best.")]


def _change_lr(verdict: Verdict, config: TrainConfig) -> list[Option]:
    if verdict == "unstable":
        return [("lr", _round(config.lr / 3), "smaller steps.")]
    if config.lr < (1e-3 if config.optimizer == "sgd" else 3e-5):
        return [("lr", _round(config.lr * 10), "the steps may be too small to get anywhere.")]
    return [("lr", _round(config.lr / 10), "the steps may be too large to get anywhere.")]


def _steady_steps(config: TrainConfig) -> list[Option]:
    steps: list[Option] = []
    if config.lr_schedule == "constant":
        steps.append(("lr_schedule", "cosine", "steps that shrink towards the end."))
    if config.grad_clip == 0:
        steps.append(("grad_clip", 1.0, "no single batch can throw it off."))
    return steps


def _enlarge(config: TrainConfig) -> list[Option]:
    # A file of weights fits one network only.
    if config.arch == "resnet152" or config.weights not in ("none", "imagenet"):
        return []
    larger = "resnet101" if config.arch == "resnet50" else "resnet152"
    return [("arch", larger, "train and val are close, so a larger network may learn more.")]


def _round(lr: float) -> float:
    return float(f"{lr:.1g}")


def _format_results(best: EpochResult, last: EpochResult) -> str:
    columns = {
        f"{split}, epoch {result.epoch}": getattr(result, split)
        for result in (best, last)
        for split in ("train", "val")
    }
    names = ("balanced_accuracy", "accuracy", "macro_auc", "loss")
    rows = [
        [spell_metric(name), *(format_score(getattr(m, name)) for m in columns.values())] for name in names
    ]
    return format_table(["", *columns], rows)
