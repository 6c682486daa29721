"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake in what the user gave: one line with the rule, the value received and what to do.

    The command line prints the message on stderr and exits with code 2; it never shows a traceback for it.
    """

    def __str__(self) -> str:
        """Give the message on one line, whatever the names and reasons in it hold."""
        return " ".join(super().__str__().splitlines())
