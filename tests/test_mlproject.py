"""`MLproject` and `conda.yaml` say what the configs and pyproject.toml say."""

import re
import shlex
import tomllib
from pathlib import Path

import mlflow.utils.environment
import yaml
from mlflow.projects import _project_spec
from packaging.requirements import Requirement

from skin_resnet.cli import load_config_type
from skin_resnet.mlproject import ENTRY_POINTS, render_mlproject

ROOT = Path(__file__).parent.parent


def test_mlproject_is_current() -> None:
    assert (ROOT / "MLproject").read_text() == render_mlproject(), "run `make MLproject`"


def test_mlflow_reads_every_option_with_its_default_and_passes_it_on() -> None:
    project = _project_spec.load_project(str(ROOT))
    for name, command in ENTRY_POINTS.items():
        config_type = load_config_type(command)
        entry_point = project.get_entry_point(name)
        assert set(entry_point.parameters) == set(config_type.model_fields)
        for option, parameter in entry_point.parameters.items():
            field = config_type.model_fields[option]
            assert f"--{option} {{{option}}}" in entry_point.command
            if field.is_required():
                assert parameter.default is None
            else:
                assert str(parameter.default) == str(field.default)
                # MLflow logs it quoted as for a shell; our own commands do not.
                assert shlex.quote(str(parameter.default)) == str(field.default), option


def read_requirements() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {requirement.name: requirement for requirement in map(Requirement, project["dependencies"])}


def test_conda_yaml_names_the_packages_of_pyproject() -> None:
    dependencies = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"]
    assert [d.split("=")[0] if isinstance(d, str) else list(d) for d in dependencies] == [
        "python",
        "pip",
        ["pip"],
    ]
    pip = {requirement.name: requirement for requirement in map(Requirement, dependencies[-1]["pip"])}
    assert pip == read_requirements()


def test_virtualenv_and_uv_read_conda_yaml_whole() -> None:
    environment = mlflow.utils.environment._PythonEnv.from_conda_yaml(str(ROOT / "conda.yaml"))
    assert environment.python.startswith("3.11")
    assert len([d for d in environment.dependencies if not d.startswith("-")]) == len(read_requirements())


def test_the_lock_pins_every_package_exactly_and_within_its_range() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9.-]+(?:\[[a-z,]+\])?)==([^ ]+)( ; .+)?", line)
        assert match, line
        pinned.setdefault(match[1], match[2])
    for name, requirement in read_requirements().items():
        assert requirement.specifier.contains(pinned[name]), name


def test_no_registry_is_named() -> None:
    for name in ("requirements.lock", "conda.yaml", "pyproject.toml", "Makefile"):
        assert "index-url" not in (ROOT / name).read_text().replace("--no-emit-index-url", "")
