"""The many small files of a store, one a block of work, become few ones of 128 to 256 MB.

A file of LEAST bytes is never written again, so the next time rewrites at most the last file of this one.
Rows are sorted by image and text in stretches of HELD bytes, a file's few stretches one after
the other: so memory is bounded, and the statistics of row groups tell where an image lies. What is stored of
one pair keeps its order, so that readers find the same line first.

Each output is written whole, then named by the manifest, which at once calls its inputs replaced, and only
then are these deleted. A kill costs at most one output; what it leaves is deleted by the next compaction.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from pyarrow import fs, parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.lease import held
from diffitm.core.schema import SCORES
from diffitm.store.manifest import (
    MANIFEST,
    PREFIX,
    Contents,
    Listed,
    Manifest,
    look,
    write_manifest,
)
from diffitm.store.score_store import Store

log = logging.getLogger("diffitm")
FEW = 8  # appended files that are left as they are
LEAST = 128 * 2**20  # bytes of a file that is written no more
HELD = 128 * 2**20  # bytes of rows in memory that are sorted together
GROUP = 8192  # rows of a row group: what a reader takes or leaves
SMALL = 4 * 2**20  # bytes of a file that is read as a whole, ahead
AHEAD = 16  # files
REPORT_EVERY = 10.0  # seconds
# Names and numbers that repeat are written once; errors, by their bytes, in half of the space.
REPEATED = ["image", "digest", "failure", "elements", "timesteps.list.element"]
SPLIT = [f"{name}.list.element" for name in ("l2", "l1", "huber")]
FORM: dict[str, Any] = {
    "compression": "zstd",
    "use_dictionary": REPEATED,
    "column_encoding": dict.fromkeys(SPLIT, "BYTE_STREAM_SPLIT"),
    "write_statistics": ["image"],
}


def tidy(store: Store) -> None:
    """Compact the store where that pays. Nothing may be appended by a table that could take it back: no work
    table of the store is open.

    What keeps it from being done is told, and the next run tries again: every score is in the store.
    """
    try:
        if not pays(look(store.uri)):
            return
        with held(storage.join(store.uri, MANIFEST), is_file=True):
            compact(store)
    except (OSError, InputError, pa.ArrowException) as error:
        text = (
            "%s: the files of its scores stay as they are for now, and the next run tries again: %s"
        )
        log.warning(text, store.model, error)


def pays(contents: Contents) -> bool:
    """Whether there is more than a few files to join, or something to clear away."""
    replaced = contents.manifest.replaced if contents.manifest else ()
    return len(contents.appended) > FEW or bool(contents.leftovers or replaced)


def compact(store: Store) -> None:
    """Join the small files of a store, which no other process compacts meanwhile.

    Raises OSError where a file cannot be read, written or deleted; the store holds the same rows then.
    """
    contents = look(store.uri)
    job = _Compaction(store, contents)
    job.clear(contents.leftovers)
    if len(contents.appended) > FEW:
        job.run()


class _Compaction:
    """One compaction. `files` are those of the manifest as it is, in order."""

    def __init__(self, store: Store, contents: Contents) -> None:
        self.store, self.contents = store, contents
        self.found, self.folder = storage.filesystem(store.uri)
        self.files = list(contents.listed)
        self.id, self.outputs = secrets.token_hex(6), 0
        self.start = self.told = time.monotonic()

    def clear(self, names: list[str]) -> None:
        """Delete files that hold no row of the store, and let the manifest forget them. It is there from now
        on, so that compacted files without one are known to have lost it."""
        storage.delete_files(self.store.uri, names)
        self._commit(())

    def run(self) -> None:
        """Adopt large files as they are and join the others."""
        before = len(self.contents.names)
        last = [file.name for file in self.files[-1:] if file.bytes < LEAST]
        self._join([*last, *self.contents.appended])
        took, size = time.monotonic() - self.start, sum(file.bytes for file in self.files)
        text = "%s: %s files of scores became %s (%.1f MB) in %.0f s"
        log.info(text, self.store.model, f"{before:,}", f"{len(self.files):,}", size / 1e6, took)

    def _join(self, names: list[str]) -> None:
        output, taken, done = None, list[str](), 0
        for name, tables in self._read(names):
            # What comes before a large file is finished first, so that no row changes its place in the order.
            is_large = self.contents.sizes[name] >= LEAST
            if output and (is_large or output.bytes >= LEAST):
                self._finish(output, taken)
                done, output, taken = done + len(taken), None, []
            if is_large:
                self._adopt(name)
                done += 1
                continue
            output = output or _Output(self._new_file(), self.found)
            for table in tables:
                output.add(table)
            taken.append(name)
            self._tell(done + len(taken), len(names))
        if output:
            self._finish(output, taken)

    def _adopt(self, name: str) -> None:
        rows = self.contents.appended[name].num_rows
        listed = Listed(name, self.contents.sizes[name], rows, self._holds_parts(name))
        self.files.append(listed)
        self._commit(())

    def _finish(self, output: _Output, taken: list[str]) -> None:
        """Make the output count in place of the files that it holds, and delete these."""
        size = output.close()
        footer = storage.footers(self.store.uri, [name := storage.name(output.path)]).get(name)
        if footer is None or footer.num_rows != output.rows:
            raise OSError(f"{output.path} was written and does not hold its {output.rows:,} rows")
        self.files = [file for file in self.files if file.name not in taken]
        self.files.append(Listed(name, size, output.rows, output.raced))
        self._commit(tuple(taken))
        storage.delete_files(self.store.uri, taken)
        self._commit(())

    def _commit(self, replaced: tuple[str, ...]) -> None:
        manifest = Manifest(tuple(self.files), replaced)
        if manifest != self.contents.manifest:
            write_manifest(self.store.uri, manifest)
            self.contents = Contents(manifest, self.contents.appended, self.contents.sizes, [])

    def _new_file(self) -> str:
        self.outputs += 1
        return f"{self.folder}/{PREFIX}{self.id}-{self.outputs:05d}.parquet"

    def _fragment(self, name: str) -> ds.Fragment:
        return ds.ParquetFileFormat().make_fragment(f"{self.folder}/{name}", self.found)

    def _holds_parts(self, name: str) -> bool:
        raced = ds.field("positions").is_valid()
        data = ds.FileSystemDataset(
            [self._fragment(name)], SCORES, ds.ParquetFileFormat(), self.found
        )
        return data.head(1, ["row"], filter=raced).num_rows > 0

    def _read(self, names: list[str]) -> Iterator[tuple[str, Iterator[pa.Table]]]:
        """Each file with its rows, the next small ones being read meanwhile."""
        sizes = self.contents.sizes

        def whole(name: str) -> pa.Table:
            return self._fragment(name).to_table(schema=SCORES, use_threads=False)

        def in_parts(name: str) -> Iterator[pa.Table]:
            batches = self._fragment(name).to_batches(
                schema=SCORES, batch_size=GROUP, batch_readahead=1, use_threads=False
            )
            return (pa.Table.from_batches([batch]) for batch in batches)

        waiting = deque[tuple[str, Future[pa.Table] | None]]()
        with ThreadPoolExecutor(AHEAD) as pool:
            left = iter(names)
            while True:
                while len(waiting) < AHEAD and (name := next(left, None)) is not None:
                    small = sizes[name] <= SMALL
                    waiting.append((name, pool.submit(whole, name) if small else None))
                if not waiting:
                    return
                name, future = waiting.popleft()
                yield name, iter([future.result()]) if future else in_parts(name)

    def _tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.told >= REPORT_EVERY:
            self.told = now
            left = (total - done) * (now - self.start) / done
            text = "%s: joining files of scores: %s of %s, %.0f s left"
            log.info(text, self.store.model, f"{done:,}", f"{total:,}", left)


class _Output:
    """A compacted file that is being written."""

    def __init__(self, path: str, found: fs.FileSystem) -> None:
        self.path, self.found = path, found
        self.rows, self.raced = 0, False
        self.held, self.tables = 0, list[pa.Table]()
        self.sink: IO[bytes] = found.open_output_stream(path, compression=None, buffer_size=2**20)
        self.writer = parquet.ParquetWriter(self.sink, SCORES, **FORM)

    @property
    def bytes(self) -> int:
        """What is written so far."""
        return self.sink.tell()

    def add(self, table: pa.Table) -> None:
        """Take rows, and write what is held where that is enough."""
        self.tables.append(table)
        self.held += table.nbytes
        if self.held >= HELD:
            self._write()

    def close(self) -> int:
        """Write the rest and close the file, on a disk for good; its bytes."""
        self._write()
        self.writer.close()
        size = self.bytes
        self.sink.close()
        if isinstance(self.found, fs.LocalFileSystem):
            with open(self.path, "rb") as file:  # what it replaces is deleted next
                os.fsync(file.fileno())
        return size

    def _write(self) -> None:
        """The rows that are held, sorted; of one image and text in the order in which they came."""
        if not self.tables:
            return
        table = pa.concat_tables(self.tables).combine_chunks()
        self.tables, self.held = [], 0
        keys = [("image", "ascending"), ("text", "ascending")]
        order = pc.sort_indices(table, sort_keys=keys)  # which is stable
        for start in range(0, len(table), GROUP):
            self.writer.write_table(table.take(order[start : start + GROUP]), row_group_size=GROUP)
        self.rows += len(table)
        self.raced = self.raced or table["positions"].null_count < len(table)
