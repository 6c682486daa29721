"""The search space, and the two baselines that every study begins with."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from search.config import SearchConfig
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError

# The recipe of the student project that this one grew out of: it overfitted, and is to be beaten.
BASELINE_RECIPE: Mapping[str, Any] = {
    "optimizer": "adam", "lr": 1e-3, "lr_schedule": "constant", "warmup_epochs": 0.0, "weight_decay": 0.0,
    "grad_clip": 0.0, "class_weighting": "none", "augment": "none", "mixup": 0.0, "cutmix": 0.0,
    "label_smoothing": 0.0, "dropout": 0.0, "stochastic_depth": 0.0, "ema_decay": 0.0, "patience": 0,
}  # fmt: skip
# What trials 0 and 1 change in the given options; trial 1 is the options as given.
BASELINES: Mapping[str, Mapping[str, Any]] = {"baseline recipe": BASELINE_RECIPE, "defaults": {}}

# A good rate for one optimizer is far off for another, so these two are tuned as multiples of the optimizer's
# typical value: what the sampler learns about the multiple with one optimizer helps with the others.
TYPICAL: Mapping[str, Mapping[str, float]] = {
    "lr": {"adam": 5e-4, "adamw": 5e-4, "sgd": 0.02},
    "weight_decay": {"adam": 1e-4, "adamw": 0.05, "sgd": 5e-4},
}
FACTOR = "_factor"  # suffix of such a multiple's name in the study

Hyperparameter = CategoricalDistribution | FloatDistribution


def build_hyperparameters(epochs: int) -> dict[str, Hyperparameter]:
    """Return the full space: the distribution of each tuned option or multiple (`_factor`) by name."""
    return {
        "optimizer": CategoricalDistribution(("adam", "adamw", "sgd")),
        "lr" + FACTOR: FloatDistribution(0.05, 10, log=True),
        "weight_decay" + FACTOR: FloatDistribution(0, 4),
        "lr_schedule": CategoricalDistribution(("constant", "cosine", "onecycle", "plateau")),
        "warmup_epochs": FloatDistribution(0, max(1, min(5, epochs // 5)), step=0.5),
        "augment": CategoricalDistribution(("none", "light", "standard", "strong")),
        "mixup": FloatDistribution(0, 0.4, step=0.1),
        "cutmix": FloatDistribution(0, 1, step=0.25),
        "label_smoothing": FloatDistribution(0, 0.2, step=0.05),
        "dropout": FloatDistribution(0, 0.5, step=0.1),
        "stochastic_depth": FloatDistribution(0, 0.2, step=0.05),
        "ema_decay": CategoricalDistribution((0.0, 0.99, 0.999)),
        "class_weighting": CategoricalDistribution(("none", "sqrt", "balanced")),
    }


@dataclass(frozen=True, kw_only=True)
class Space:
    """The search space.

    Attributes:
        hyperparameters: Distributions by name, the optimizer first where it is tuned.
        fixed: Options that have one value in all trials except the baselines.
    """

    hyperparameters: Mapping[str, Hyperparameter]
    fixed: Mapping[str, Any]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Return training options with values suggested by a trial."""
        suggested: dict[str, Any] = {}
        for name, each in self.hyperparameters.items():
            if isinstance(each, CategoricalDistribution):
                suggested[name] = trial.suggest_categorical(name, each.choices)
            else:
                suggested[name] = trial.suggest_float(name, each.low, each.high, step=each.step, log=each.log)
        return self.to_options({**self.fixed, **suggested})

    @staticmethod
    def to_options(params: Mapping[str, Any]) -> dict[str, Any]:
        """Convert a trial's params to training options: multiples become values."""
        options = {name: value for name, value in params.items() if not name.endswith(FACTOR)}
        for name, typical in TYPICAL.items():
            if name + FACTOR in params:
                options[name] = params[name + FACTOR] * typical[params["optimizer"]]
        # Six digits are readable on a run, and finer than any difference they make.
        return {
            name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in options.items()
        }

    def locate(self, config: TrainConfig) -> dict[str, Any]:
        """Return the params of a config; the nearest ones where a value lies outside the space."""
        params: dict[str, Any] = {}
        for name, each in self.hyperparameters.items():
            value = getattr(config, name.removesuffix(FACTOR))
            if isinstance(each, CategoricalDistribution):
                params[name] = value if value in each.choices else each.choices[0]
                continue
            if name.endswith(FACTOR):
                value /= TYPICAL[name.removesuffix(FACTOR)][config.optimizer]
            value = min(max(value, each.low), each.high)
            if each.step:
                value = each.low + round((value - each.low) / each.step) * each.step
            params[name] = value
        return params


def build_space(config: SearchConfig) -> Space:
    """Build the space, narrowed by `config.fix`.

    Raises:
        UserError: `fix` names something that is not tuned, or a value it cannot have.
    """
    tuned, fixed = build_hyperparameters(config.epochs), dict[str, Any]()
    for name, text in _parse_fix(config.fix, [each.removesuffix(FACTOR) for each in tuned]).items():
        each = _narrow(config.training, name, text, tuned.pop(name if name in tuned else name + FACTOR))
        if isinstance(each, CategoricalDistribution) and len(each.choices) == 1:
            fixed[name] = each.choices[0]
        else:
            tuned = {name: each, **tuned} if name == "optimizer" else {**tuned, name: each}
    if "optimizer" not in tuned:
        fixed.setdefault("optimizer", config.optimizer)
    return Space(hyperparameters=tuned, fixed=fixed)


def _parse_fix(fix: str, tuned: list[str]) -> dict[str, str]:
    """Parse `NAME=TEXT,...`."""
    texts: dict[str, str] = {}
    for entry in [] if fix == "none" else fix.split(","):
        name, _, text = (piece.strip() for piece in entry.partition("="))
        if name not in tuned:
            near = difflib.get_close_matches(name, tuned, 1)
            hint = f"did you mean {near[0]}?" if near else f"the space has {', '.join(tuned)}"
            raise UserError(f"fix: {name!r} is not a tuned hyperparameter; {hint}")
        if not text:
            raise UserError(f"fix: {entry!r} has no value; write NAME=VALUE, VALUE|VALUE or LOW..HIGH")
        if name in texts:
            raise UserError(f"fix: {name} is given twice; write {name}=VALUE|VALUE")
        texts[name] = text
    return texts


def _narrow(training: TrainConfig, name: str, text: str, each: Hyperparameter) -> Hyperparameter:
    """Parse `value`, `value|value` or `low..high`; each value is checked like the option's own."""
    if ".." not in text:
        values = [_parse_value(training, name, piece.strip()) for piece in text.split("|")]
        return CategoricalDistribution(tuple(dict.fromkeys(values)))
    if isinstance(each, CategoricalDistribution):
        raise UserError(
            f"fix: {name} has no range {text!r}; its values are {'|'.join(map(str, each.choices))}"
        )
    values = [_parse_value(training, name, piece.strip()) for piece in text.split("..")]
    if len(values) != 2 or values[0] >= values[1]:
        raise UserError(f"fix: {name}={text} is not a range; write LOW..HIGH with LOW below HIGH")
    low, high = values
    # Optuna would shorten a range that is not a multiple of the step.
    steps = (high - low) / (each.step or math.inf)
    step = each.step if each.step and math.isclose(steps, round(steps)) else None
    return FloatDistribution(low, high, log=each.log, step=step)


def _parse_value(training: TrainConfig, name: str, text: str) -> Any:
    try:
        return getattr(training.with_changes(**{name: text}), name)
    except UserError as error:
        raise UserError(f"fix: {error}") from None
