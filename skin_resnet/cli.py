"""The command line, `skin-resnet COMMAND`: options from the configs."""

import argparse
import contextlib
import ctypes
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from pkgutil import resolve_name
from types import UnionType
from typing import Any, Literal, NoReturn, TextIO, Union, get_args, get_origin

import skin_resnet
from skin_resnet.config import GROUPS
from skin_resnet.errors import UserError, expand
from skin_resnet.options import SEVERAL, FrozenConfig, format_value
from skin_resnet.training import get_worker_task, ignore_foreign_ranks, interrupts

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
USER_ERROR = 2  # the exit code that shells and argparse use for a wrong call

# Command: its config, and what runs it, by name: `--help` and a mistyped option should not wait for torch.
COMMANDS = {
    "train": ("skin_resnet.config:TrainConfig", "skin_resnet.commands.train:train"),
    "search": ("search.config:SearchConfig", "search.run:search"),
    "evaluate": ("skin_resnet.commands.config:EvaluateConfig", "skin_resnet.commands.evaluate:evaluate"),
    "predict": ("skin_resnet.commands.config:PredictConfig", "skin_resnet.commands.predict:predict"),
    "compare": ("skin_resnet.commands.config:CompareConfig", "skin_resnet.commands.compare:compare"),
    "promote": ("skin_resnet.commands.config:PromoteConfig", "skin_resnet.commands.promote:promote"),
    "audit": ("skin_resnet.commands.config:AuditConfig", "skin_resnet.commands.audit:audit"),
    "export": ("skin_resnet.commands.config:ExportConfig", "skin_resnet.commands.export:export"),
    "reproduce": ("skin_resnet.commands.config:ReproduceConfig", "skin_resnet.commands.reproduce:reproduce"),
    "app": ("skin_resnet.commands.config:AppConfig", "skin_resnet.commands.app:app"),
    "doctor": ("skin_resnet.commands.config:DoctorConfig", "skin_resnet.commands.doctor:doctor"),
    "clean": ("skin_resnet.commands.config:CleanConfig", "skin_resnet.commands.clean:clean"),
}

# Completes in bash and zsh at once, for it starts no Python.
_COMPLETION = """\
[ -z "${ZSH_VERSION-}" ] || { autoload -U compinit bashcompinit; compinit; bashcompinit; }
_skin_resnet() {
  case "$COMP_CWORD ${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in
%s
    *) set -- ;;
  esac
  COMPREPLY=($(compgen -W "$*" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _skin_resnet skin-resnet
"""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit: 0 when done, 2 after a user's mistake, 128 + n after signal n."""
    ignore_foreign_ranks()
    if is_worker := get_worker_task() is not None:
        interrupts.ignore()  # they are for its parent, which ends it
    with protect_output():
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        logging.getLogger("skin_resnet").setLevel(logging.INFO)
        try:
            with contextlib.nullcontext() if is_worker else interrupts.handled():
                code = _run_command(sys.argv[1:] if arguments is None else list(arguments))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = USER_ERROR
        except KeyboardInterrupt as interrupt:
            number = interrupt.args[0] if interrupt.args else signal.SIGINT
            print(f"interrupted by {signal.Signals(number).name}", file=sys.stderr)
            code = 128 + number
    sys.exit(code)


def _run_command(arguments: list[str]) -> int:
    command, *options = arguments or ["--help"]
    if command in {"-h", "--help"}:
        print(_describe_commands())
    elif command == "--version":
        print(f"skin-resnet {skin_resnet.__version__}")
    elif command == "--completion":
        print(_write_completion(), end="")
    elif {"-h", "--help"} & set(options):
        print(_build_parser(load_config_type(command), command).format_help(), end="")
    else:
        config = parse_options(command, options)
        if get_worker_task():
            _end_with_parent(signal.SIGKILL)
        elif "MLFLOW_RUN_ID" in os.environ:  # started by `mlflow run`, which has opened a run for us
            _end_with_parent(signal.SIGTERM)
        else:
            config.check_paths()  # within a run the command does, and the run shows the reason
        return resolve_name(COMMANDS[command][1])(config) or 0
    return 0


def load_config_type(command: str) -> type[FrozenConfig]:
    """Return the config class of a command.

    Raises:
        UserError: There is no such command.
    """
    if command not in COMMANDS:
        raise UserError(f"unknown command {command}; {_suggest(command, COMMANDS, '')}")
    config_type: type[FrozenConfig] = resolve_name(COMMANDS[command][0])
    return config_type


