"""The command doctor: does all that a training needs work here? Looks, and makes nothing."""

import contextlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import skin_resnet
from skin_resnet.commands.environment import (
    INSTALL,
    Finding,
    check_device,
    check_memory,
    check_packages,
    check_python,
    describe_error,
    format_bytes,
)
from skin_resnet.config import DoctorConfig
from skin_resnet.data.folders import explain_unwritable, find_existing, find_leftovers

SOMETHING_IS_WRONG = 1  # the command's exit code
_COLUMNS, _LINES = 100, 24
_ENOUGH_DISK = 2_000_000_000  # bytes: decoded images and checkpoints of one training
_COMMANDS = ("train", "evaluate", "compare", "audit", "reproduce")
_ROOT = Path(skin_resnet.__file__).parent.parent


def doctor(config: DoctorConfig) -> int:
    """Print, on one screen, what is here and what is wrong.

    Returns:
        The exit code: 0 when nothing is wrong, else 1.
    """
    problems: dict[str, None] = {}  # one cause may be found twice
    used = 0
    with _set_variable("MLFLOW_DISABLE_TELEMETRY", "true"):  # which writes an id into the user's home
        # Not Path.expanduser, which raises where there is no home.
        for finding in _look(
            *(Path(os.path.expanduser(p)) for p in (config.cache_dir, config.checkpoint_dir))
        ):
            used += _print(_wrap(finding.text, f"{finding.topic:10}", most=2))
            problems |= dict.fromkeys(finding.problems)
    if not problems:
        _print(["", "nothing is wrong"])
        return 0
    _print_problems(list(problems), _LINES - used)
    return SOMETHING_IS_WRONG


def _look(cache_dir: Path, checkpoint_dir: Path) -> Iterator[Finding]:
    """Yield each finding as soon as it is there: importing torch and MLflow takes seconds."""
    places = {"cache_dir": cache_dir, "checkpoint_dir": checkpoint_dir}
    yield _try("code", _check_code)
    yield _try("python", check_python)
    yield _try("packages", partial(check_packages, _ROOT))
    yield _try("memory", check_memory)
    yield _try("store", partial(_check_store, cache_dir))
    yield _try("device", check_device)
    yield _try("tracking", partial(_check_tracking, places))
    yield _try("disk", partial(_check_disks, places))
    yield _try("commands", _check_commands)


def _try(topic: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except ImportError as error:
        text, problem = f"cannot be told ({describe_error(error)})", _tell_import(error)
    except Exception as error:  # what is broken here breaks in ways that nobody can list
        text = f"cannot be told ({describe_error(error)})"
        problem = f"{topic} must be there to be read, but got {describe_error(error)}; mend that."
    return Finding(topic=topic, text=text, problems=(problem,))


def _tell_import(error: BaseException) -> str:
    return (
        f"every module must import, but got {describe_error(error)}; {INSTALL}, or undo changes to the code."
    )


def _check_code() -> Finding:
    def ask_git(*arguments: str) -> str:
        # Without optional locks, as git would refresh its index.
        command = ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = ask_git("rev-parse", "--short", "HEAD")
        changed = ask_git("status", "--porcelain", "--", skin_resnet.__name__)
    except (OSError, subprocess.SubprocessError):
        return Finding(topic="code", text=f"{_ROOT}, no git checkout")
    return Finding(
        topic="code", text=f"{_ROOT}, commit {commit}{' and changes that are not in it' if changed else ''}"
    )


def _check_store(cache_dir: Path) -> Finding:
    folders = [folder for folder in (cache_dir / "stores").glob("*") if folder.is_dir()]
    leftovers = [*find_leftovers(cache_dir), *find_leftovers(cache_dir / "stores")]
    built = [folder for folder in folders if folder.suffix != ".tmp"]
    text = f"{cache_dir}: {_count(built, 'decoded store')}"
    if building := [folder for folder in folders if folder not in built + leftovers]:
        text += f"; {len(building)} being built, or killed within the hour"
    if leftovers:
        text += f"; {_count(leftovers, 'leftover')} of killed builds, which the next build removes"
    return Finding(topic="store", text=text)


def _count(folders: list[Path], noun: str) -> str:
    """Write how many folders there are, and their size together."""
    size = 0
    for path in (path for folder in folders for path in folder.rglob("*")):
        with contextlib.suppress(OSError):  # its owner may be removing it
            size += path.stat().st_size if path.is_file() else 0
    return f"{len(folders)} {noun}{'' if len(folders) == 1 else 's'} ({format_bytes(size)})"


def _check_tracking(places: dict[str, Path]) -> Finding:
    """Ask the tracking store; where it keeps artifacts on this machine, they join the places to write to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's about itself
        from skin_resnet.tracking.probe import probe_tracking

        state = probe_tracking()
    if state.artifacts:
        places["artifacts"] = state.artifacts
    return Finding(topic="tracking", text=state.text, problems=(state.problem,) if state.problem else ())


def _check_disks(places: dict[str, Path]) -> Finding:
    problems: list[str] = []
    rooms: dict[int, tuple[list[str], int]] = {}  # by device: who shares it, and its free bytes
    for name, path in places.items():
        if reason := explain_unwritable(path):
            problems.append(f"{name} must be a folder that can be written, but {reason}; choose another.")
        with contextlib.suppress(OSError):  # a link to nowhere
            existing = find_existing(path)
            names, _ = rooms.get(os.stat(existing).st_dev, ([], 0))
            rooms[os.stat(existing).st_dev] = ([*names, name], shutil.disk_usage(existing).free)
    problems += [
        f"2 GB at least must be free for {' and '.join(names)}, but {format_bytes(free)} is; make room."
        for names, free in rooms.values()
        if free < _ENOUGH_DISK
    ]
    text = "; ".join(f"{format_bytes(free)} free for {', '.join(names)}" for names, free in rooms.values())
    return Finding(topic="disk", text=text or "nothing to measure", problems=tuple(problems))


def _check_commands() -> Finding:
    problems = {}
    # Matplotlib writes a list of fonts when it is imported.
    with tempfile.TemporaryDirectory() as scratch, _set_variable("MPLCONFIGDIR", scratch):
        for command in _COMMANDS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    importlib.import_module(f"skin_resnet.{command}")
            except Exception as error:  # an import can fail in any way
                problems[command] = _tell_import(error)
    able = ", ".join(command for command in _COMMANDS if command not in problems)
    text = f"{able or 'none'} can start" + (f"; {', '.join(problems)} cannot" if problems else "")
    return Finding(topic="commands", text=text, problems=tuple(problems.values()))


@contextlib.contextmanager
def _set_variable(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _print_problems(problems: list[str], room: int) -> None:
    heading = "1 thing is wrong:" if len(problems) == 1 else f"{len(problems)} things are wrong:"
    lines = ["", heading]
    for number, problem in enumerate(problems, 1):
        wrapped = _wrap(problem, f"{number}. ", most=3)
        if len(lines) + len(wrapped) + (number < len(problems)) > room:
            lines.append(f"and {len(problems) - number + 1} more; mend these and look again")
            break
        lines += wrapped
    _print(lines)


def _wrap(text: str, heading: str, most: int) -> list[str]:
    return textwrap.wrap(
        " ".join(text.split()),
        width=_COLUMNS,
        initial_indent=heading,
        subsequent_indent=" " * len(heading),
        max_lines=most,
        placeholder=" ...",
        break_on_hyphens=False,
    )


def _print(lines: list[str]) -> int:
    encoding = sys.stdout.encoding or "ascii"
    for line in lines:  # a path may have letters that the terminal has not
        print(line.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    return len(lines)
