"""The commands of `python -m skin_resnet`: options from the configs, mistakes told in one line."""

import contextlib
import io
import logging
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from skin_resnet import interrupts
from skin_resnet.config import (
    AuditConfig,
    CompareConfig,
    DoctorConfig,
    EvaluateConfig,
    FrozenConfig,
    ReproduceConfig,
    TrainConfig,
)
from skin_resnet.errors import UserError

USER_ERROR = 2  # what shells and argparse use for a wrong call


def _run_train(config: TrainConfig) -> None:
    # Here and not above: `--help` and a misspelt option should not wait for torch and MLflow.
    from skin_resnet.train import train

    train(config)


def _run_evaluate(config: EvaluateConfig) -> None:
    from skin_resnet.evaluate import evaluate

    evaluate(config)


def _run_audit(config: AuditConfig) -> int:
    from skin_resnet.audit import audit

    return audit(config)


def _run_compare(config: CompareConfig) -> None:
    from skin_resnet.compare import compare

    compare(config)


def _run_reproduce(config: ReproduceConfig) -> int:
    from skin_resnet.reproduce import reproduce

    return reproduce(config)


def _run_doctor(config: DoctorConfig) -> int:
    from skin_resnet.doctor import doctor

    return doctor(config)


# Command word: its options, and what it does. `MLproject`'s entry points are made from this table too.
COMMANDS: dict[str, tuple[type[FrozenConfig], Callable[[Any], int | None]]] = {
    "train": (TrainConfig, _run_train),
    "evaluate": (EvaluateConfig, _run_evaluate),
    "compare": (CompareConfig, _run_compare),
    "audit": (AuditConfig, _run_audit),
    "reproduce": (ReproduceConfig, _run_reproduce),
    "doctor": (DoctorConfig, _run_doctor),
}


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a command and exit, as `run_and_exit` does."""
    run_and_exit(lambda: _run_command(sys.argv[1:] if arguments is None else arguments))


def _run_command(arguments: list[str]) -> int | None:
    if not arguments or arguments[0] in {"-h", "--help"}:
        print(_describe_commands())
        return 0
    command, *options = arguments
    config_type, run = find_command(command)
    if options and not options[0].startswith("-"):
        # What a command is about may stand without its name: `reproduce RUN_ID`, `evaluate RUN_ID`.
        options.insert(0, f"--{next(iter(config_type.model_fields))}")
    return run(parse_options(config_type, options, prog=f"python -m skin_resnet {command}"))


def run_and_exit(run: Callable[[], int | None]) -> NoReturn:
    """Run what a user asked for and exit: 0 when done, 2 for a user's mistake, 128 + n after signal n."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("skin_resnet").setLevel(logging.INFO)
    try:
        with interrupts.handled():
            code = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)
    except KeyboardInterrupt as interrupt:
        number = interrupt.args[0] if interrupt.args else signal.SIGINT
        print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr)
        sys.exit(128 + number)
    sys.exit(code or 0)


def find_command(name: str) -> tuple[type[FrozenConfig], Callable[[Any], int | None]]:
    """Look a command word up.

    Raises:
        UserError: There is no such command.
    """
    if name not in COMMANDS:
        raise UserError(f"the command must be one of {', '.join(COMMANDS)}, but got {name!r}.")
    return COMMANDS[name]


def parse_options(config_type: type[FrozenConfig], arguments: list[str], prog: str) -> Any:
    """Read a command's options.

    Raises:
        UserError: An option is unknown (the message names the near one) or its value is refused.
        SystemExit: Help was asked for.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config_type, args=arguments, prog=prog, use_underscores=True)
    except SystemExit as exit_:
        if exit_.code in (0, None):
            raise
    raise UserError(_join_lines(complaint.getvalue()))


def _join_lines(box: str) -> str:
    """Turn the framed page in which tyro tells a mistake into one line."""
    lines = [line.strip("│╭╮╰╯─ \n") for line in box.splitlines()]
    kept = [line for line in lines[1:] if line and not line.startswith("For full helptext")]
    return f"{' '.join(kept)} See --help."


def _describe_commands() -> str:
    rows = [
        f"  {name:10} {(config_type.__doc__ or '').splitlines()[0]}"
        for name, (config_type, _) in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: python -m skin_resnet COMMAND [--option value ...]",
            "",
            *rows,
            "",
            "COMMAND --help lists its options.",
        ]
    )
