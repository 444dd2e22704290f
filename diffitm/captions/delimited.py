"""CSV and TSV, read strictly: a broken quote or a row of another length is an error that says where."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

from diffitm.core.errors import InputError
from diffitm.core.images import is_image

Lines = Callable[[], AbstractContextManager[Iterable[str]]]
Record = tuple[int, list[str]]  # the line that it begins in, its fields
QUOTED = re.compile(r'"(?:[^"]|"")*"')
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_records(lines: Lines, where: str, delimiter: str, quoted: bool = True) -> Iterator[Record]:
    """The records that are not blank, the header too; `lines` opens the file's text, whose line ends are
    as they are.

    Raises InputError that names file, line and what is right.
    """
    with lines() as stream:
        reader = csv.reader(
            stream,
            delimiter=delimiter,
            strict=True,
            skipinitialspace=delimiter == ",",  # a, "b, c"
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        while True:
            start = reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                why = _why(str(error), delimiter)
                raise InputError(f"{where}, line {start}: not CSV: {why}") from error
            if any(field.strip() for field in fields):
                yield start, fields


def _why(error: str, delimiter: str) -> str:
    if "unexpected end" in error or "field larger" in error:
        return 'a quote opens that does not close (a quote in a quoted text is written "")'
    if "expected after" in error:
        right = (
            f'a quote in a quoted text is written "", and {SEPARATORS[delimiter]} separate fields'
        )
        return f"a quoted text goes on behind its quote ({right})"
    return error


def read_delimited(
    lines: Lines, where: str, delimiter: str
) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The header, and each row with its line and its cells by column.

    In a .tsv a quote means something only where its writer quoted: where every field with a quote in it
    is quoted as in CSV. Raises InputError that names file, line and what is right.
    """
    quoted = delimiter != "\t" or _is_quoted(lines)
    records = read_records(lines, where, delimiter, quoted)
    start, first = next(records, (1, [""]))
    header = [name.strip() for name in first]
    _check_header(where, start, header, delimiter)
    return header, _rows(records, where, header, delimiter)


def _check_header(where: str, line: int, header: list[str], delimiter: str) -> None:
    if not any(header):
        raise InputError(
            f"{where} cannot be read: it is empty; its first line must name its columns"
        )
    try:
        "".join(header).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}, line {line}: it is not UTF-8; save the file as UTF-8") from None
    if len(header) == 1:
        for other, words in SEPARATORS.items():
            if other != delimiter and other in header[0]:
                right = SEPARATORS[delimiter]
                raise InputError(
                    f"{where}, line {line}: {words} separate its columns where {right} must: "
                    f"{header[0][:60]}"
                )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise InputError(f"{where}, line {line}: two columns are named {twice[0]!r}; rename one")


def _rows(
    records: Iterator[Record], where: str, header: list[str], delimiter: str
) -> Iterator[tuple[int, dict[str, str]]]:
    for line, fields in records:
        if len(fields) != len(header):
            separator = SEPARATORS[delimiter]
            right = f"a text with {separator} in it must be quoted" if delimiter == "," else ""
            right = right or f"a text cannot have {separator} in it"
            raise InputError(
                f"{where}, line {line}: {len(fields)} fields where the first line names "
                f"{len(header)} columns ({right}): {delimiter.join(fields)[:60]!r}"
            )
        _check_swallowed(where, line, fields, delimiter)
        yield line, dict(zip(header, fields, strict=True))


def _check_swallowed(where: str, line: int, fields: list[str], delimiter: str) -> None:
    """A quote that is left open may be closed by one of a later row: then a text of several lines has a
    separator beside an image's name in it."""
    for field in fields:
        lines = field.splitlines()
        for inner in lines if len(lines) > 1 else ():
            parts = inner.split(delimiter)
            if len(parts) > 1 and any(is_image(part) and " " not in part for part in parts):
                raise InputError(
                    f"{where}, line {line}: a quote opens that does not close there, and takes in other "
                    f"rows: {inner[:60]!r}"
                )


def _is_quoted(lines: Lines) -> bool:
    """Whether the writer of a .tsv quoted as in CSV."""
    counts, bare = set[int](), False
    with lines() as stream:
        for line in stream:
            fields = line.rstrip("\r\n").split("\t")
            counts |= {len(fields)} if line.strip() else set()
            for field in fields if '"' in line else ():
                if QUOTED.fullmatch(field) and '""' in field[1:-1]:
                    return True
                bare = bare or ('"' in field and not QUOTED.fullmatch(field))
    # Texts with line breaks, which only a quoted file can hold, give lines of other lengths.
    return not bare or len(counts) > 1


def of_text(text: str) -> Lines:
    """Lines of a text that was read."""
    return lambda: io.StringIO(text, newline="")
