"""Images inside of Parquet files. The row groups that were read last are kept, as the next image is likely in
one."""

from __future__ import annotations

import bisect
import functools
import itertools
import threading
from collections import OrderedDict

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage

# Row groups, each about a hundred images as datasets are published. Rows come in the order of their names
# (1, 10, 100, 1000, 1001), so about four groups are in use at a time, and threads are a little out of order.
KEPT = 6
KEPT_BYTES = 2**29  # of a process; a larger group is kept alone
_groups: OrderedDict[tuple[str, str | None, int, str], pa.ChunkedArray] = OrderedDict()
_reading = threading.Lock()  # threads that read ahead want the same group, once


def parquet_cell(uri: str, row: int, column: str, item: int | None = None) -> bytes:
    """The encoded image in a row of a Parquet file, b'' where there is none; `item` is its place in a list.

    Raises OSError or ValueError.
    """
    stamp = storage.stamp(storage.parent(uri), [storage.name(uri)])
    with _reading:
        starts = _starts(uri, stamp)
        if row >= starts[-1]:
            raise ValueError("the file has no such row")
        group = bisect.bisect(starts, row) - 1
        values = _column(uri, stamp, group, column)
    value = values[row - starts[group]].as_py()
    value = value if item is None else value[item]
    return (value["bytes"] if isinstance(value, dict) else value) or b""


@functools.lru_cache(maxsize=16)
def _starts(uri: str, stamp: str | None) -> list[int]:
    """The first row of every row group, and the number of rows. `stamp` changes with the file, where it is
    known."""
    found, path = storage.filesystem(uri)
    with found.open_input_file(path) as stream:
        metadata = parquet.read_metadata(stream)
    groups = (metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))
    return list(itertools.accumulate(groups, initial=0))


def _column(uri: str, stamp: str | None, group: int, column: str) -> pa.ChunkedArray:
    """A row group's images, of those that are kept or read; the one that waited longest goes."""
    key = uri, stamp, group, column
    if key not in _groups:
        found, path = storage.filesystem(uri)
        with found.open_input_file(path) as stream:
            table = parquet.ParquetFile(stream).read_row_group(group, columns=[column])
        _groups[key] = table[column]
    _groups.move_to_end(key)
    while len(_groups) > 1 and (
        len(_groups) > KEPT or sum(values.nbytes for values in _groups.values()) > KEPT_BYTES
    ):
        _groups.popitem(last=False)
    return _groups[key]
