"""Writes `MLproject` from the configs: `python -m skin_resnet.mlproject > MLproject`."""

from typing import Any

import yaml

from skin_resnet.cli import COMMANDS
from skin_resnet.config import FrozenConfig, format_value

# Entry point: command word. `mlflow run .` without -e runs main.
ENTRY_POINTS = {"main": "train", **{name: name for name in COMMANDS if name != "train"}}
_HEADER = "# Made by `make MLproject` from skin_resnet/config.py; a test compares the two.\n"


def render_mlproject() -> str:
    """Give the text of the file `MLproject`."""
    project = {
        "name": "skin-resnet",
        "conda_env": "conda.yaml",
        "entry_points": {
            entry_point: _describe_entry_point(command, COMMANDS[command][0])
            for entry_point, command in ENTRY_POINTS.items()
        },
    }
    body: str = yaml.safe_dump(project, sort_keys=False, width=10_000, default_flow_style=None)
    return _HEADER + body


def _describe_entry_point(command: str, config_type: type[FrozenConfig]) -> dict[str, Any]:
    parameters: dict[str, dict[str, Any]] = {}
    for name, field in config_type.model_fields.items():
        # MLflow checks only paths and URIs; the types are for the reader.
        kind = {int: "int", float: "float"}.get(field.annotation, "string")  # type: ignore[arg-type]
        parameters[name] = {"type": kind}
        if not field.is_required():
            default = field.default
            parameters[name]["default"] = (
                default if isinstance(default, int | float) else format_value(default)
            )
    options = " ".join(f"--{name} {{{name}}}" for name in parameters)
    return {"parameters": parameters, "command": f"python -m skin_resnet {command} {options}"}


if __name__ == "__main__":
    print(render_mlproject(), end="")
