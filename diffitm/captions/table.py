"""Tables of images and captions: CSV, TSV, JSON lines, Parquet and the JSON files of the field."""

from __future__ import annotations

import codecs
import contextlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.captions.delimited import read_delimited
from diffitm.captions.held_images import batches, has_all, holds_image, reference
from diffitm.captions.json_file import parse_json, read_entries
from diffitm.captions.row import CaptionRow, Reading, make_row, parse_list, parse_texts, shown
from diffitm.core import storage
from diffitm.core.errors import InputError, suggest
from diffitm.core.images import row_of

log = logging.getLogger("diffitm")
BATCH, BATCH_OF_IMAGES = 2000, 100  # rows
# The first is taken where it is there; of the others there may be one.
IMAGE_NAMES = ("image", "image_path", "file_name", "filepath", "filename", "path", "img")
TEXT_NAMES = ("caption", "captions", "text", "texts", "prompt", "title")
NEGATIVE_CAPTIONS = ("negative_captions", "neg_caption")
NEGATIVE_IMAGES, NEGATIVE_LINES = "negative_images", "neg_image"
BY_NUMBER = "\0row "  # before a number of NEGATIVE_LINES, until the file's rows are known
DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
ENDINGS = (".parquet", *DELIMITERS, *JSON_LINES, ".json")
Place = tuple[str | None, str | None, str | None]  # columns of image, text and source


def is_table(uri: str) -> bool:
    """Whether a file's ending is that of a table."""
    return storage.without_query(uri).lower().endswith(ENDINGS)


