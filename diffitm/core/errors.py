"""The exceptions that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong: the message names its value and what would be right.

    `field` is the argument or option that it was given by, None where the message says it. The message
    follows it, with a space or, where it begins with a colon, as it is.
    """

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message, field)
        self.message, self.field = message, field

    def __str__(self) -> str:
        return self._after(self.field)

    def on_command_line(self) -> str:
        """The message with the field as an option: --held-out."""
        return self._after(self.field and flag(self.field))

    def _after(self, name: str | None) -> str:
        if name is None:
            return self.message
        return name + self.message if self.message.startswith(":") else f"{name} {self.message}"


def flag(field: str) -> str:
    """The option of a field; a trailing underscore keeps a field from being a keyword."""
    return "--" + field.rstrip("_").replace("_", "-")


class Unavailable(Exception):  # noqa: N818, it is no error of this run
    """Something outside (an object store, the Hub, a GPU of every node) did not answer for long. Nothing
    that was written is lost, and the same command goes on once it is back."""


class Incomplete(Exception):  # noqa: N818, it is no error
    """A run came to its end and wrote everything, but some of its examples, images or files could not
    be used: the message says how many, and where they are listed. Raised last."""


LISTED = 60  # names that a message lists


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean x?' for the nearest known name, and the list of all of them, of many names the
    nearest few."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    if len(names) <= LISTED:
        return f"{hint} Known: {', '.join(names)}"
    others = f" Near: {', '.join(near)}." if len(near) > 1 else ""
    return f"{hint}{others} {len(names)} are known"
