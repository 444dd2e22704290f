"""The rows of a training set as one Parquet file, which a worker reads by position without holding it."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.training.rows import TrainingRow

DIGEST = b"digest"  # of the rows, in the file's metadata
TOGETHER = 2**14  # rows that are decoded at once
ROWS = pa.schema(
    [
        ("image", pa.string()),
        ("caption", pa.string()),
        ("negative_captions", pa.list_(pa.string())),
        ("negative_images", pa.list_(pa.string())),
        ("usable", pa.bool_()),
    ]
)


def digest_of(rows: Iterable[TrainingRow], kept: Sequence[int]) -> str:
    """sha256 of the rows in their order, and of which of them training can use."""
    total = hashlib.sha256(np.asarray(kept, np.int64).tobytes())
    for row in rows:
        parts = (row.image, row.caption, row.negative_captions, row.negative_images)
        total.update(json.dumps(parts).encode())
    return total.hexdigest()


def write_rows(uri: str, rows: Sequence[TrainingRow], kept: Sequence[int], digest: str) -> None:
    """Write the rows, whole or not at all; `kept` are the positions of those that training can use."""
    usable = np.zeros(len(rows), bool)
    usable[np.asarray(kept)] = True
    schema = ROWS.with_metadata({DIGEST: digest.encode()})
    sink = pa.BufferOutputStream()
    with parquet.ParquetWriter(sink, schema, compression="zstd") as writer:
        for start in range(0, len(rows), TOGETHER):
            part = [rows[i] for i in range(start, min(start + TOGETHER, len(rows)))]
            columns: dict[str, Any] = {
                name: [getattr(row, name) for row in part] for name in ROWS.names[:-1]
            }
            columns["usable"] = usable[start : start + len(part)]
            writer.write_table(pa.table(columns, schema=schema))
    storage.make_folder(storage.parent(uri))
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


@dataclass(frozen=True)
class RowsFile:
    """Where the rows of a run are, what they are, and how many of them training can use."""

    uri: str
    digest: str
    usable: int


class StoredRows(Sequence[TrainingRow]):
    """The rows of a file that write_rows made.

    They lie decoded in a temporary file that is mapped into memory, so the system may drop what is not
    in use, and a million rows take their reader 0.1 GB. `kept` are the positions of those that training
    can use. Raises InputError if the file has other rows than it should.
    """

    def __init__(self, file: RowsFile) -> None:
        self.table = mapped(file.uri)
        if (self.table.schema.metadata or {}).get(DIGEST) != file.digest.encode():
            raise InputError(f"{file.uri} has other rows than this run: delete it")
        self.columns = [self.table.column(name) for name in ROWS.names[:-1]]
        self.kept = np.flatnonzero(self.table.column("usable").to_numpy())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: Any) -> Any:
        return _row(column[int(position)].as_py() for column in self.columns)

    def __iter__(self) -> Iterator[TrainingRow]:
        for batch in self.table.select(ROWS.names[:-1]).to_batches():
            yield from map(
                _row, zip(*(column.to_pylist() for column in batch.columns), strict=True)
            )


def _row(values: Iterable[Any]) -> TrainingRow:
    image, caption, captions, images = values
    return TrainingRow(image, caption, tuple(captions), tuple(images))


def mapped(uri: str) -> pa.Table:
    """The table of a Parquet file, decoded into a file without a name."""
    found, path = storage.filesystem(uri)
    with tempfile.NamedTemporaryFile(suffix=".arrow") as spool:
        with (
            found.open_input_file(path) as stream,
            parquet.ParquetFile(stream) as file,
            pa.ipc.new_file(spool.name, file.schema_arrow) as writer,
        ):
            for batch in file.iter_batches(TOGETHER):
                writer.write_batch(batch)
        return pa.ipc.open_file(pa.memory_map(spool.name)).read_all()