def read_table(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    """The rows of a table, one after the other; one that is wrong has a failure.

    Raises InputError for a file that cannot be read, naming the line where there are lines, and for a
    column that is not there.
    """
    name = storage.without_query(uri).lower()
    if name.endswith(".parquet"):
        rows = _parquet(uri, reading)
    elif name.endswith(tuple(DELIMITERS)):
        rows = _delimited(uri, DELIMITERS[name[-4:]], reading)
    elif name.endswith(JSON_LINES):
        rows = _json_lines(uri, reading)
    else:
        rows = _json_file(uri, reading)
    try:
        yield from _with_images(uri, rows) if reading.negatives else rows
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", reading.field) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f": {uri} cannot be read: {error}", reading.field) from error


@contextlib.contextmanager
def open_text(uri: str) -> Iterator[io.TextIOBase]:
    """A file's text with its line ends as they are; bytes that are not UTF-8 become lone surrogates, which
    costs their row alone. Raises InputError for UTF-16 and UTF-32."""
    found, path = storage.filesystem(uri)
    with found.open_input_stream(path, compression=None) as stream:
        start = stream.read(4)
    kind = _encoding(start)
    if kind is not None:
        raise InputError(f"{uri} cannot be read: it is {kind}; save the file as UTF-8")
    with found.open_input_stream(path, compression=None, buffer_size=2**20) as stream:
        yield io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")


def _encoding(start: bytes) -> str | None:
    """The encoding of a file that is not UTF-8 by its first four bytes: a byte-order mark, else the zeros
    of the wide characters that a column's name or a bracket is then."""
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = start[:2].count(0)
    return None if not zeros else "UTF-32" if start.count(0) == 3 else "UTF-16"


def _delimited(uri: str, delimiter: str, reading: Reading) -> Iterator[CaptionRow]:
    header, lines = read_delimited(lambda: open_text(uri), uri, delimiter)
    columns = _columns(uri, header, reading)
    for number, line in lines:
        yield _row(reading, f"line {number}", line, columns, uri, as_lists=True)


def _with_images(uri: str, rows: Iterable[CaptionRow]) -> Iterator[CaptionRow]:
    """Rows with the images of those rows of the file that negative images give by number."""
    held = list(rows)
    if not any(name.startswith(BY_NUMBER) for row in held for name in row.negative_images):
        yield from held
        return
    outside = 0
    for row in held:
        given = [name.removeprefix(BY_NUMBER) for name in row.negative_images]
        if given == list(row.negative_images):
            yield row
            continue
        numbers = [int(number) for number in given]
        images = tuple(held[n].image for n in numbers if 0 <= n < len(held) and held[n].image)
        outside += len(numbers) - len(images)
        yield row._replace(negative_images=images)
    if outside:
        log.warning("%s: left out %s negative images: it has no such rows", uri, f"{outside:,}")


def _json_lines(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    with open_text(uri) as stream:
        for number, text in enumerate(stream, 1):
            if text.strip():
                place = f"line {number}"
                try:
                    yield _row(reading, place, parse_json(text), None, uri)
                except (ValueError, RecursionError) as error:
                    yield CaptionRow(place, failure=f"it is not JSON: {error}")


def _json_file(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    with open_text(uri) as stream:
        text = stream.read()
    for place, entry in read_entries(text, uri, reading.texts is None):
        if isinstance(entry, CaptionRow):
            yield entry
        elif isinstance(entry, tuple):
            yield make_row(reading, place, *entry)
        else:
            yield _row(reading, place, entry, None, uri)


def _parquet(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    found, path = storage.filesystem(uri)
    with found.open_input_file(path) as stream:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        columns = _columns(uri, names, reading)
        more = [*NEGATIVE_CAPTIONS, NEGATIVE_IMAGES, NEGATIVE_LINES] if reading.negatives else []
        kept = list(dict.fromkeys(n for n in (*columns, *more) if n is not None and n in names))
        twice = [name for name in kept if names.count(name) > 1]
        if twice:
            raise InputError(f"{uri}: two columns are named {twice[0]!r}; rename one")
        image = columns[0] or ""
        encoded = holds_image(file.schema_arrow.field(image).type)
        if encoded and image != "image":
            raise InputError(f"{uri}: images themselves must be in a column image, not {image}")
        beside = encoded and not has_all(file, image)
        kept = [name for name in kept if name != image or not encoded or beside]
        number = 0
        for lines in batches(file, kept, BATCH_OF_IMAGES if beside else BATCH):
            for line in lines:
                if encoded:
                    place = row_of(storage.name(uri), number)
                    line[image] = reference(place, line[image]) if beside else place
                yield _row(reading, f"row {number}", line, columns, uri)
                number += 1


def _row(
    reading: Reading,
    place: str,
    line: Any,
    columns: Place | None,
    uri: str,
    as_lists: bool = False,
) -> CaptionRow:
    """The row of a line by column. Without `columns` these are the line's own; `as_lists`: its lists are
    written as texts."""
    if not isinstance(line, Mapping):
        return CaptionRow(place, failure=f"it is no object with an image and a text: {shown(line)}")
    if columns is None:
        try:
            columns = _columns(uri, list(line), reading)
        except InputError as error:
            return CaptionRow(place, failure=str(error))
    image, text, source = (None if name is None else line.get(name) for name in columns)
    text = parse_texts(text) if as_lists else text
    negatives: tuple[Any, Any] = (None, None)
    if reading.negatives:
        captions = next((line[name] for name in NEGATIVE_CAPTIONS if name in line), None)
        images = line.get(NEGATIVE_IMAGES, line.get(NEGATIVE_LINES))
        if as_lists:
            captions, images = parse_list(captions), parse_list(images)
        if NEGATIVE_IMAGES not in line and isinstance(images, list):
            digits = [str(n) for n in images]
            if all(re.fullmatch(r"-?[0-9]+", n) for n in digits):
                images = [f"{BY_NUMBER}{n}" for n in digits]
            else:
                images = shown(images)
        negatives = captions, images
    return make_row(reading, place, image, text, source, negatives)


def _columns(uri: str, names: Sequence[str], reading: Reading) -> Place:
    """The columns that are read. Raises InputError."""
    wanted = reading.columns
    image = _column(uri, names, wanted.image, IMAGE_NAMES, "image_column")
    text = source = None
    if reading.texts is None:
        text = _column(uri, names, wanted.text, TEXT_NAMES, "text_column")
    if wanted.source is not None:
        source = _column(uri, names, wanted.source, (), "source_column")
    return image, text, source


def _column(
    uri: str, names: Sequence[str], name: str | None, usual: Sequence[str], field: str
) -> str:
    if name is not None:
        if name not in names:
            raise InputError(f"{name!r}: {uri} has no such column{suggest(name, names)}", field)
        return name
    there = [n for n in usual if n in names]
    if len(there) == 1 or usual[0] in there:
        return there[0]
    what = f"has {' and '.join(there)}" if there else f"has none of {', '.join(usual)}"
    raise InputError(f"{uri} {what}; one must be named {usual[0]}; it has {', '.join(names)}", None)
