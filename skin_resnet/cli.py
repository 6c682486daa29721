"""The commands of `python -m skin_resnet`: options from the configs, mistakes told in one line."""

import logging
import math
import signal
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import tyro

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
from skin_resnet.training import interrupts

USER_ERROR = 2  # what shells and argparse use for a wrong call


def _run_train(config: TrainConfig) -> None:
    # Here and not above: `--help` and a misspelt option should not wait for torch and MLflow.
    from skin_resnet.commands.train import train

    train(config)


def _run_evaluate(config: EvaluateConfig) -> None:
    from skin_resnet.commands.evaluate import evaluate

    evaluate(config)


def _run_audit(config: AuditConfig) -> int:
    from skin_resnet.commands.audit import audit

    return audit(config)


def _run_compare(config: CompareConfig) -> None:
    from skin_resnet.commands.compare import compare

    compare(config)


def _run_reproduce(config: ReproduceConfig) -> int:
    from skin_resnet.commands.reproduce import reproduce

    return reproduce(config)


def _run_doctor(config: DoctorConfig) -> int:
    from skin_resnet.commands.doctor import doctor

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
    name, field = next(iter(config_type.model_fields.items()))
    if options and not options[0].startswith("-") and field.is_required():
        # What a command is about may stand without its name: `reproduce RUN_ID`, `evaluate RUN_ID`.
        options.insert(0, f"--{name}")
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
        UserError: An option is unknown (the message names the near one), is missing, lacks its value or has
            two, or the value is refused.
        SystemExit: Help was asked for.
    """
    if not any(word in {"-h", "--help"} or word.startswith("--tyro-") for word in arguments):
        # Before tyro, which tells a mistake on a framed page, with the option's whole help in it.
        _check_typed(config_type, _pair_up(config_type, arguments))
    return tyro.cli(config_type, args=arguments, prog=prog, use_underscores=True)


def _pair_up(config_type: type[FrozenConfig], arguments: list[str]) -> dict[str, str]:
    """Give what was typed for each option, which must be one of the config's."""
    typed: dict[str, str] = {}
    words = [*arguments]
    while words:
        option, has_text, text = (word := words.pop(0)).partition("=")
        name = option.removeprefix("--").replace("-", "_")
        if not option.startswith("--"):
            raise UserError(
                f"options must be typed as --NAME VALUE, but got {word!r} without a name before it."
            )
        if name not in config_type.model_fields:
            near = get_close_matches(name, config_type.model_fields, n=1)
            advice = f"did you mean --{near[0]}?" if near else "--help lists them."
            raise UserError(f"options must be the command's own, but got {option!r}; {advice}")
        if name in typed:
            raise UserError(f"{name}: must be given once, but got it twice; leave one of the two out.")
        if not has_text and words and not words[0].startswith("--"):
            text = words.pop(0)
        if not text:
            kind = _describe_kind(config_type.model_fields[name].annotation)
            raise UserError(f"{name}: must be {kind}, but got nothing; type it after {option}.")
        typed[name] = text
    return typed


def _check_typed(config_type: type[FrozenConfig], typed: dict[str, str]) -> None:
    for name, field in config_type.model_fields.items():
        if name not in typed and field.is_required():
            raise UserError(f"{name}: must be given, but is missing; add --{name} and: {field.description}")
        if name in typed and not _is_kind(field.annotation, typed[name]):
            kind = _describe_kind(field.annotation)
            raise UserError(f"{name}: must be {kind}, but got {typed[name]!r}; see --help.")


def _is_kind(annotation: Any, text: str) -> bool:
    """Say whether a text can be read as what an option is; its bounds are the config's own affair."""
    if get_origin(annotation) is Literal:
        return text in map(str, get_args(annotation))
    if annotation in (int, float):
        try:
            return math.isfinite(annotation(text))
        except (ValueError, OverflowError):
            return False
    kinds = [] if annotation is None else get_args(annotation)
    return not kinds or any(_is_kind(kind, text) for kind in kinds)


def _describe_kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        *others, last = map(str, get_args(annotation))
        return f"{', '.join(others)} or {last}" if others else last
    if get_args(annotation):
        return " or ".join(map(_describe_kind, get_args(annotation)))
    return {int: "a whole number", float: "a number", Path: "a path"}.get(annotation, "a text")


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
