"""Write the file `MLproject` from the commands and their options: `python -m skin_resnet.mlproject`."""

from typing import Any

import yaml

from skin_resnet.cli import COMMANDS, load_config_type
from skin_resnet.options import format_value

# Entry points and their commands; `mlflow run .` without -e runs main. `mlflow run` opens a run in the store,
# which `doctor` is meant to check, and `clean` to read; `app` runs until it is stopped.
_OTHERS = ("doctor", "clean", "app")
ENTRY_POINTS = {"main" if name == "train" else name: name for name in COMMANDS if name not in _OTHERS}


def render_mlproject() -> str:
    """Return the text of the file `MLproject`."""
    project = {
        "name": "skin-resnet",
        "conda_env": "conda.yaml",
        "entry_points": {name: _describe(command) for name, command in ENTRY_POINTS.items()},
    }
    body: str = yaml.safe_dump(project, sort_keys=False, width=10_000, default_flow_style=None)
    return f"# Made by `make MLproject` from the configs; a test compares the two.\n{body}"


def _describe(command: str) -> dict[str, Any]:
    parameters: dict[str, dict[str, Any]] = {}
    for name, field in load_config_type(command).model_fields.items():
        # MLflow checks only paths and URIs; the types are for the reader.
        kind = {int: "int", float: "float"}.get(field.annotation, "string")  # type: ignore[arg-type]
        parameters[name] = {"type": kind}
        if not field.is_required():
            is_number = isinstance(field.default, int | float)
            parameters[name]["default"] = field.default if is_number else format_value(field.default)
    options = " ".join(f"--{name} {{{name}}}" for name in parameters)
    return {"parameters": parameters, "command": f"python -m skin_resnet {command} {options}"}


if __name__ == "__main__":
    print(render_mlproject(), end="")
