"""The house rules that a syntax tree can show: imports run one way, files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(file for package in ("skin_resnet", "search") for file in (ROOT / package).rglob("*.py"))
# Of the whole product; to be lowered with it.
MAX_FILES, MAX_LINES = 80, 11_079
# A module may import from its own layer and those before it.
LAYERS = [
    {"errors", "labels", "options", "config"},
    {"data", "model"},
    {"evaluation"},
    {"training"},
    {"tracking"},
    {"commands", "cli", "mlproject", "__main__"},
]


def list_imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_layer(module: str) -> int:
    return next(layer for layer, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path) -> None:
    package, own = file.relative_to(ROOT).with_suffix("").parts[:2]
    if package == "search" or own == "__init__":
        return  # the search may import from everything
    for name in list_imports(file):
        top, *rest = name.split(".")
        assert top != "search", "only cli.py names it, and imports it when the command is given"
        # `import skin_resnet` asks only for the version.
        if top == "skin_resnet" and rest:
            assert find_layer(rest[0]) <= find_layer(own), f"{own} imports {name}"


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("mlflow", "tracking/"),
        ("optuna", "search/"),
        ("matplotlib", "/plots"),
        ("torchvision.models", "model/weights.py"),
        ("onnx", "model/export.py"),
        ("onnxruntime", "model/export.py"),
    ],
)
def test_a_package_is_imported_in_its_place_only(package: str, allowed: str) -> None:
    for file in FILES:
        if allowed not in file.as_posix():
            for name in list_imports(file):
                assert not f"{name}.".startswith(f"{package}."), f"{file} imports {name}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_files_functions_and_signatures_stay_small(file: Path) -> None:
    assert file.read_text().count("\n") <= 300
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, node.name
            parameters = [argument.arg for argument in node.args.args + node.args.kwonlyargs]
            assert len(parameters) - ("self" in parameters) <= 6, node.name


def test_the_product_stays_small() -> None:
    modules = {file.stem for file in (ROOT / "skin_resnet").glob("*.py")} - {"__init__", "__main__"}
    assert len(modules) <= 8
    assert len(FILES) <= MAX_FILES
    assert sum(file.read_text().count("\n") for file in FILES) <= MAX_LINES


def test_only_the_end_of_a_training_reads_the_diagnoses_of_its_test() -> None:
    callers = [
        (file.name, function.name)
        for file in FILES
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "open_test"
    ]
    assert callers == [("train.py", "open_test_split")]