def parse_options(command: str, arguments: Sequence[str]) -> Any:
    """Return the config of a command from what was typed after it.

    Required options may be given without their names: `evaluate RUN_ID`. What is typed overrides the file
    of `--config`.

    Raises:
        UserError: An option is unknown, missing, given twice or without a value, or its value is refused.
    """
    config_type = load_config_type(command)
    fields = config_type.model_fields
    typed, words = _build_parser(config_type, command).parse_known_args(arguments)
    for name, values in vars(typed).items():
        if len(values) > 1:
            raise UserError(f"option --{name} is given {len(values)} times")
    options = {name: values[0] for name, values in vars(typed).items()}
    file = options.pop("config", "")
    from_file, where = (_read_options(file), f" (with --config {file})") if file else ({}, "")
    for name in (*(word.partition("=")[0].lstrip("-") for word in words if word.startswith("-")), *from_file):
        if name not in fields:
            raise UserError(f"unknown option --{name}; {_suggest(name, fields, '--')}{where}")
    for name, field in fields.items():
        if words and field.is_required() and name not in options:
            takes_all = SEVERAL in field.metadata
            options[name] = "\n".join(words) if takes_all else words[0]
            words = [] if takes_all else words[1:]
    if words:
        raise UserError(f"unexpected argument {words[0]!r}; options are given as --NAME VALUE")
    try:
        return config_type.model_validate(from_file | options)
    except UserError as error:
        raise UserError(f"{error}{where}") from None


def _read_options(file: str) -> dict[str, str]:
    """Read a YAML file of options, their values as text, as if they had been typed."""
    import yaml  # as slow as all else that `--help` imports

    try:
        return dict(yaml.load(expand(file).read_text(encoding="utf-8"), yaml.BaseLoader) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"--config {file} is no YAML file of NAME: VALUE, a line each: {error}") from None


def _suggest(word: str, known: Any, prefix: str) -> str:
    near = get_close_matches(word.replace("-", "_"), known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else "see --help"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message.removeprefix("argument "))


def _build_parser(config_type: type[FrozenConfig], command: str) -> argparse.ArgumentParser:
    required = [name for name, field in config_type.model_fields.items() if field.is_required()]
    parser = _Parser(
        prog=f"skin-resnet {command}",
        usage=f"%(prog)s {''.join(f'{name.upper()} ' for name in required)}[--option VALUE ...]",
        description=config_type.__doc__,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=26),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        add_help=False,
    )
    own = parser.add_argument_group(f"{command} options")
    groups = {title: parser.add_argument_group(f"{title} options") for title in GROUPS}
    for name, field in config_type.model_fields.items():
        title = next((title for title, options in GROUPS.items() if name in options.model_fields), "")
        default = "" if field.is_required() else f" (default: {format_value(field.default)})"
        text = f"{(field.description or '').removesuffix('.')}{default}"
        groups.get(title, own).add_argument(
            f"--{name}",
            action="append",  # to see what is given twice
            metavar=_describe_kind(field.annotation),
            help=text.replace("%", "%%"),
        )
    text = "YAML file of options, as each run logs one; what is typed overrides it"
    group = parser.add_argument_group("all commands")
    group.add_argument("--config", action="append", metavar="FILE", help=text)
    return parser


def _describe_kind(annotation: Any) -> str:
    """Return what stands for an option's value in its help: `N`, `PATH`, `{adam,sgd}`, `N|auto`."""
    if get_origin(annotation) is Literal:
        words = ",".join(map(str, get_args(annotation)))
        return f"{{{words}}}" if "," in words else words
    if get_origin(annotation) in {Union, UnionType}:
        return "|".join(map(_describe_kind, get_args(annotation)))
    if get_origin(annotation) is not None:  # Annotated
        return _describe_kind(get_args(annotation)[0])
    return {int: "N", float: "X", Path: "PATH"}.get(annotation, "TEXT")


def _write_completion() -> str:
    cases = [f'"1 "*) set -- "{" ".join(COMMANDS)}" ;;']
    for command in COMMANDS:
        fields = load_config_type(command).model_fields
        kinds = {name: _describe_kind(field.annotation) for name, field in fields.items()} | {
            "config": "FILE"
        }
        for name, kind in kinds.items():  # choices are in lower case, placeholders are not
            cases.append(f'*" {command} --{name}") set -- "{" ".join(re.findall("[a-z0-9_]+", kind))}" ;;')
        cases.append(f'*" {command} "*) set -- "--{" --".join(kinds)}" ;;')
    return _COMPLETION % "\n".join(f"    {case}" for case in cases)


def _describe_commands() -> str:
    docs = {command: load_config_type(command).__doc__ or "" for command in COMMANDS}
    rows = [f"  {command:10} {re.split('[;.]', doc)[0]}" for command, doc in docs.items()]
    usage = "usage: skin-resnet COMMAND [--option VALUE ...]\n       skin-resnet COMMAND --help\n"
    return "\n".join([usage, "commands:", *rows])


class _Output(io.FileIO):
    """A file descriptor that drops what cannot be written: a closed pipe or full disk must not end a run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # for child processes, too
            os.close(null)
            return len(data)


@contextlib.contextmanager
def protect_output() -> Iterator[None]:
    """Let no failure to write to stdout or stderr end what runs in this block."""
    for descriptor in range(3):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:  # a test's own stream stays
        sys.stdout = _protect(1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protect(2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _protect(descriptor: int) -> TextIO:
    file = io.BufferedWriter(_Output(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, errors="backslashreplace", line_buffering=True)


def _end_with_parent(number: int) -> None:
    """Let the kernel send a signal to this process when its parent dies (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
