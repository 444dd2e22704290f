"""Latents and encoded texts that were computed beforehand, read by name from Parquet."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet
from pyarrow.fs import FileSystem
from safetensors.torch import load
from torch import Tensor

from diffitm.core import storage
from diffitm.models.denoiser import stack

# `value`: the item's tensors as safetensors; null, with the reason in `failure`, if unreadable.
CACHED = pa.schema(
    [
        ("row", pa.int64()),
        ("position", pa.int64()),
        ("name", pa.string()),
        ("failure", pa.string()),
        ("value", pa.large_binary()),
    ]
)
ROW_GROUP = 4  # a row group: what is read for one item
MEMORY = 2 * 2**30


class Cache:
    """Encoded items of folders; the most recently read `limit` bytes of them stay in memory.

    `failures` are the names that have no value, and why. Files that a kill cut off are left out.
    """

    def __init__(self, *folders: str, limit: int = MEMORY) -> None:
        self.files = [file for folder in folders for file in _whole_files(folder)]
        self.limit, self.used = limit, 0
        self.kept: OrderedDict[tuple[int, int], list[dict[str, Tensor]]] = OrderedDict()
        self.place: dict[str, tuple[int, int, int]] = {}
        self.failures: dict[str, str] = {}
        with ThreadPoolExecutor(storage.AT_ONCE) as pool:
            found = pool.map(lambda file: file.read(["name", "failure"]).to_pydict(), self.files)
            for number, columns in enumerate(found):
                self._note(number, columns)

    def _note(self, number: int, columns: Mapping[str, list[Any]]) -> None:
        """Where the items of a file are."""
        footer = self.files[number].footer
        lines = zip(columns["name"], columns["failure"], strict=True)
        for group in range(footer.num_row_groups):
            rows = footer.row_group(group).num_rows
            for row, (name, failure) in enumerate(itertools.islice(lines, rows)):
                self.place[name] = (number, group, row)
                if failure is not None:
                    self.failures[name] = failure

    def __call__(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The items' tensors, stacked [B, ...]; none of them may be among the failures. Masked texts are
        padded to the longest."""
        found = [self._item(*self.place[name]) for name in names]
        return stack([{key: value[None] for key, value in item.items()} for item in found])

    def _item(self, file: int, group: int, row: int) -> Mapping[str, Tensor]:
        known = self.kept.get((file, group))
        if known is None:
            values = self.files[file].read(["value"], group)["value"].to_pylist()
            known = [{} if value is None else load(value) for value in values]
            self.kept[file, group] = known
            self.used += _size(known)
            while self.used > self.limit and len(self.kept) > 1:
                self.used -= _size(self.kept.popitem(last=False)[1])
        self.kept.move_to_end((file, group))
        return known[row]


def _size(items: list[dict[str, Tensor]]) -> int:
    return sum(value.numel() * value.element_size() for item in items for value in item.values())


class _File(NamedTuple):
    """A file that is opened where it is read: there may be more than a process may have open."""

    where: FileSystem
    path: str
    footer: parquet.FileMetaData

    def read(self, columns: list[str], group: int | None = None) -> pa.Table:
        """Columns of a row group, or of all."""
        groups = range(self.footer.num_row_groups) if group is None else [group]
        with self.where.open_input_file(self.path) as stream:
            file = parquet.ParquetFile(stream, metadata=self.footer, pre_buffer=True)
            return file.read_row_groups(groups, columns, use_threads=False)


def _whole_files(folder: str) -> list[_File]:
    found, path = storage.filesystem(folder)
    names = [storage.name(file) for file in storage.files(folder, ".parquet")]
    footers = storage.footers(folder, names)
    return [_File(found, f"{path}/{name}", footer) for name, footer in footers.items()]
