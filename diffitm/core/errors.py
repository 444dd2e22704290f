"""The exceptions that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong: the message names it, its value and what would be right."""


class Unavailable(Exception):  # noqa: N818, it is no error of this run
    """Something outside (an object store, the Hub, a GPU of every node) did not answer for long. Nothing
    that was written is lost, and the same command goes on once it is back."""


class Incomplete(Exception):  # noqa: N818, it is no error
    """A run came to its end and wrote everything, but some of its examples, images or files could not
    be used: the message says how many, and where they are listed. Raised last."""


def suggest(name: str, known: Iterable[str]) -> str:
    """'; did you mean x?' for the nearest known name, and the list of all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known: {', '.join(names)}"
