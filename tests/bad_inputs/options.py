"""For every option of every command: an empty value, another type, just out of bounds."""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from search.config import SearchConfig
from skin_resnet.cli import COMMANDS, load_config_type
from skin_resnet.config import TrainConfig
from skin_resnet.options import FrozenConfig

CONFIGS: dict[str, type[FrozenConfig]] = {command: load_config_type(command) for command in COMMANDS}

# What the fields' own bounds do not cover.
_BY_HAND = {
    "train": [("image_size", "31"), ("image_size", "1025"), ("warmup_epochs", "11")],
    "search": [
        ("devices", "2"), ("objectives", "f1"), ("objectives", "gap,gap"), ("storage", "mysql://there"),
    ],
}  # fmt: skip


def list_bad_options() -> list[tuple[str, str, str]]:
    """Return (command, option, text)."""
    return [
        (command, name, text)
        for command, config_type in CONFIGS.items()
        for name, text in [*_list_for(config_type), *_BY_HAND.get(command, ())]
    ]


def _list_for(config_type: type[FrozenConfig]) -> Iterator[tuple[str, str]]:
    for name, field in config_type.model_fields.items():
        texts = ["", *_exceed_bounds(field.annotation, field.metadata), *_change_type(field.annotation)]
        # The search has the training's options, too: one mistake in each shows that they are checked there.
        is_inherited = config_type is SearchConfig and name in TrainConfig.model_fields
        yield from ((name, text) for text in dict.fromkeys(texts[-1:] if is_inherited else texts))


def _change_type(annotation: Any) -> tuple[str, ...]:
    """Return texts of another type."""
    kinds = get_args(annotation) if get_origin(annotation) is not Literal else ()
    if int in kinds or annotation is int:
        return ("abc", "1.5", "nan")
    if annotation is float:
        return ("abc", "nan", "1e999")
    return ("nonsense",) if get_origin(annotation) is Literal else ()


def _exceed_bounds(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    """Yield the numbers just outside."""
    for bound in metadata:
        if isinstance(bound, Gt | Lt):
            yield str(bound.gt if isinstance(bound, Gt) else bound.lt)
        elif isinstance(bound, Ge | Le):
            limit: Any = bound.ge if isinstance(bound, Ge) else bound.le
            down = isinstance(bound, Ge)
            if annotation is int:
                yield str(limit - 1 if down else limit + 1)
            else:
                yield repr(math.nextafter(limit, -math.inf if down else math.inf))
