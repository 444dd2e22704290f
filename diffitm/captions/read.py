"""The one reader of images with texts: by path or URI, a table, a folder or shards."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence

from diffitm.captions.folder import read_folder
from diffitm.captions.row import CaptionRow, Reading
from diffitm.captions.shards import is_webdataset, read_shards, shards
from diffitm.captions.table import ENDINGS, is_table, read_table
from diffitm.core import storage
from diffitm.core.errors import InputError, flag
from diffitm.core.schema import encodable

log = logging.getLogger("diffitm")
ABSOLUTE = re.compile(r"~?/|[A-Za-z]:[/\\]|\w+://")


def read(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    """The rows of a table, a folder or shards, one after the other, each with the file it stands in; one
    that is wrong has a failure.

    Raises InputError for what cannot be read, and where no row is as it should be.
    """
    total, first, any_good = 0, None, False
    empty, absolute, such = 0, 0, ""
    for row in _read(uri, reading):
        total += 1
        # A reason may quote what the file holds.
        row = row._replace(
            place=encodable(row.place), failure=row.failure and encodable(row.failure)
        )
        first = first or row
        any_good = any_good or any(own.failure is None for own in row.each_text())
        empty += row.empty_negatives
        if ABSOLUTE.match(row.image):
            absolute, such = absolute + 1, such or row.image
        yield row
    if empty:
        log.warning("%s: left out %s negative captions that are empty", uri, f"{empty:,}")
    if absolute:
        text = "%s: %s of its image paths are absolute, such as %s; all start at the images' folder"
        log.warning(text, uri, f"{absolute:,}", such)
    if first is None:
        raise InputError(f": {uri} holds no row", reading.field)
    if not any_good:
        told = f"none of its {total:,} rows can be used; {first.place}: {first.failure}"
        raise InputError(f": {uri}: {told}", reading.field)


def _read(uri: str, reading: Reading) -> Iterator[CaptionRow]:
    if is_table(uri):
        name = storage.name(uri)
        yield from (row._replace(place=f"{name}, {row.place}") for row in read_table(uri, reading))
    elif is_webdataset(uri):
        yield from read_shards(shards(uri, reading.field), reading)
    else:
        _refuse_file(uri, reading.field)
        yield from read_folder(uri, reading)


def _refuse_file(uri: str, field: str) -> None:
    """Raises InputError for a file of another kind."""
    if storage.is_file(uri):
        raise InputError(f": {uri} is no {', '.join(ENDINGS)} or .tar file, and no folder", field)


def divide(rows: Iterable[CaptionRow]) -> tuple[list[CaptionRow], list[CaptionRow]]:
    """A row for each text that can be used, and those of what is left out."""
    good, lost = list[CaptionRow](), list[CaptionRow]()
    for row in rows:
        for own in row.each_text():
            (good if own.failure is None else lost).append(own)
    return good, lost


def listed(lost: Iterable[CaptionRow]) -> list[dict[str, str | None]]:
    """What was left out, for a file: where it stands, its image, why."""
    return [{"place": row.place, "image": row.image, "reason": row.failure} for row in lost]


def tell_lost(uri: str, lost: Sequence[CaptionRow]) -> None:
    """How much was left out, and what first."""
    if lost:
        first = f"{lost[0].place}: {lost[0].failure}"
        log.warning("%s: left out %s of its texts or images; %s", uri, f"{len(lost):,}", first)


def find_absent(uri: str, field: str) -> list[str]:
    """A problem if a table or folder that an option gives is not there; a reader looks for shards."""
    path = storage.absolute(uri)
    if not uri or is_webdataset(uri) or storage.exists(path):
        return []
    return [f"{flag(field)}: there is no file or folder {path}"]


def image_root(uri: str, images: str | None, field: str = "data") -> str:
    """What the image paths start from: `images`, else the table's or the shards' folder, or the folder.

    Raises InputError if there is none, and for a file of another kind.
    """
    if images is not None and not is_table(uri):
        what = "shards hold their images" if is_webdataset(uri) else "a folder holds its images"
        raise InputError(f"{images}: {what}; leave it out", "images")
    if images is not None:
        root = storage.absolute(images)
    elif is_table(uri) or is_webdataset(uri):
        root = storage.parent(uri)
    else:
        root = uri
        _refuse_file(uri, field)
    if not storage.exists(root):
        raise InputError(f": there is no folder {root}", "images" if images else field)
    return root
