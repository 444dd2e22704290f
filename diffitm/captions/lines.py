"""The lines of a file with all their fields, for readers that know which ones they want."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.captions.delimited import read_delimited
from diffitm.captions.held_images import Held, batches, has_all, holds_image, reference
from diffitm.captions.json_file import parse_json
from diffitm.captions.row import parse_list, shown
from diffitm.captions.shards import is_webdataset, read_members, shards
from diffitm.captions.table import DELIMITERS, JSON_LINES, open_text
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import is_image, row_of

BATCH, BATCH_OF_IMAGES = 2000, 20  # rows
PATH = "the path of an image"


@dataclass(frozen=True)
class Line:
    """A line of a file: `where` it stands, for messages; `key`, its number or its name in the file; its
    fields. In a text table (`is_text`) a number or a list stands as text."""

    where: str
    key: str
    fields: Mapping[str, Any]
    is_text: bool = False

    def wrong(self, name: str, right: str) -> InputError:
        """The error for a field that is missing or of another form."""
        if name in self.fields:
            return InputError(
                f"{self.where}: {name} is {shown(self.fields[name])!r}, it must be {right}"
            )
        there = ", ".join(map(str, self.fields))[:200]
        return InputError(f"{self.where}: there is no {name}, {right}; it has {there or 'nothing'}")

    def text(self, name: str) -> str:
        """A text, which may be empty: that costs its example alone. Raises InputError."""
        value = self.fields.get(name)
        if isinstance(value, str) and not isinstance(value, Held):
            return value
        raise self.wrong(name, "a text")

    def texts(self, name: str, least: int = 2) -> tuple[str, ...]:
        """A list of `least` texts or more. Raises InputError."""
        values = self._list(name)
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            raise self.wrong(name, "a list of texts")
        if len(values) < least:
            raise self.wrong(name, f"a list of {least} texts or more")
        return tuple(values)

    def number(self, name: str, below: int | None = None) -> int:
        """A whole number of 0 or more, less than `below`. Raises InputError."""
        value = self.fields.get(name)
        if self.is_text and isinstance(value, str) and value.strip().isdecimal():
            value = int(value)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if not good or (below is not None and value >= below):  # type: ignore[operator]
            raise self.wrong(name, "a whole number" + (f" of 0 to {below - 1}" if below else ""))
        return int(value)  # type: ignore[arg-type]

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        """One of the known words. Raises InputError."""
        if (value := self.fields.get(name)) in known:
            return str(value)
        raise self.wrong(name, f"one of {', '.join(known)}")

    def image(self, name: str, folder: str = "") -> str:
        """The reference of an image; a path is one below `folder`. Raises InputError."""
        return self._image(name, self.fields.get(name), folder, PATH)

    def images(self, name: str, folder: str = "", least: int = 2) -> tuple[str, ...]:
        """References of `least` images or more. Raises InputError."""
        values, right = self._list(name), f"a list of {least} paths of images or more"
        if not isinstance(values, list) or len(values) < least:
            raise self.wrong(name, right)
        return tuple(self._image(name, value, folder, right) for value in values)

    def within(self, name: str) -> Line:
        """The fields of a field. Raises InputError where it has none."""
        if isinstance(value := self.fields.get(name), dict):
            return Line(f"{self.where}, {name}", self.key, value, self.is_text)
        raise self.wrong(name, "an object with fields")

    def label(self, name: str) -> str:
        """A text or a whole number as text, '' where there is none. Raises InputError."""
        value = self.fields.get(name)
        if value is None or isinstance(value, str | int):
            return "" if value is None else str(value)
        raise self.wrong(name, "a text or a whole number")

    def _list(self, name: str) -> Any:
        value = self.fields.get(name)
        return parse_list(value) if self.is_text else value

    def _image(self, name: str, value: Any, folder: str, right: str) -> str:
        if isinstance(value, Held):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, right)
        if value.startswith("/") or "://" in value or ".." in value.split("/"):
            raise self.wrong(name, f"{right} below {folder or 'the data root'}")
        path = value.removeprefix("./")
        return f"{folder}/{path}" if folder else path


def read_lines(uri: str, root: str, columns: Sequence[str] = ()) -> Iterator[Line]:
    """The lines of JSON lines, of a JSON list or object, of CSV, TSV or Parquet, or of shards. An image that
    the file holds is a reference below `root`. `columns` name the items of lists in a .json.

    In a shard a sample is all members of one name up to its first dot: fields are those of its .json; what
    is named KEY.FIELD.jpg is the image of a field, KEY.jpg that of `image`, KEY.0.jpg, KEY.1.jpg .. are the
    list `images`; KEY.txt is `text`. Raises InputError for a file that cannot be read, naming the line.
    """
    name = storage.without_query(uri).lower()
    kinds = {**dict.fromkeys(JSON_LINES, _json_lines), ".json": _json_file}
    kinds |= {**dict.fromkeys(DELIMITERS, _delimited), ".parquet": _parquet}
    try:
        if is_webdataset(uri):
            for shard in shards(uri):
                yield from _shard(shard, root)
        else:
            yield from kinds[os.path.splitext(name)[1]](uri, root, columns)
    except FileNotFoundError:
        raise InputError(f"there is no file {uri}") from None
    except (OSError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise InputError(f"{uri} cannot be read: {error}") from error


def _line(uri: str, kind: str, key: Any, fields: Any, is_text: bool = False) -> Line:
    where = f"{uri}, {kind} {key}"
    if isinstance(fields, dict):
        return Line(where, str(key), fields, is_text)
    raise InputError(f"{where}: it is {shown(fields)!r}, it must be an object with fields")


def _json_lines(uri: str, root: str, columns: Sequence[str]) -> Iterator[Line]:
    with open_text(uri) as stream:
        for number, text in enumerate(stream, 1):
            if text.strip():
                yield _line(uri, "line", number, _parsed(text, f"{uri}, line {number}"))


def _json_file(uri: str, root: str, columns: Sequence[str]) -> Iterator[Line]:
    with open_text(uri) as stream:
        content = _parsed(stream.read(), uri)
    if isinstance(content, dict):
        yield from (_line(uri, "key", key, fields) for key, fields in content.items())
    elif isinstance(content, list):
        for number, fields in enumerate(content):
            if columns and isinstance(fields, list) and len(fields) == len(columns):
                fields = dict(zip(columns, fields, strict=True))
            elif columns:
                right = f"it must be a list of {len(columns)}: {', '.join(columns)}"
                raise InputError(f"{uri}, entry {number}: it is {shown(fields)!r}, {right}")
            yield _line(uri, "entry", number, fields)
    else:
        raise InputError(f"{uri}: it is {shown(content)!r}, it must be a list or an object")


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error


def _delimited(uri: str, root: str, columns: Sequence[str]) -> Iterator[Line]:
    delimiter = DELIMITERS[os.path.splitext(storage.without_query(uri).lower())[1]]
    _, lines = read_delimited(lambda: open_text(uri), uri, delimiter)
    yield from (_line(uri, "line", number, fields, True) for number, fields in lines)


def _below(uri: str, root: str) -> str:
    """The way from `root` to a file that holds images. Raises InputError."""
    path = storage.below(uri, root)
    if path == storage.without_query(uri):
        raise InputError(f"{uri} holds its images itself: it must lie below the data root, {root}")
    return path


def _parquet(uri: str, root: str, columns: Sequence[str]) -> Iterator[Line]:
    found, path = storage.filesystem(uri)
    with found.open_input_file(path) as stream:
        file = parquet.ParquetFile(stream)
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{uri}: two columns are named {twice[0]!r}; rename one")
        pictures = [field.name for field in file.schema_arrow if _holds_images(field.type)]
        below = _below(uri, root) if pictures else ""
        # Images are long to read; where none is missing it is known without reading where each is.
        known = [name for name in pictures if has_all(file, name)]
        read = [name for name in names if name not in known]
        number = 0
        most = BATCH_OF_IMAGES if set(pictures) - set(known) else BATCH
        for rows in batches(file, read, most):
            for fields in rows:
                held = {name: Held(row_of(below, number, name)) for name in known}
                for name in set(pictures) - set(known):
                    held[name] = _references(below, number, name, fields[name])
                yield _line(uri, "row", number, {**fields, **held})
                number += 1


def _holds_images(kind: Any) -> bool:
    """Whether a column holds an image a row, or a list of them."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return holds_image(kind.value_type if is_list else kind)


