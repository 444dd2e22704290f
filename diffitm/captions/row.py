"""What every reader gives: an image with its texts, each looked at once, here."""

from __future__ import annotations

import ast
import json
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from diffitm.core.schema import encodable

NO_IMAGE, NO_TEXT = "the row names no image", "the row has no text"
SHOWN = 60  # characters of a wrong value


class CaptionRow(NamedTuple):
    """An image below the data root with its texts, and captions and images that do not fit it.

    `place` says where it stands in its file, `source` what a report counts it under. `failure` is why
    it cannot be used; `text_failures` has one entry a text, None for a good one.
    """

    place: str
    image: str = ""
    texts: tuple[str, ...] = ()
    failure: str | None = None
    text_failures: tuple[str | None, ...] = ()
    source: str | None = None
    negative_captions: tuple[str, ...] = ()
    negative_images: tuple[str, ...] = ()
    empty_negatives: int = 0  # negative captions that were left out

    def each_text(self) -> Iterator[CaptionRow]:
        """A row a text, so that a bad one costs itself alone; the row as it is if it has none."""
        if not self.text_failures:
            yield self
            return
        others = self.failure if self.failure not in self.text_failures else None
        for text, failure in zip(self.texts, self.text_failures, strict=True):
            failure = others or failure
            yield self._replace(texts=(text,), failure=failure, text_failures=(failure,))


class Columns(NamedTuple):
    """Names of a table's columns; None for one that is found by its usual names."""

    image: str | None = None
    text: str | None = None
    source: str | None = None


class Reading(NamedTuple):
    """What is wanted of the rows. `texts`, if not None, are those of every image instead of its own (none
    at all for images alone); `field` is the option that the data was given by."""

    columns: Columns = Columns()
    texts: tuple[str, ...] | None = None
    negatives: bool = False
    field: str = "data"


def make_row(
    reading: Reading,
    place: str,
    image: Any,
    texts: Any,
    source: Any = None,
    negatives: tuple[Any, Any] = (None, None),
) -> CaptionRow:
    """The row of an image and its text or list of texts, whatever a file holds in their place."""
    values: Sequence[Any]
    if reading.texts is not None:
        values = reading.texts
    else:
        values = texts if isinstance(texts, list | tuple) else [] if texts is None else [texts]
    faults = tuple(map(text_fault, values))
    failure = image_fault(image) or next((fault for fault in faults if fault), None)
    if failure is None and not values and reading.texts is None:
        failure = NO_TEXT
    lists = [value if value is not None else [] for value in negatives]
    for name, value in zip(("negative captions", "negative images"), lists, strict=True):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            failure = failure or f"its {name} are no list of texts: {shown(value)}"
            lists = [[], []]
    captions = [text for text in lists[0] if not is_blank(text)]
    return CaptionRow(
        place,
        _safe(image),
        tuple(map(_safe, values)),
        failure,
        faults,
        None if source is None else _safe(source),
        tuple(map(_safe, captions)),
        tuple(map(_safe, lists[1])),
        len(lists[0]) - len(captions),
    )


def is_blank(text: str) -> bool:
    """Whether a text shows nothing: blanks, control characters, those of no width, a byte-order mark."""
    return all(char.isspace() or unicodedata.category(char) in ("Cc", "Cf") for char in text)


def text_fault(value: Any) -> str | None:
    """Why a value is no text to score or to learn from; None if it is one."""
    if isinstance(value, str) and not is_blank(value):
        return _encoding_fault("a text", value)
    if value is None or isinstance(value, str):
        return NO_TEXT
    return f"a text is {_kind(value)}: {shown(value)}"


def image_fault(value: Any) -> str | None:
    """Why a value is no path of an image; None if it is one."""
    if isinstance(value, str) and value.strip():
        return _encoding_fault("the image's path", value)
    if value is None or isinstance(value, str):
        return NO_IMAGE
    return f"the image is {_kind(value)} where a path is expected: {shown(value)}"


def _encoding_fault(what: str, value: str) -> str | None:
    return None if value == encodable(value) else f"{what} is not UTF-8: {shown(value)}"


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", dict: "an object"}
    return kinds.get(type(value), "a list" if isinstance(value, list | tuple) else "no text")


def shown(value: Any) -> str:
    """A wrong value for a message."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return _safe(text)[:SHOWN]


def _safe(value: Any) -> str:
    """The value as text that every file and terminal takes."""
    return encodable("" if value is None else value if isinstance(value, str) else str(value))


def parse_texts(value: Any) -> Any:
    """The texts that a cell of a text table holds if it is a list of texts and of nothing else; the cell
    itself, which may well begin with a bracket, if not."""
    if not isinstance(value, str) or not value.strip().startswith("["):
        return value
    found = parse_list(value.strip())
    is_list = isinstance(found, list) and all(isinstance(item, str) for item in found)
    return found if is_list else value


def parse_list(value: Any) -> Any:
    """The list that a cell of a text table holds, as JSON or as Python writes it; else the cell itself."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return []
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
