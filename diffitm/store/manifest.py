"""Which files of a score store hold its rows: those of its manifest, and those that were written since.

Files are appended and never changed. A compaction (compaction.py) writes their rows into few files whose
names begin with PREFIX. Such a file counts from the moment that the manifest names it, and those that the
manifest calls replaced count no longer; so each row is read once, wherever a kill comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError

MANIFEST = "_manifest.json"
PREFIX = "compact-"
FORMAT = 1


@dataclass(frozen=True)
class Listed:
    """A file of the manifest. `raced` tells whether any of its rows holds a part of a plan."""

    name: str
    bytes: int
    rows: int
    raced: bool


@dataclass(frozen=True)
class Manifest:
    """Files that hold rows, in the order in which they are read, and the `replaced` ones that may still lie
    beside them."""

    files: tuple[Listed, ...] = ()
    replaced: tuple[str, ...] = ()


@dataclass(frozen=True)
class Contents:
    """What lies in a store: its manifest, None where there is none yet; whole files that were appended since,
    with what they hold; each file's bytes; and what a compaction that was killed left."""

    manifest: Manifest | None
    appended: dict[str, parquet.FileMetaData]
    sizes: dict[str, int]
    leftovers: list[str]

    @property
    def listed(self) -> Sequence[Listed]:
        """The files of the manifest."""
        return self.manifest.files if self.manifest else ()

    @property
    def names(self) -> list[str]:
        """The files that hold the store's rows, in the order in which they are read."""
        return [*(file.name for file in self.listed), *self.appended]

    @property
    def rows(self) -> int:
        """How many rows there are."""
        counts: Iterator[int] = (footer.num_rows for footer in self.appended.values())
        return sum(file.rows for file in self.listed) + sum(counts)


def look(uri: str) -> Contents:
    """What lies in the folder of a store.

    Another process may compact it meanwhile: what was seen under one manifest holds if that is still the
    same at the end. Raises InputError for a manifest that cannot be read or names a file that is not there
    as it was.
    """
    while True:
        manifest = read_manifest(uri)
        sizes = {
            name: size
            for name, (size, _) in sorted(storage.sizes(uri).items())
            if name.endswith(".parquet")
        }
        known = manifest or Manifest()
        listed, replaced = {file.name for file in known.files}, set(known.replaced)
        others = [name for name in sizes if name not in listed]
        gone = {name for name in others if name in replaced or name.startswith(PREFIX)}
        appended = storage.footers(uri, [name for name in others if name not in gone])
        if read_manifest(uri) == manifest:
            _check(uri, manifest, sizes)
            return Contents(manifest, appended, sizes, sorted(gone))


def _check(uri: str, manifest: Manifest | None, sizes: dict[str, int]) -> None:
    where = storage.join(uri, MANIFEST)
    if manifest is None:
        if lost := [name for name in sizes if name.startswith(PREFIX)]:
            raise InputError(
                f"{where} is missing, and {lost[0]} is a file that only it gives a meaning: restore it"
            )
        return
    for file in manifest.files:
        found = sizes.get(file.name)
        if found != file.bytes:
            has = "is not there" if found is None else f"has {found:,} bytes"
            raise InputError(
                f"{where} names {file.name} with {file.bytes:,} bytes, which {has}: restore the file, "
                "or take it out of 'files' there, and its pairs are scored anew"
            )


def read_manifest(uri: str) -> Manifest | None:
    """The manifest of a store; None where it has none. Raises InputError for one that cannot be read."""
    where = storage.join(uri, MANIFEST)
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        return None
    try:
        state: dict[str, Any] = json.loads(data)
        if state["format"] != FORMAT:
            raise ValueError(f"format {state['format']!r}, this version reads {FORMAT}")
        files = tuple(Listed(**file) for file in state["files"])
        return Manifest(files, tuple(state["replaced"]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where} is not the manifest of a score store: {error!r}") from error


def write_manifest(uri: str, manifest: Manifest) -> None:
    """Put a manifest in the place of the one before, whole or not at all."""
    state = {"format": FORMAT, **asdict(manifest)}
    storage.write_text(storage.join(uri, MANIFEST), json.dumps(state, indent=1))
