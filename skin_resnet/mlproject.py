"""Renders the file `MLproject` from the configs of its entry points."""

from collections.abc import Mapping
from typing import Any

import yaml

from skin_resnet.cli import COMMANDS
from skin_resnet.config import FrozenConfig, format_value

# Entry point: what runs it, and its options. `mlflow run .` without -e runs main.
ENTRY_POINTS: Mapping[str, tuple[str, type[FrozenConfig]]] = {
    "main" if name == "train" else name: (f"python -m skin_resnet {name}", config_type)
    for name, (config_type, _) in COMMANDS.items()
    # `mlflow run` would begin a run on the store that the doctor asks about, and make it where there is none.
    if name != "doctor"
}
_HEADER = "# Made by `make MLproject` from the configs; a test compares the two.\n"


def render_mlproject(entry_points: Mapping[str, tuple[str, type[FrozenConfig]]]) -> str:
    """Give the text of the file `MLproject`."""
    project = {
        "name": "skin-resnet",
        "conda_env": "conda.yaml",
        "entry_points": {
            name: _describe_entry_point(command, config_type)
            for name, (command, config_type) in entry_points.items()
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
    return {"parameters": parameters, "command": f"{command} {options}"}
