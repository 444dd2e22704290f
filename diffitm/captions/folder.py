"""Folders of images with a .txt or .json beside each, or with metadata.jsonl as the Hub has it."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator

from diffitm.captions.row import CaptionRow, Reading, make_row
from diffitm.captions.sample import TEXTS, sample_row
from diffitm.captions.table import read_table
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import ENDINGS, is_image, list_files

log = logging.getLogger("diffitm")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def read_folder(root: str, reading: Reading) -> Iterator[CaptionRow]:
    """The images of a folder and those below it, sorted, with what metadata.jsonl, .csv or .parquet beside
    or above them says, else with the .txt or .json beside each; without images, the rows of its Parquet
    files.

    Raises InputError for a folder with neither.
    """
    names = list_files(root)
    pictures = [name for name in names if is_image(name)]
    tables = [name for name in names if name.lower().endswith(".parquet")]
    if not pictures and tables:
        for name in tables:
            yield from _table(root, name, reading)
        return
    if not pictures:
        _refuse(root, names, reading.field)
    _tell_others(root, names)
    if reading.texts is not None:
        for name in pictures:
            yield make_row(reading, name, name, None)
        return
    described = set[str]()
    metadata = [name for name in names if storage.name(name) in METADATA]
    for first, second in itertools.pairwise(metadata):
        if storage.parent(first) == storage.parent(second):
            what = f"{first} and {second} both say what its images show; one must go"
            raise InputError(f": {root}: {what}", reading.field)
    for name in metadata:
        for row in _table(root, name, reading):
            described.add(row.image)
            yield row
    there = set(names)
    for name in pictures:
        if name not in described:
            yield _beside(root, name, there, bool(described), reading)


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
        f".{name.rpartition('.')[2]}" if "." in storage.name(name) else "without ending"
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
            contents.append(storage.read_bytes(uri) if beside in there else None)
        except OSError as error:
            return CaptionRow(name, name, failure=f"{beside} cannot be read: {error}")
    row = sample_row(reading, name, name, *contents)
    if is_described and contents == [None, None]:
        return row._replace(failure=f"{row.failure}, and no metadata names it")
    return row
