"""One definition of every option: bounds are told in one line, params read back to the same config."""

from typing import Any

import pytest

from skin_resnet.cli import COMMANDS, load_config_type, parse_options
from skin_resnet.config import EvaluateConfig, TrainConfig
from skin_resnet.errors import UserError

OUT_OF_BOUNDS = {
    "data": "",
    "image_size": [31, 1025, "big"],
    "val_fraction": [0, 0.5, -1],
    "test_fraction": [0, 0.5],
    "split": "",
    "train_fraction": [0, 1.1],
    "allow_leaks": "maybe",
    "coverage": [0.49, 1, 1e-300],
    "split_seed": [-1, 2**32],
    "on_bad_image": "ignore",
    "arch": "resnet18",
    "weights": "",
    "dropout": [-0.1, 1],
    "stochastic_depth": [-0.1, 1],
    "epochs": [0, 1.5],
    "batch_size": [1, 100_000],
    "optimizer": "lion",
    "lr": [0, -1, 101, float("nan"), float("inf")],
    "lr_schedule": "step",
    "warmup_epochs": [-1, 17],
    "weight_decay": [-1, 11],
    "label_smoothing": [-0.1, 1],
    "class_weighting": "yes",
    "grad_clip": [-1, float("inf")],
    "ema_decay": [-0.1, 1],
    "augment": "weak",
    "mixup": [-0.1, 11],
    "cutmix": [-0.1, 11],
    "best_by": "f1",
    "patience": -1,
    "test": "twice",
    "seed": [-1, 2**32],
    "device": "tpu",
    "devices": [0, 65],
    "precision": "fp8",
    "checkpoint_minutes": [0, 10_001],
    "resume": "",
}
CASES = [
    (name, value)
    for name, values in OUT_OF_BOUNDS.items()
    for value in (values if isinstance(values, list) else [values])
]


@pytest.mark.parametrize(("name", "value"), CASES)
def test_a_value_out_of_bounds_is_told_in_one_line(name: str, value: Any) -> None:
    with pytest.raises(UserError) as told:
        TrainConfig(**{name: value})
    assert name in str(told.value)
    assert str(value) in str(told.value)
    assert "\n" not in str(told.value)


def test_every_bounded_field_is_tried() -> None:
    assert set(OUT_OF_BOUNDS) | {"cache_dir", "checkpoint_dir"} == set(TrainConfig.model_fields)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"epochs": 2, "warmup_epochs": 3.0}, "warmup_epochs=3.0 .* epochs=2"),
        ({"val_fraction": 0.45, "test_fraction": 0.45}, "test_fraction=0.45"),
        ({"devices": 4, "batch_size": 7}, "batch_size=7 .* devices=4"),
    ],
)
def test_options_are_checked_together(options: dict[str, Any], rule: str) -> None:
    with pytest.raises(UserError, match=rule):
        TrainConfig(**options)


def test_an_unknown_field_is_refused_and_a_config_is_fixed() -> None:
    with pytest.raises(UserError, match="learning_rate"):
        TrainConfig(learning_rate=1)
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().lr = 1.0  # type: ignore[misc]


def test_changes_are_checked_again() -> None:
    assert TrainConfig().with_changes(lr=0.5).lr == 0.5
    with pytest.raises(UserError, match="lr should be greater than 0"):
        TrainConfig().with_changes(lr=0)


@pytest.mark.parametrize(
    "config",
    [TrainConfig(), TrainConfig(lr=1e-5, image_size=96, data="some folder/x y"), EvaluateConfig(model="m")],
)
def test_params_typed_back_on_the_command_line_give_the_same_config(
    config: TrainConfig | EvaluateConfig,
) -> None:
    arguments = [part for name, text in config.to_params().items() for part in (f"--{name}", text)]
    command = "train" if isinstance(config, TrainConfig) else "evaluate"
    assert parse_options(command, arguments) == config


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_described_in_a_sentence(command: str) -> None:
    for name, field in load_config_type(command).model_fields.items():
        assert (field.description or "").endswith("."), name
