"""The command line: help is quick and complete, a mistake is one line and exit code 2."""

import logging
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from skin_resnet.cli import COMMANDS, main
from skin_resnet.config import TrainConfig


@pytest.fixture(autouse=True)
def process() -> Iterator[None]:
    """Give back what `main` takes over for its own process."""
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("trian", "must be one of train, evaluate, compare, audit"),
        ("train --lrr 0.1", "'--lrr'; did you mean --lr?"),
        ("train --lr abc", "lr: must be a number, but got 'abc'"),
        ("train --lr=-1", "lr: must be greater than 0, but got -1.0"),
        ("train --arch resnet18", "arch: must be resnet50, resnet101 or resnet152, but got 'resnet18'"),
        ("train --epochs 2 --warmup_epochs 3", "warmup_epochs: must not exceed epochs"),
        ("train --epochs", "epochs: must be a whole number, but got nothing"),
        ("train --epochs --lr 1", "epochs: must be a whole number, but got nothing"),
        ("train --lr 1 --lr=2", "lr: must be given once"),
        ("train --image_size big", "image_size: must be a whole number or auto, but got 'big'"),
        ("evaluate --modle x", "'--modle'; did you mean --model?"),
        ("train 7", "but got '7' without a name"),
        ("evaluate", "model: must be given"),
        ("train --data /nowhere/at/all", "/nowhere/at/all"),
        ("train --device mps", "no mps"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str, told: str, capsys, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, _, err = run(arguments, capsys)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert told in lines[0]
    assert "Traceback" not in err


def test_help_names_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("train --help", capsys)
    assert code == 0
    for name in TrainConfig.model_fields:
        assert f"--{name} " in out
    assert "(default: adamw)" in out


@pytest.mark.parametrize("arguments", ["", "--help", "-h"])
def test_without_a_command_the_commands_are_listed(
    arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(arguments, capsys)
    assert code == 0
    assert all(f"  {name} " in out for name in COMMANDS)


def test_help_does_not_wait_for_torch_or_mlflow() -> None:
    script = (
        "import sys\nfrom skin_resnet.cli import main\n"
        "try: main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'mlflow', 'pandas')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0
    )
