"""The command line: help is quick and complete, a mistake is one line and exit code 2."""

import itertools
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import skin_resnet
from skin_resnet.cli import COMMANDS, load_config_type, main, parse_options
from skin_resnet.config import GROUPS, TrainConfig
from skin_resnet.errors import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Restore what `main` changes in its own process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    level = logging.getLogger("skin_resnet").level
    yield
    logging.getLogger("skin_resnet").setLevel(level)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def start(command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a shell command in which `skin-resnet` is ours."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    script = f'set -o pipefail; skin-resnet() {{ "$PYTHON" -m skin_resnet "$@"; }}; {command}'
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", ["trian", "did you mean train?"]),
        ("train --lrr 0.1", ["--lrr", "did you mean --lr?"]),
        ("train --lr abc", ["lr", "'abc'", "number"]),
        ("train --epochs 2 --warmup_epochs 3", ["warmup_epochs=3", "epochs=2"]),
        ("train --epochs", ["--epochs"]),
        ("train --epochs --lr 1", ["--epochs"]),
        ("train --lr 1 --lr=2", ["--lr", "2 times"]),
        ("train --image_size big", ["image_size", "integer", "'auto'", "'big'"]),
        ("evaluate --modle x", ["--modle", "did you mean --model?"]),
        ("search --trials x", ["--trials", "did you mean --n_trials?"]),
        ("train 7", ["'7'"]),
        ("train -o 7", ["-o"]),
        ("evaluate RUN RUN", ["'RUN'"]),
        ("predict MODEL", ["--images", "missing"]),
        ("train --config nosuch.yaml", ["--config nosuch.yaml", "No such file"]),
        ("train --config a --config b", ["--config", "2 times"]),
        ("evaluate", ["--model", "missing"]),
        ("train --device mps --data demo", ["mps"]),
        ("train --coverage 1e-300", ["coverage", "0.5"]),
        ("train --coverage 1", ["coverage", "0.999"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str, words: list[str], capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, _, err = run(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert not [word for word in words if word not in lines[0]], lines[0]
    assert "Traceback" not in err


# Options that may be a path or become part of one; the paths are too long, or of no user.
PATH_OPTIONS = [
    f"{command} --{name}"
    for command in COMMANDS
    for name, field in load_config_type(command).model_fields.items()
    if field.annotation in {str, Path} and name not in {"runs", "objectives", "fix", "images"}
]
BAD_PATHS = [
    *itertools.product(PATH_OPTIONS, ["~nosuchuser/x", "x" * 300, "x/" * 2500]),
    *itertools.product(["train --data", "train --split", "train --weights"], ["nosuch"]),
]


@pytest.mark.parametrize(("option", "path"), BAD_PATHS)
def test_an_impossible_path_is_one_line_and_opens_no_run(
    option: str, path: str, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    code, out, err = run(f"{option} {path}", capsys)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {option.partition('--')[2]} ")
    assert len(err) < 400
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", ["train --help", "train --lrr 1", "search -h", "train --data nosuch", "--completion"]
)
def test_help_and_mistakes_do_not_wait_for_torch_or_mlflow(arguments: str) -> None:
    script = (
        "import sys\nfrom skin_resnet.cli import main\n"
        f"try: main({arguments.split()})\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'mlflow', 'optuna', 'pandas', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_with_its_default_in_80_columns(command: str, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = run(f"{command} --help", capsys)
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    for name, field in load_config_type(command).model_fields.items():
        assert f"--{name} " in words
        assert field.is_required() or f"(default: {field.default})" in words


@pytest.fixture
def options(tmp_path: Path) -> Path:
    """A file of options as a run logs it."""
    config = TrainConfig(lr=1e-05, epochs=3, allow_leaks="true", checkpoint_dir=Path("made"))
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json"), default_flow_style=False))
    return file


def test_the_options_of_a_run_are_read_from_its_file_and_what_is_typed_overrides_them(options: Path) -> None:
    expected = TrainConfig(lr=1e-05, epochs=3, allow_leaks="true", checkpoint_dir=Path("made"))
    assert parse_options("train", ["--config", str(options)]) == expected
    typed = parse_options("search", ["--lr", "0.5", f"--config={options}", "--n_trials=2"])
    assert (typed.lr, typed.epochs, typed.n_trials) == (0.5, 3, 2)


def test_options_of_a_file_are_written_as_they_are_typed(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("# mine\nlr: 1e-4\nallow_leaks: false\nweights: none\nsplit_seed: 007\n")
    config = parse_options("train", ["--config", str(file)])
    assert (config.lr, config.allow_leaks, config.weights, config.split_seed) == (1e-4, "false", "none", 7)
    file.write_text("")
    assert parse_options("train", ["--config", str(file)]) == TrainConfig()
    file.write_text("model: a\n")
    assert parse_options("evaluate", ["--config", str(file)]).model == "a"
    assert parse_options("evaluate", ["b", "--config", str(file)]).model == "b"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lrr: 1", ["--lrr", "did you mean --lr?"]),
        ("lr: much", ["lr should", "'much'"]),
        ("epochs: [1, 2]", ["epochs", "['1', '2']"]),
        ("epochs: 2\nwarmup_epochs: 3", ["warmup_epochs=3", "epochs=2"]),
        ("just text", ["NAME: VALUE"]),
        ("- a list", ["NAME: VALUE"]),
        ("lr: 'open", ["NAME: VALUE"]),
        ("\0", ["NAME: VALUE"]),
    ],
)
def test_what_is_wrong_in_a_file_of_options_is_said_with_its_name(
    text: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse_options("train", ["--config", str(file)])
    assert not [word for word in (*words, str(file)) if word not in str(error.value)], str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("", list(COMMANDS)),
        ("tr", ["train"]),
        ("train ", [f"--{name}" for name in (*TrainConfig.model_fields, "config")]),
        ("train --lr 1 --lab", ["--label_smoothing"]),
        ("train --arch ", ["resnet50", "resnet101", "resnet152"]),
        ("train --lr 0.1 --epochs 3 --seed 1 --augment cr", ["crops"]),
        ("train --image_size ", ["auto"]),
        ("compare RUN --split ", ["val", "test"]),
        ("train --split ", []),
        ("train --config ", []),
        ("predict MODEL im", []),
        ("nosuch ", []),
    ],
)
def test_bash_completes_commands_options_and_choices(typed: str, expected: list[str], capsys) -> None:
    _, script, _ = run("--completion", capsys)
    words = f"skin-resnet {typed}".split(" ")
    call = f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1}\n_skin_resnet skin-resnet"
    command = f'{script}\ncomplete -p skin-resnet >&2\n{call}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=False)
    assert done.stdout.split() == expected
    assert done.stderr == "complete -o default -F _skin_resnet skin-resnet\n", "else files are completed"


def test_the_package_offers_its_main_names_without_waiting_for_them() -> None:
    script = (
        "import sys, skin_resnet\n"
        "assert not {'torch', 'pydantic', 'mlflow'} & set(sys.modules)\n"
        "from skin_resnet import TrainConfig\n"
        "assert not {'torch', 'mlflow'} & set(sys.modules)\n"
        "assert TrainConfig is sys.modules['skin_resnet.config'].TrainConfig\n"
        "assert not hasattr(skin_resnet, 'nosuch')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_groups_the_options_and_each_is_in_one_group(capsys) -> None:
    _, out, _ = run("train --help", capsys)
    titles = [line.removesuffix(" options:") for line in out.splitlines() if line.endswith(" options:")]
    assert titles == list(GROUPS)
    grouped = [name for options in GROUPS.values() for name in options.model_fields]
    assert grouped == list(TrainConfig.model_fields)


@pytest.mark.parametrize("arguments", ["", "--help", "-h"])
def test_without_a_command_the_commands_are_listed(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)
    assert max(map(len, out.splitlines())) <= 80


def test_the_version_is_printed(capsys) -> None:
    assert run("--version", capsys)[:2] == (0, f"skin-resnet {skin_resnet.__version__}\n")


def test_every_command_exists() -> None:
    assert all(callable(resolve_name(function)) for _, function in COMMANDS.values())


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("skin-resnet train --help | head -1", 0),
        ("skin-resnet train --help > /dev/full", 0),
        ("skin-resnet train --help >&-", 0),
        ("skin-resnet train --lrr 1 2>&-", 2),
        ("skin-resnet train --lrr 1 2> /dev/full", 2),
    ],
)
def test_output_that_nobody_reads_is_no_failure(command: str, code: int) -> None:
    done = start(command)
    assert (done.returncode, done.stderr) == (code, "")


def test_what_is_printed_after_a_closed_pipe_is_dropped_and_no_file_takes_its_place(tmp_path) -> None:
    script = (
        "from skin_resnet.cli import protect_output\n"
        "with protect_output():\n"
        "    file = open('kept', 'w')\n"
        "    for _ in range(50_000): print('a line that nobody reads')\n"
        "    file.write('whole')\n"
    )
    for redirection in ("| head -1", ">&-", "> /dev/full"):
        done = start(f'"$PYTHON" -c "{script}" {redirection}', tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "kept").read_text() == "whole"


def test_a_users_search_py_does_not_replace_ours(tmp_path) -> None:
    (tmp_path / "search.py").write_text("raise SystemExit('theirs')")
    done = start("skin-resnet search --help", tmp_path)
    assert done.returncode == 0
    assert "--n_trials" in done.stdout


def test_a_wheel_has_the_command_and_works_from_any_folder(tmp_path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    for package in ("skin_resnet", "search"):
        shutil.copytree(ROOT / package, source / package)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", site, source], check=True)
    assert list(site.glob("skin_resnet/data/*.csv"))
    assert list(site.glob("skin_resnet/commands/*.html"))
    (tmp_path / "search.py").write_text("raise SystemExit('theirs')")
    for arguments in (["--version"], ["search", "--help"]):
        command = [sys.executable, site / "bin/skin-resnet", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert "skin-resnet" in done.stdout
