"""The search space, and the two baselines that every study begins with."""

import difflib
import math
from collections.abc import Mapping
from typing import Any, get_args

from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import Trial

from search.config import SearchConfig
from skin_resnet.config import AugmentRecipe, TrainConfig
from skin_resnet.errors import UserError

# The recipe of the student project that this one grew out of: it overfitted, and is to be beaten.
BASELINE_RECIPE: Mapping[str, Any] = {
    "optimizer": "adam", "lr": 1e-3, "layer_decay": 1.0, "lr_schedule": "constant", "warmup_epochs": 0.0,
    "weight_decay": 0.0, "grad_clip": 0.0, "class_weighting": "none", "augment": "none", "mixup": 0.0,
    "cutmix": 0.0, "label_smoothing": 0.0, "dropout": 0.0, "stochastic_depth": 0.0, "ema_decay": 0.0,
    "patience": 0,
}  # fmt: skip
BASELINE = "baseline recipe"
# What trials 0 and 1 change in the given options; trial 1 is the options as given.
BASELINES: Mapping[str, Mapping[str, Any]] = {BASELINE: BASELINE_RECIPE, "defaults": {}}

# A good rate for one optimizer is far off for another, so these two are tuned as multiples of the optimizer's
# typical value: what the sampler learns about the multiple with one optimizer helps with the others.
TYPICAL: Mapping[str, Mapping[str, float]] = {
    "lr": {"adam": 5e-4, "adamw": 5e-4, "sgd": 0.02},
    "weight_decay": {"adam": 1e-4, "adamw": 0.05, "sgd": 5e-4},
}
FACTOR = "_factor"  # suffix of such a multiple's name in the study

Hyperparameter = CategoricalDistribution | FloatDistribution
Space = dict[str, Hyperparameter]  # by the name in the study


def build_hyperparameters(epochs: int) -> Space:
    """Return the full space: the distribution of each tuned option or multiple (`_factor`) by name."""
    return {
        "optimizer": CategoricalDistribution(("adam", "adamw", "sgd")),
        "lr" + FACTOR: FloatDistribution(0.05, 10, log=True),
        "layer_decay": FloatDistribution(0.4, 1),
        "weight_decay" + FACTOR: FloatDistribution(0, 4),
        "lr_schedule": CategoricalDistribution(("constant", "cosine", "onecycle", "plateau")),
        "warmup_epochs": FloatDistribution(0, max(1, min(5, epochs // 5)), step=0.5),
        "augment": CategoricalDistribution(get_args(AugmentRecipe)),
        "mixup": FloatDistribution(0, 0.4, step=0.1),
        "cutmix": FloatDistribution(0, 1, step=0.25),
        "label_smoothing": FloatDistribution(0, 0.2, step=0.05),
        "dropout": FloatDistribution(0, 0.5, step=0.1),
        "stochastic_depth": FloatDistribution(0, 0.2, step=0.05),
        "ema_decay": CategoricalDistribution((0.0, 0.99, 0.999)),
        "class_weighting": CategoricalDistribution(("none", "sqrt", "balanced")),
    }


def build_space(config: SearchConfig) -> Space:
    """Build the space, narrowed by `config.fix`: what is fixed has a single choice.

    Raises:
        UserError: `fix` names something that is not tuned, or a value it cannot have.
    """
    space = build_hyperparameters(config.epochs)
    tuned, given = [name.removesuffix(FACTOR) for name in space], set[str]()
    for entry in [] if config.fix == "none" else config.fix.split(","):
        name, _, text = (piece.strip() for piece in entry.partition("="))
        if name not in tuned:
            near = difflib.get_close_matches(name, tuned, 1)
            hint = f"did you mean {near[0]}?" if near else f"the space has {', '.join(tuned)}"
            raise UserError(f"fix: {name!r} is not a tuned hyperparameter; {hint}")
        if not text:
            raise UserError(f"fix: {entry!r} has no value; write NAME=VALUE, VALUE|VALUE or LOW..HIGH")
        if name in given:
            raise UserError(f"fix: {name} is given twice; write {name}=VALUE|VALUE")
        given.add(name)
        distribution = space.pop(name if name in space else name + FACTOR)
        space[name] = _narrow(config.training, name, text, distribution)
    return space


def _narrow(training: TrainConfig, name: str, text: str, each: Hyperparameter) -> Hyperparameter:
    """Parse `value`, `value|value` or `low..high`; each value is checked like the option's own."""
    is_range = ".." in text
    if is_range and isinstance(each, CategoricalDistribution):
        raise UserError(
            f"fix: {name} has no range {text!r}; its values are {'|'.join(map(str, each.choices))}"
        )
    try:
        pieces = text.split(".." if is_range else "|")
        values = [getattr(training.with_changes(**{name: piece.strip()}), name) for piece in pieces]
    except UserError as error:
        raise UserError(f"fix: {error}") from None
    if isinstance(each, CategoricalDistribution) or not is_range:
        return CategoricalDistribution(tuple(dict.fromkeys(values)))
    if len(values) != 2 or values[0] >= values[1]:
        raise UserError(f"fix: {name}={text} is not a range; write LOW..HIGH with LOW below HIGH")
    low, high = values
    # Optuna would shorten a range that is not a multiple of the step.
    steps = (high - low) / (each.step or math.inf)
    step = each.step if each.step and math.isclose(steps, round(steps)) else None
    return FloatDistribution(low, high, log=each.log, step=step)


def suggest(space: Space, trial: Trial) -> dict[str, Any]:
    """Return training options with values suggested by a trial."""
    params: dict[str, Any] = {}
    for name, each in space.items():
        if isinstance(each, CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, each.choices)
        else:
            params[name] = trial.suggest_float(name, each.low, each.high, step=each.step, log=each.log)
    return to_options(params)


def to_options(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a trial's params to training options: multiples become values."""
    options = {}
    for name, value in params.items():
        option = name.removesuffix(FACTOR)
        if name != option:
            value *= TYPICAL[option][params["optimizer"]]
        # Six digits are readable on a run, and finer than any difference they make.
        options[option] = float(f"{value:.6g}") if isinstance(value, float) else value
    return options


def locate(space: Space, config: TrainConfig) -> dict[str, Any]:
    """Return the params of a config; the nearest ones where a value lies outside the space."""
    params: dict[str, Any] = {}
    for name, each in space.items():
        option = name.removesuffix(FACTOR)
        value = getattr(config, option)
        if isinstance(each, CategoricalDistribution):
            params[name] = value if value in each.choices else each.choices[0]
            continue
        if name != option:
            value /= TYPICAL[option][config.optimizer]
        value = min(max(value, each.low), each.high)
        if each.step:
            value = each.low + round((value - each.low) / each.step) * each.step
        params[name] = value
    return params
