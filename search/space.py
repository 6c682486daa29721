"""What is tuned, within which bounds, and the two recipes that every study begins with."""

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial

from search.config import SearchConfig
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError

# The recipe of the student project that this one grew out of: what overfitted, and is to be beaten.
SEED_RECIPE: Mapping[str, Any] = {
    "optimizer": "adam", "lr": 1e-3, "lr_schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0,
    "grad_clip": 0.0, "class_weighting": "none", "augment": "none", "mixup": 0.0, "cutmix": 0.0,
    "label_smoothing": 0.0, "dropout": 0.0, "stochastic_depth": 0.0, "ema_decay": 0.0, "patience": 0,
}  # fmt: skip
# What trials 0 and 1 change in the options given: the second is the options as they stand.
BASELINES: Mapping[str, Mapping[str, Any]] = {"seed recipe": SEED_RECIPE, "defaults": {}}

# A good rate for one optimizer is a wild one for another, so both of these are tuned as multiples of what the
# optimizer usually takes: each range is its own, and what one teaches of the multiple helps the others.
USUAL: Mapping[str, Mapping[str, float]] = {
    "lr": {"adam": 5e-4, "adamw": 5e-4, "sgd": 0.02},
    "weight_decay": {"adam": 1e-4, "adamw": 0.05, "sgd": 5e-4},
}
FACTOR = "_factor"  # ends the name of such a multiple in the study


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of several values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between two bounds, both included; `log`: chosen by its magnitude."""

    low: float
    high: float
    step: float | None = None
    log: bool = False


Part = Choice | Range


def build_parts(epochs: int) -> dict[str, Part]:
    """Give what is tuned by name of option; `_factor` marks a multiple of the optimizer's usual value."""
    return {
        "optimizer": Choice(values=("adam", "adamw", "sgd")),
        "lr" + FACTOR: Range(low=0.05, high=10, log=True),
        "weight_decay" + FACTOR: Range(low=0, high=4),
        "lr_schedule": Choice(values=("constant", "cosine", "onecycle", "plateau")),
        "warmup_epochs": Range(low=0, high=max(1, min(5, epochs // 5)), step=0.5),
        "augment": Choice(values=("none", "light", "standard", "strong")),
        "mixup": Range(low=0, high=0.4, step=0.1),
        "cutmix": Range(low=0, high=1, step=0.25),
        "label_smoothing": Range(low=0, high=0.2, step=0.05),
        "dropout": Range(low=0, high=0.5, step=0.1),
        "stochastic_depth": Range(low=0, high=0.2, step=0.05),
        "ema_decay": Choice(values=(0.0, 0.99, 0.999)),
        "class_weighting": Choice(values=("none", "sqrt", "balanced")),
    }


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is tuned.

    Attributes:
        parts: By name, the optimizer first where it is tuned.
        fixed: Options that have one value in all trials but the baselines.
    """

    parts: Mapping[str, Part]
    fixed: Mapping[str, Any]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Ask a trial for its values; give the options that they change."""
        suggested = {name: self._suggest(trial, name, part) for name, part in self.parts.items()}
        return self.to_options({**self.fixed, **suggested})

    @staticmethod
    def _suggest(trial: Trial, name: str, part: Part) -> Any:
        if isinstance(part, Choice):
            return trial.suggest_categorical(name, part.values)
        return trial.suggest_float(name, part.low, part.high, step=part.step, log=part.log)

    @staticmethod
    def to_options(params: Mapping[str, Any]) -> dict[str, Any]:
        """Turn the values of a trial into training options: multiples become what they are multiples of."""
        options = {name: value for name, value in params.items() if not name.endswith(FACTOR)}
        for name, usual in USUAL.items():
            if name + FACTOR in params:
                options[name] = params[name + FACTOR] * usual[params["optimizer"]]
        # Six digits read well on a run, and say more than anyone can tell apart.
        return {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in options.items()
        }

    def locate(self, config: TrainConfig) -> dict[str, Any]:
        """Give the place of a config in the space; the nearest one, where a part of it lies outside."""
        place: dict[str, Any] = {}
        for name, part in self.parts.items():
            value = getattr(config, name.removesuffix(FACTOR))
            if name.endswith(FACTOR):
                value /= USUAL[name.removesuffix(FACTOR)][config.optimizer]
            if isinstance(part, Choice):
                place[name] = value if value in part.values else part.values[0]
            else:
                value = min(max(value, part.low), part.high)
                if part.step:
                    value = part.low + round((value - part.low) / part.step) * part.step
                place[name] = value
        return place


def build_space(config: SearchConfig) -> Space:
    """Build the space, with `config.fix` applied.

    Raises:
        UserError: `fix` names something that is not tuned, or gives it a value it cannot have.
    """
    parts, fixed = build_parts(config.epochs), dict[str, Any]()
    for name, text in _read_fix(config.fix, [part.removesuffix(FACTOR) for part in parts]).items():
        part = _narrow(config.training, name, text, parts.pop(name if name in parts else name + FACTOR))
        if isinstance(part, Choice) and len(part.values) == 1:
            fixed[name] = part.values[0]
        else:
            parts = {name: part, **parts} if name == "optimizer" else {**parts, name: part}
    if "optimizer" not in parts:
        fixed.setdefault("optimizer", config.optimizer)
    return Space(parts=parts, fixed=fixed)


def _read_fix(fix: str, tuned: list[str]) -> dict[str, str]:
    """Read `NAME=TEXT,...`; give the texts by name."""
    texts: dict[str, str] = {}
    for entry in [] if fix == "none" else fix.split(","):
        name, _, text = (piece.strip() for piece in entry.partition("="))
        if name not in tuned:
            near = difflib.get_close_matches(name, tuned, 1)
            hint = f"; did you mean {near[0]}?" if near else "."
            names = ", ".join(tuned)
            raise UserError(f"fix: must be NAME=VALUE with a name of {names}, but got {entry!r}{hint}")
        if not text:
            raise UserError(f"fix: must be NAME=VALUE, VALUE|VALUE or LOW..HIGH, but got {entry!r}.")
        if name in texts:
            raise UserError(f"fix: must name each part once, but got {name} twice; write {name}=VALUE|VALUE.")
        texts[name] = text
    return texts


def _narrow(training: TrainConfig, name: str, text: str, part: Part) -> Part:
    """Read `value`, `value|value` or `low..high`, each checked as the option's value."""
    if ".." not in text:
        values = [_read_value(training, name, piece.strip()) for piece in text.split("|")]
        return Choice(values=tuple(dict.fromkeys(values)))
    if isinstance(part, Choice):
        choices = ", ".join(map(str, part.values))
        raise UserError(f"fix: {name} must be VALUE or VALUE|VALUE of {choices}, but got {text!r}.")
    values = [_read_value(training, name, piece.strip()) for piece in text.split("..")]
    if len(values) != 2 or values[0] >= values[1]:
        raise UserError(f"fix: {name} must be LOW..HIGH with LOW below HIGH, but got {text!r}.")
    low, high = values
    steps = (high - low) / (part.step or math.inf)
    step = part.step if part.step and math.isclose(steps, round(steps)) else None
    return dataclasses.replace(part, low=low, high=high, step=step)


def _read_value(training: TrainConfig, name: str, text: str) -> Any:
    try:
        return getattr(training.with_changes(**{name: text}), name)
    except UserError as error:
        raise UserError(f"fix: {error}") from None
