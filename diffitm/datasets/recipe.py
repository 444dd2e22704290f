"""What a data set is made of, and how to see that it is whole."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffitm.core.errors import InputError
from diffitm.core.images import ENDINGS


@dataclass(frozen=True)
class Rule:
    """Members (or Hub files) whose whole name matches `pattern` go to `to`, below the data root."""

    pattern: str
    to: str


@dataclass(frozen=True)
class Download:
    """One file: addresses in the order of trial, and where it goes below the data root.

    `checksum` is 'sha256:', 'md5:' or 'git:' and a hex number; `most` is a limit in bytes where the
    size is not known. With `rules` it is an archive, which is unpacked and then deleted.
    """

    to: str
    urls: tuple[str, ...]
    size: int | None = None
    checksum: str | None = None
    most: int = 100 * 2**20
    rules: tuple[Rule, ...] = ()
    unpacked: int = 0  # limit in bytes of what comes out of an archive


@dataclass(frozen=True)
class Hub:
    """Files of a data set on the Hugging Face Hub; `archives` among them are unpacked by `rules`."""

    repo: str
    patterns: tuple[str, ...]
    files: tuple[Rule, ...]
    archives: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    unpacked: int = 0
    gated: bool = False


@dataclass(frozen=True)
class ImageList:
    """A CSV that names every image by (address, id) columns; an image goes to `folder`/<id>.jpg."""

    csv: str
    columns: tuple[tuple[str, str], ...]
    folder: str


@dataclass(frozen=True)
class Need:
    """At least `least` files with one of the suffixes in a folder (or the file `path` itself)."""

    path: str
    least: int = 1
    suffixes: tuple[str, ...] = ENDINGS


@dataclass(frozen=True)
class Named:
    """The images that an annotation file names: `field` of its rows or values, or its keys without one."""

    file: str
    folder: str
    field: str | None = None
    cut: str = ""  # a beginning of the name that is not part of the path


@dataclass(frozen=True)
class DatasetRecipe:
    """A data set: what is fetched, what must be there in the end, and what only the user can do."""

    steps: tuple[Download | Hub | ImageList, ...]
    needs: tuple[Need | Named, ...]
    licence: str
    by_hand: str = ""
    tasks: tuple[str, ...] = ()


def missing(source: DatasetRecipe, root: Path) -> list[str]:
    """What a data set still lacks, one line for each; empty when it is complete."""
    found = []
    for need in source.needs:
        lack = _lack(need, root) if isinstance(need, Need) else _unnamed(need, root)
        found += [lack] if lack else []
    return found


def _lack(need: Need, root: Path) -> str | None:
    if (root / need.path).is_file():
        return None
    folders = [p for p in root.glob(need.path) if p.is_dir()]
    count = sum(
        p.suffix.lower() in need.suffixes and not p.name.startswith(".")
        for folder in folders
        for p in folder.iterdir()
    )
    if not folders:
        return f"{need.path} is not there"
    return f"{need.path} holds {count:,} of {need.least:,} images" if count < need.least else None


def _unnamed(need: Named, root: Path) -> str | None:
    try:
        entries = json.loads((root / need.file).read_text("utf-8-sig"))
        if need.field is not None and isinstance(entries, dict):
            entries = entries.values()
        names = {entry if need.field is None else entry[need.field] for entry in entries}
    except FileNotFoundError:
        return f"{need.file} is not there"
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{need.file} cannot be read: {type(error).__name__} {error}"
    folder = root / need.folder
    absent = sorted(n for n in names if not (folder / n.removeprefix(need.cut)).exists())
    if not absent:
        return None
    where = need.folder or "the data root"
    return f"{len(absent):,} of {len(names):,} images that {need.file} names are not below {where}"


def image_addresses(listing: ImageList, root: Path) -> Iterator[tuple[str, str]]:
    """(id, address) of every image that the CSV names, each id once.

    Raises InputError for a missing column or an id that is not a plain file name.
    """
    path, seen = root / listing.csv, set[str]()
    wanted = [name for pair in listing.columns for name in pair]
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(_text(file, path))
        lacking = set(wanted) - set(reader.fieldnames or [])
        if lacking:
            raise InputError(f"{path}: no column {', '.join(sorted(lacking))}")
        for row in reader:
            for address, name in _pairs(row, listing.columns):
                if not name.isalnum():
                    where = f"{path}, line {reader.line_num}"
                    raise InputError(f"{where}: image id {name!r} must be letters and digits")
                if name not in seen:
                    seen.add(name)
                    yield name, address


def _text(lines: Iterable[str], path: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8: {error}") from error


def _pairs(row: dict[str, Any], columns: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, str]]:
    for address, name in columns:
        yield (row[address] or "").strip(), (row[name] or "").strip()
