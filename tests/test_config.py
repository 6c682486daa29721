"""One definition of every option: bounds are explained in one line, params read back to the same config."""

from typing import Any

import pytest

from skin_resnet.cli import COMMANDS, load_config_type, parse_options
from skin_resnet.commands.config import EvaluateConfig
from skin_resnet.config import TrainConfig
from skin_resnet.errors import UserError


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"epochs": 2, "warmup_epochs": 3.0}, "warmup_epochs=3.0 .* epochs=2"),
        ({"val_fraction": 0.45, "test_fraction": 0.45}, "test_fraction=0.45"),
        ({"start_size": 31}, "start_size=31 is below 32"),
        ({"start_size": 64, "image_size": 64}, "start_size=64 .* image_size=64"),
        ({"start_size": 64, "patience": 3}, "patience=3 .* start_size=64"),
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
