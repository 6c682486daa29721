"""What all options have in common: types, checks, and errors in one line."""

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from skin_resnet.errors import UserError


def _check_text(value: Any) -> Any:
    """Refuse what can be neither a name nor a path: each later use of it would fail."""
    text = str(value)
    if not text:
        raise ValueError("must not be empty")
    # 4,096 bytes is the limit for a whole path on Linux; this leaves room for the files in a folder.
    if len(os.fsencode(text)) > 2000 or any(len(os.fsencode(part)) > 255 for part in text.split(os.sep)):
        raise ValueError("is too long (at most 255 bytes per path component)")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise ValueError("names an unknown user")
    return value


Text = Annotated[str, AfterValidator(_check_text)]
FolderPath = Annotated[Path, BeforeValidator(_check_text)]
SEVERAL = "several words"  # marks an option that takes all words without a name, a line each
Words = Annotated[str, Field(min_length=1), SEVERAL]


@dataclass(frozen=True)
class MustExist:
    """Mark an option as a path that has to be there, unless it is one of these words."""

    unless: tuple[str, ...]


class FrozenConfig(BaseModel):
    """Base of all configs: unknown names are refused, and a config never changes after validation."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explain_in_one_line(cls, values: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        # UserError is no ValueError, so pydantic does not turn it into a report of many lines.
        try:
            return handler(values)
        except ValidationError as error:
            raise UserError(_explain(error, cls)) from None

    def check_paths(self) -> None:
        """Check that the given paths exist: cheap, before anything slow is imported.

        Not a validator, because the options of an earlier run are read back when its data may be gone.

        Raises:
            UserError: A path does not exist.
        """
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            words = next((rule.unless for rule in field.metadata if isinstance(rule, MustExist)), (value,))
            if value not in words and not os.path.exists(os.path.expanduser(value)):
                raise UserError(
                    f"{name} should be {', '.join(words)} or an existing path, not {_quote(value)}"
                )

    def with_changes(self, **changes: Any) -> Self:
        """Return a validated copy with some fields changed."""
        return self.model_validate({**self.model_dump(), **changes})

    def to_params(self) -> dict[str, str]:
        """Return every field as the text that `mlflow run` would log for it."""
        return {name: format_value(value) for name, value in self.model_dump().items()}


def _explain(error: ValidationError, config_type: type[FrozenConfig]) -> str:
    # What was typed wrong comes before what is missing.
    first, *others = sorted(error.errors(), key=lambda each: each["type"] == "missing")
    name = str(first["loc"][0]) if first["loc"] else "options"
    if first["type"] == "missing":
        return f"option --{name} is missing: {config_type.model_fields[name].description}"
    if first["type"] == "extra_forbidden":
        return f"unknown option {name!r}"
    if first["type"] == "value_error":  # our own
        return f"{name} {first['ctx']['error']}: {_quote(first['input'])}"
    # A field with several types, as "auto or a number", has an error for each.
    texts = [first["msg"], *(other["msg"] for other in others if other["loc"][:1] == first["loc"][:1])]
    rules = [re.sub("^(Input|String)? ?should |, unable.*", "", text) for text in texts]
    return f"{name} should {' or '.join(rules)}, not {_quote(first['input'])}".replace(" or be ", " or ")


def _quote(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... ({len(text)} characters)"


def format_value(value: object) -> str:
    """Format a value as a user would type it.

    Floats are short (`0.0003`, `1e-05`), so that MLflow shows the same param however a run was started.
    """
    return repr(value) if isinstance(value, float) else str(value)


def write_command(config: FrozenConfig, width: int = 76) -> str:
    """Return the command that trains with a config, over several lines: what differs from the defaults."""
    lines, defaults = ["skin-resnet train"], type(config).model_validate({})
    for name, value in config.model_dump().items():
        if value != getattr(defaults, name) and name not in {"resume", "register_as"}:
            word = shlex.quote(f"--{name}={format_value(value)}")
            if len(f"{lines[-1]} {word} \\") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(f"  {word}")
    return " \\\n".join(lines)
