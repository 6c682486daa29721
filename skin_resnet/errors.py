"""The exception for mistakes of the user, and what its messages need."""

import re
from pathlib import Path


class UserError(Exception):
    """A mistake in what the user gave, in one line: what is wrong, the value, and the fix.

    The command line prints the message on stderr and exits with code 2; it never shows a traceback for it.
    """

    def __str__(self) -> str:
        """Return the message on one line, whatever the names and reasons in it hold."""
        return " ".join(super().__str__().splitlines())


def expand(path: str | Path) -> Path:
    """Replace a leading `~` or `~user` by the home folder.

    Raises:
        UserError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"cannot expand {str(path)!r}: there is no such user; write the path in full."
        ) from None


def expand_cache(cache_dir: Path) -> Path:
    """Return the folder of a cache_dir, whose default `auto` is `~/.cache/skin-resnet`.

    `mlflow run` logs a default with `~` quoted as for a shell, and a param cannot be corrected.

    Raises:
        UserError: The user in it does not exist.
    """
    return expand("~/.cache/skin-resnet" if str(cache_dir) == "auto" else cache_dir)


def hide_password(text: str) -> str:
    """Return a URI, or a text that contains some, without user names and passwords."""
    # A password may contain what otherwise ends the host: postgresql://user:a/b@host.
    return re.sub(r"(?<=://)([^\s/?#]*|[^\s:/@]+:[^\s@]*)@", "***@", text)