def _references(below: str, number: int, name: str, value: Any) -> Any:
    """What stands for the image or images of a row: places in the file or, where bytes are missing, the
    paths that it gives instead."""
    if not isinstance(value, list):
        return reference(row_of(below, number, name), value)
    return [reference(row_of(below, number, name, n), item) for n, item in enumerate(value)]


def _shard(shard: str, root: str) -> Iterator[Line]:
    folder = _below(shard, root).rpartition("/")[0]
    samples: dict[str, dict[str, Any]] = {}
    for key, stem, member in read_members(shard, texts=True):
        fields = samples.setdefault(key, {})
        where, field = f"{shard}, sample {key}", stem.removeprefix(key).lstrip(".")
        if is_image(f"x.{member.ending}"):
            picture = Held(f"{folder}/{member.value!s}" if folder else str(member.value))
            _put(
                fields, where, f"images.{field}" if field.isdecimal() else field or "image", picture
            )
        elif isinstance(member.value, bytes) and member.ending == "json":
            found = _parsed(member.value.decode("utf-8-sig", "surrogateescape"), where)
            for name, value in _line(shard, "sample", key, found).fields.items():
                _put(fields, where, name, value)
        elif isinstance(member.value, bytes):
            _put(fields, where, "text", member.value.decode("utf-8-sig", "surrogateescape").strip())
    for key, fields in samples.items():
        numbered = {n: v for n, v in fields.items() if n.startswith("images.")}
        if numbered:
            order = sorted(numbered, key=lambda name: int(name.partition(".")[2]))
            fields = {n: v for n, v in fields.items() if n not in numbered}
            _put(fields, f"{shard}, sample {key}", "images", [numbered[name] for name in order])
        yield _line(shard, "sample", key, fields)


def _put(fields: dict[str, Any], where: str, name: str, value: Any) -> None:
    if name in fields:
        raise InputError(f"{where}: {name} is there twice")
    fields[name] = value
