"""People's own images and texts: tables, folders and shards as rows of (image, texts), one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.dataset as ds
import pyarrow.json

from diffitm.core import storage
from diffitm.core.errors import InputError, suggest
from diffitm.core.images import is_image

BATCH = 2000  # rows
IMAGE_NAMES = ("image", "image_path", "file_name", "filepath", "filename", "path", "img")
TEXT_NAMES = ("text", "caption", "captions", "texts", "prompt", "title")
ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson")


class OwnRow(NamedTuple):
    """An image with its texts; `source` is what it is counted under, `failure` why it has no score."""

    image: str
    texts: tuple[str, ...]
    source: str | None = None
    failure: str | None = None


class Columns(NamedTuple):
    """Names of a table's columns; None for one that is found by its usual names."""

    image: str | None = None
    text: str | None = None
    source: str | None = None


def is_table(uri: str) -> bool:
    """Whether a file's ending is that of a table which read_table reads."""
    return storage.without_query(uri).lower().endswith(ENDINGS)


def read_table(uri: str, columns: Columns, texts: Sequence[str] = ()) -> Iterator[OwnRow]:
    """The rows of a Parquet, CSV, TSV or JSON-lines file. `texts`, if there are any, are those of every
    image instead of a column's.

    A row without an image or a text is yielded with a failure. Raises InputError for a file that cannot
    be read and for a column that is not there.
    """
    try:
        data = _open(uri)
        schema = data.schema
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", "data") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f": {uri} cannot be read: {error}", "data") from error
    image = _column(uri, schema, columns.image, IMAGE_NAMES, "image_column")
    text = None if texts else _column(uri, schema, columns.text, TEXT_NAMES, "text_column")
    source = None
    if columns.source is not None:
        source = _column(uri, schema, columns.source, (), "source_column")
    kept = list(dict.fromkeys(name for name in (image, text, source) if name is not None))
    try:
        for batch in data.to_batches(columns=kept, batch_size=BATCH):
            for line in batch.to_pylist():
                own = texts or line[text or ""]
                yield _row(line[image], own, line[source] if source else None)
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f": {uri} cannot be read: {error}", "data") from error


def _open(uri: str) -> ds.Dataset:
    found, path = storage.filesystem(uri)
    name = storage.without_query(uri).lower()
    if name.endswith(".parquet"):
        return ds.dataset(path, filesystem=found, format="parquet")
    if name.endswith((".jsonl", ".ndjson")):
        return ds.dataset(path, filesystem=found, format=ds.JsonFileFormat())
    tabs = name.endswith(".tsv")
    options = pa.csv.ParseOptions(
        delimiter="\t" if tabs else ",",
        quote_char=False if tabs else '"',
        newlines_in_values=not tabs,
    )
    # Captions such as "null" or "1" are texts.
    head = _header(found, path, options)
    convert = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in head}, strings_can_be_null=False
    )
    form = ds.CsvFileFormat(parse_options=options, convert_options=convert)
    return ds.dataset(path, filesystem=found, format=form)


def _header(found: Any, path: str, options: pa.csv.ParseOptions) -> list[str]:
    with (
        found.open_input_stream(path) as stream,
        pa.csv.open_csv(stream, parse_options=options) as reader,
    ):
        names: list[str] = reader.schema.names
        return names


def _column(uri: str, schema: pa.Schema, name: str | None, usual: Sequence[str], field: str) -> str:
    names = list(schema.names)
    if name is None:
        there = [n for n in usual if n in names]
        if len(there) == 1:
            return there[0]
        what = f"has {' and '.join(there)}" if there else f"has none of {', '.join(usual)}"
        raise InputError(f": {uri} {what}; name one of {', '.join(names)}", field)
    if name not in names:
        raise InputError(f"{name!r}: {uri} has no such column{suggest(name, names)}", field)
    return name


def _row(image: Any, texts: Any, source: Any) -> OwnRow:
    """One line of a table; a column of texts may hold a list."""
    label = None if source is None else str(source)
    name = image if isinstance(image, str) else ""
    values = [texts] if isinstance(texts, str) or texts is None else list(texts)
    failure = None
    if not name.strip():
        failure = "the row names no image"
    elif not values or not all(isinstance(text, str) and text.strip() for text in values):
        failure = "the row has no text" if len(values) < 2 else "one of the row's texts is empty"
    return OwnRow(name, tuple(str(text or "") for text in values), label, failure)


def read_folder(root: str, texts: Sequence[str]) -> Iterator[OwnRow]:
    """The images of a folder and those below it, with the .txt beside each, or with `texts` all alike.

    Raises InputError for a folder without images.
    """
    start = f"{storage.filesystem(root)[1].rstrip('/')}/"
    names = [path.removeprefix(start) for path in storage.files(root, recursive=True)]
    there = set(names)
    pictures = [name for name in names if is_image(name)]
    if not pictures:
        raise InputError(f": {root} holds no .jpg or .png", "data")
    for name in pictures:
        beside = f"{name.rpartition('.')[0]}.txt"
        if texts:
            yield OwnRow(name, tuple(texts))
        elif beside not in there:
            yield OwnRow(name, (), None, f"there is no {beside} beside it")
        else:
            try:
                own = storage.read_text(storage.join(root, beside)).strip()
            except (OSError, UnicodeDecodeError) as error:
                yield OwnRow(name, (), None, f"{beside}: {error}")
                continue
            yield OwnRow(name, (own,), None, None if own else f"{beside} is empty")


def read_samples(
    members: Iterable[tuple[str, str, str]], texts: Sequence[str], source: str | None = None
) -> Iterator[OwnRow]:
    """Rows of a shard's members (key, ending, reference or content) whose samples follow each other, as
    WebDataset and img2dataset write them. The text is the .txt, or `caption` of the .json."""
    key: str | None = None
    sample: dict[str, str] = {}
    for name, ending, value in members:
        if name != key and sample:
            yield _sample(sample, texts, source)
            sample = {}
        key = name
        sample[ending] = value
    if sample:
        yield _sample(sample, texts, source)


def _sample(sample: dict[str, str], texts: Sequence[str], source: str | None) -> OwnRow:
    try:
        known = json.loads(sample.get("json", "{}"))
    except ValueError as error:
        return OwnRow(sample.get("image", ""), (), None, f".json cannot be read: {error}")
    known = known if isinstance(known, dict) else {}
    own = sample.get("txt", known.get("caption"))
    label = known.get(source) if source is not None else None
    return _row(sample.get("image"), texts or own, label)
