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
LINE_END = re.compile(r"\r\n|\r|\n")
# A name as a table has it: of a file with an ending, or a number.
NAMED = re.compile(r"\.[A-Za-z]\w{1,4}$|^\d+$")
LIMIT = 2**24  # characters of a field
SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def read_records(lines: Lines, where: str, delimiter: str, quoted: bool = True) -> Iterator[Record]:
    """The records that are not blank, the header too; `lines` opens the file's text, whose line ends are
    as they are.

    Raises InputError that names file, line and what is right.
    """
    csv.field_size_limit(max(LIMIT, csv.field_size_limit()))  # its own is 131,072
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
    open_quote = 'a quote opens that does not close (a quote in a quoted text is written "")'
    if "field larger" in error:
        return f"a field has more than {LIMIT:,} characters, or {open_quote}"
    if "unexpected end" in error:
        return open_quote
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
    return header, _rows(records, where, header, delimiter, lines)


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
    records: Iterator[Record], where: str, header: list[str], delimiter: str, lines: Lines
) -> Iterator[tuple[int, dict[str, str]]]:
    all_quoted = False
    for line, fields in records:
        if len(fields) != len(header):
            separator = SEPARATORS[delimiter]
            right = f"a text with {separator} in it must be quoted" if delimiter == "," else ""
            right = right or f"a text cannot have {separator} in it"
            raise InputError(
                f"{where}, line {line}: {len(fields)} fields where the first line names "
                f"{len(header)} columns ({right}): {delimiter.join(fields)[:60]!r}"
            )
        # Looked at once: of a file that is quoted the other rows are as they should be, too.
        all_quoted = all_quoted or _check_swallowed(where, line, fields, delimiter, lines)
        yield line, dict(zip(header, fields, strict=True))


def _check_swallowed(
    where: str, line: int, fields: list[str], delimiter: str, lines: Lines
) -> bool:
    """A quote that is left open may be closed by one of a later row: then a text of several lines has
    rows in it.

    Returns whether it looks so. Raises InputError, unless the whole file is quoted: such a quote would
    not be closed there.
    """
    for column, field in enumerate(fields):
        parts = LINE_END.split(field)
        number = _swallowed(parts, fields, column, delimiter) if len(parts) > 1 else None
        if number is not None and not _quotes_all(lines, delimiter):
            raise InputError(
                f"{where}, line {line}: a quote opens that does not close there, and takes in other "
                f"rows: {parts[number][:60]!r} of line {line + number} (if that is a text, quote every "
                "field of the file)"
            )
        if number is not None:
            return True
    return False


def _swallowed(lines: list[str], fields: list[str], column: int, delimiter: str) -> int | None:
    """Which line of a field looks like another row: by an image's name beside a separator, or because
    each of them is one but for the quotes."""
    for number, inner in enumerate(lines):
        parts = inner.split(delimiter)
        if len(parts) > 1 and any(is_image(part) and " " not in part for part in parts):
            return number
    return 1 if _are_rows(lines, fields, column, delimiter) else None


def _are_rows(lines: list[str], fields: list[str], column: int, delimiter: str) -> bool:
    """Whether the lines of a field, less its quotes, would each be a row like the one that it stands in:
    of as many fields, with names where that has names."""
    first, *between, last = [[part.strip() for part in line.split(delimiter)] for line in lines]
    before, behind = len(fields[:column]), len(fields[column + 1 :])
    rows = [[""] * before + first, *(row for row in between if any(row)), last + [""] * behind]
    if any(len(row) != len(fields) for row in rows) or len(fields) == 1:
        return False
    others = [n for n in range(len(fields)) if n != column]
    named = [n for n in others if NAMED.search(fields[n].strip())]
    if not named and any(f"{delimiter} " in line for line in lines):
        return False  # "Outside, a dog": a sentence, where nothing tells it from a row
    return all(_are_alike(fields[n].strip(), row[n]) for row in rows for n in named or others)


def _are_alike(own: str, other: str) -> bool:
    """Whether two cells may be of one column: a name with an ending, a number, a word, or anything."""
    if not other:
        return True
    if NAMED.search(own):
        return NAMED.search(other) is not None and own.isdigit() == other.isdigit()
    return " " in own or " " not in other


def _quotes_all(lines: Lines, delimiter: str) -> bool:
    """Whether each field behind the header is quoted: then a quote that is left open is an error of
    another kind, and no line of a text is a row."""
    with lines() as stream:
        rows = iter(stream)
        next(csv.reader(rows, delimiter=delimiter), None)
        # What is not quoted becomes a number, or cannot.
        reader = csv.reader(
            rows,
            delimiter=delimiter,
            skipinitialspace=delimiter == ",",
            quoting=csv.QUOTE_NONNUMERIC,
        )
        try:
            return all(isinstance(field, str) for row in reader for field in row)
        except (ValueError, csv.Error):
            return False


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
