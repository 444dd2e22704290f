"""Folders of images with a .txt or .json beside each, or with metadata.jsonl as the Hub has it."""

from __future__ import annotations

import itertools
import logging
import posixpath
from collections import Counter
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from diffitm.captions.row import CaptionRow, Reading, make_row
from diffitm.captions.sample import TEXTS, sample_row
from diffitm.captions.table import read_table
from diffitm.core import storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.images import ENDINGS, is_image, list_files
from diffitm.core.outside import is_outside, patiently
from diffitm.core.schema import encodable

log = logging.getLogger("diffitm")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_folder(root: str, reading: Reading) -> Iterator[CaptionRow]:
    """The images of a folder and those below it, sorted, with what metadata.jsonl, .csv or .parquet beside
    or above them says, else with the .txt or .json beside each; without images, the rows of its Parquet
    files.

    Raises InputError for a folder with neither.
    """
    listed, broken = list_files(root)
    # A path that is not UTF-8 goes into no table and to no reader of files.
    names = [name for name in listed if name == encodable(name)]
    broken |= {n: "its path is not UTF-8" for n in listed if n != encodable(n) and _is_read(n)}
    pictures = [name for name in names if is_image(name)]
    tables = [name for name in names if _is_parquet(name)]
    kept = () if pictures or any(map(is_image, broken)) else tables
    if not pictures and not broken and not tables:
        _refuse(root, names, reading.field)
    _tell_others(root, [name for name in listed if name not in kept])
    described = set[str]()
    if kept:
        for name in tables:
            yield from _own_table(root, name, reading)
    elif reading.texts is not None:
        for name in pictures:
            yield make_row(reading, name, name, None)
    else:
        yield from _captioned(root, names, described, reading)
    for name, why in broken.items():
        if name not in described:
            yield CaptionRow(encodable(name), encodable(name), failure=why)


def _captioned(
    root: str, names: list[str], described: set[str], reading: Reading
) -> Iterator[CaptionRow]:
    """The images with the texts of metadata files, whose images become `described`, and of what lies beside
    them."""
    metadata = [name for name in names if storage.name(name) in METADATA]
    for first, second in itertools.pairwise(metadata):
        if storage.parent(first) == storage.parent(second):
            what = f"{first} and {second} both say what its images show; one must go"
            raise InputError(f": {root}: {what}", reading.field)
    for name in metadata:
        for row in _table(root, name, reading):
            described.add(posixpath.normpath(row.image))  # ./a.png
            yield row
    there = set(names)
    left = [name for name in names if is_image(name) and name not in described]
    of_stem = Counter(name.rpartition(".")[0] for name in left)
    for name in left:
        stem = name.rpartition(".")[0]
        texts = [f"{stem}.{ending}" for ending in TEXTS if f"{stem}.{ending}" in there]
        if of_stem[stem] > 1 and texts:
            others = [storage.name(n) for n in left if n.rpartition(".")[0] == stem]
            what = f"{storage.name(texts[0])} is of {len(others)} images: {' and '.join(others)}"
            yield CaptionRow(name, name, failure=what)
        else:
            yield _beside(root, name, there, bool(described), reading)


def _is_read(name: str) -> bool:
    return is_image(name) or _is_parquet(name) or storage.name(name) in METADATA


def _is_parquet(name: str) -> bool:
    return name.lower().endswith(".parquet")


def _own_table(root: str, name: str, reading: Reading) -> Iterator[CaptionRow]:
    """The rows of a Parquet file; one that is broken costs itself. Raises InputError for one of other
    columns, and for one that an object store does not give: another time it might."""
    try:
        yield from _table(root, name, reading)
    except InputError as error:
        spoilt = pa.ArrowInvalid if "://" in root else (pa.ArrowInvalid, OSError)
        if not isinstance(error.__cause__, spoilt):
            raise
        yield CaptionRow(name, failure=f"it cannot be read: {error.__cause__}")


def _refuse(root: str, names: list[str], field: str) -> None:
    """Raises InputError for a folder without images."""
    if not names and not storage.exists(root):
        raise InputError(f": there is no such folder: {root}", field)
    what = f"holds no image ({', '.join(ENDINGS)}) and no .parquet"
    if any(name.lower().endswith(".tar") for name in names):
        what += "; its shards are given as DIR/*.tar"
    raise InputError(f": {root} {what}", field)


def _tell_others(root: str, names: list[str]) -> None:
    """What lies there and is neither an image nor of one."""
    pictured = {name.rpartition(".")[0] for name in names if is_image(name)}
    others = Counter(
        f".{encodable(name.rpartition('.')[2])}" if "." in storage.name(name) else "without ending"
        for name in names
        if not is_image(name)
        and storage.name(name) not in METADATA
        and not (name.endswith(TEXTS) and name.rpartition(".")[0] in pictured)
    )
    if others:
        told = ", ".join(f"{count:,} {ending}" for ending, count in others.most_common(8))
        log.warning("%s: left out files that are no image and of none: %s", root, told)


def _table(root: str, name: str, reading: Reading) -> Iterator[CaptionRow]:
    """The rows of a table of the folder, their images below `root`."""
    folder = name.rpartition("/")[0]
    for row in read_table(storage.join(root, name), reading):
        place = f"{name}, {row.place}"
        if folder and row.image:
            others = tuple(f"{folder}/{other}" for other in row.negative_images)
            row = row._replace(image=f"{folder}/{row.image}", negative_images=others)
        yield row._replace(place=place)


def _beside(
    root: str, name: str, there: set[str], is_described: bool, reading: Reading
) -> CaptionRow:
    """The row of an image by what lies beside it."""
    stem = name.rpartition(".")[0]
    contents = []
    for ending in TEXTS:
        beside = f"{stem}.{ending}"
        try:
            uri = storage.join(root, beside)
            known = beside in there
            contents.append(patiently(partial(storage.read_bytes, uri)) if known else None)
        except OSError as error:
            if is_outside(error):  # another time it would be there
                raise Unavailable(f"{uri} cannot be read: {error}") from error
            return CaptionRow(name, name, failure=f"{beside} cannot be read: {error}")
    row = sample_row(reading, name, name, *contents)
    if is_described and contents == [None, None]:
        return row._replace(failure=f"{row.failure}, and no metadata names it")
    return row
