"""Bad inputs of every kind: how each is made, and what the command that gets it must answer."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Options = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class BadInput:
    """An input that a command must refuse.

    Attributes:
        name: What is wrong with it.
        make: Writes it into an empty folder; gives the options that lead to it.
        told: What the message must hold: the value received, and words of the rule.
        command: Which command gets it.
    """

    name: str
    make: Callable[[Path], Options]
    told: tuple[str, ...]
    command: str = "train"


def list_arguments(options: Options) -> list[str]:
    return [f"--{name}={text}" for name, text in options.items()]
