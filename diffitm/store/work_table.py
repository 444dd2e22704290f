"""Work tables on disk: which one to go on with, and how an abandoned one is closed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from diffitm.core import storage
from diffitm.core.provenance import fingerprint
from diffitm.store import pair_table
from diffitm.store.score_store import Store

PENDING = ".pending.parquet"
FORMAT = "3"  # of work tables: an unfinished one of another format is closed


@dataclass(frozen=True)
class OpenWork:
    """A work table with its checkpoint, and what of it is still to do."""

    folder: str
    table: pair_table.WorkTable
    left: pair_table.Left

    @property
    def checkpoint(self) -> str:
        return storage.join(self.folder, "checkpoint")

    @property
    def resumed(self) -> bool:
        return self.left.pairs < self.table.pairs


def open_work(
    out: str, store: Store, write: Callable[[str], pair_table.WorkTable], identity: list[str]
) -> OpenWork:
    """The unfinished work table of this identity, else a new one that `write` puts at a path.

    `identity` tells what is asked for. Only one table of a store is ever open: one
    of another identity is closed first, so that no pair stands in two of them.
    """
    base = storage.join(out, "work", store.name)
    wanted = fingerprint([FORMAT, *sorted(identity)])[:12]
    number = 0
    while storage.exists(folder := storage.join(base, f"{number:04d}")):
        note = storage.join(folder, "table.json")
        if storage.exists(note) and not storage.exists(storage.join(folder, "done")):
            state = json.loads(storage.read_text(note))
            mend(storage.join(folder, "checkpoint"))
            if state["examples"] == wanted:
                counts = (state[name] for name in ("images", "pairs", "stored"))
                table = pair_table.WorkTable(storage.join(folder, "work.parquet"), *counts)
                left = pair_table.remaining(table, storage.join(folder, "checkpoint"))
                if left.pairs:
                    return OpenWork(folder, table, left)
            _close(folder, store)
        else:
            storage.delete_folder(storage.join(folder, "checkpoint"))
        number += 1
    table = write(storage.join(folder, "work.parquet"))
    left = pair_table.Left(table.images, table.pairs, table.stored)
    if table.pairs:
        state = {"examples": wanted, **left._asdict()}
        storage.write_text(storage.join(folder, "table.json"), json.dumps(state))
    return OpenWork(folder, table, left)


def open_pairs(out: str, store: Store, examples: list[str], identity: list[str]) -> OpenWork:
    """The unfinished work table of these examples, else a new one with the pairs that the store lacks.

    `examples` are files, `identity` tells their content.
    """

    def write(uri: str) -> pair_table.WorkTable:
        return pair_table.write_work(examples, store, uri)

    return open_work(out, store, write, identity)


def mend(checkpoint: str) -> None:
    """Take back what a kill left of a commit in an object store, where a move is a copy and a deletion.

    Ray Data would delete the data of rows that are both committed and pending, and never make it again.
    To be called while no run is going on.
    """
    names = set(storage.sizes(checkpoint))
    for name in names:
        if name.endswith(PENDING) and f"{name.removesuffix(PENDING)}.parquet" in names:
            storage.delete(storage.join(checkpoint, name))


def finish(work: OpenWork, done: Any) -> None:
    """Mark a table as done, with the dataclass that says what was done. Its checkpoint has no use then."""
    storage.write_text(storage.join(work.folder, "done"), json.dumps(asdict(done)))
    storage.delete_folder(work.checkpoint)


def finished(out: str, store: Store) -> list[dict[str, Any]]:
    """What was done, by every finished table of a store."""
    base, number, found = storage.join(out, "work", store.name), 0, []
    while storage.exists(folder := storage.join(base, f"{number:04d}")):
        note = storage.join(folder, "done")
        if storage.exists(note):
            found.append(json.loads(storage.read_text(note)))
        number += 1
    return found


def _close(folder: str, store: Store) -> None:
    """Delete the data whose checkpoint a kill left pending, as Ray Data does on a resume."""
    pending = [p for p in storage.files(storage.join(folder, "checkpoint")) if p.endswith(PENDING)]
    names = tuple(path.rsplit("/", 1)[-1].removesuffix(PENDING) for path in pending)
    found, _ = storage.filesystem(store.uri)
    for path in storage.files(store.uri, ".parquet"):
        if names and path.rsplit("/", 1)[-1].startswith(names):
            found.delete_file(path)
    storage.write_text(storage.join(folder, "done"), json.dumps({"closed": True}))
    storage.delete_folder(storage.join(folder, "checkpoint"))


def is_open(out: str, store: Store) -> bool:
    """Whether a table of the store is unfinished: a run of it may take back what it wrote last."""
    base, number = storage.join(out, "work", store.name), 0
    while storage.exists(folder := storage.join(base, f"{number:04d}")):
        begun = storage.exists(storage.join(folder, "table.json"))
        if begun and not storage.exists(storage.join(folder, "done")):
            return True
        number += 1
    return False
