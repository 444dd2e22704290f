"""Latents and encoded texts that were computed beforehand, read by name from Parquet."""

from __future__ import annotations

import itertools
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet
from safetensors.torch import load
from torch import Tensor

from diffitm.core import storage
from diffitm.models.denoiser import stack
from diffitm.training.job import Training
from diffitm.training.sampler import Item, Loaded, images_in

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
    """Encoded items of a folder; the most recently read `limit` bytes of them stay in memory.

    `failures` are the names that have no value, and why.
    """

    def __init__(self, folder: str, limit: int = MEMORY) -> None:
        found, _ = storage.filesystem(folder)
        self.files = [
            parquet.ParquetFile(path, filesystem=found)
            for path in storage.readable_parquet(folder)[0]
        ]
        self.limit, self.used = limit, 0
        self.kept: OrderedDict[tuple[int, int], list[dict[str, Tensor]]] = OrderedDict()
        self.place: dict[str, tuple[int, int, int]] = {}
        self.failures: dict[str, str] = {}
        for number, file in enumerate(self.files):
            columns = file.read(columns=["name", "failure"]).to_pydict()
            lines = zip(columns["name"], columns["failure"], strict=True)
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
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
            values = self.files[file].read_row_group(group, columns=["value"])["value"].to_pylist()
            known = [{} if value is None else load(value) for value in values]
            self.kept[file, group] = known
            self.used += _size(known)
            while self.used > self.limit and len(self.kept) > 1:
                self.used -= _size(self.kept.popitem(last=False)[1])
        self.kept.move_to_end((file, group))
        return known[row]


def _size(items: list[dict[str, Tensor]]) -> int:
    return sum(value.numel() * value.element_size() for item in items for value in item.values())


class CachedLoader:
    """Micro-batches of one worker in order, with the latents of their images."""

    def __init__(self, job: Training, folder: str, rank: int, world: int) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.cache = Cache(folder)
        self.waited = 0.0

    def steps(self, start: int) -> Iterator[list[Loaded]]:
        """For each step: (items, mean and deviation by path, failures) of its micro-batches."""
        plan = self.job.sampler()
        for step in range(start, self.job.steps):
            begin = time.perf_counter()
            own = plan.batches(step, self.rank, self.world)
            found = [(items, *self._latents(items)) for items in own]
            self.waited += time.perf_counter() - begin
            yield found

    def _latents(self, items: list[Item]) -> tuple[dict[str, Any], list[str]]:
        paths = images_in(items)
        lost = self.cache.failures
        good = [path for path in paths if path not in lost]
        failures = [f"{path}: {lost[path]}" for path in paths if path in lost]
        if not good:
            return {}, failures
        values = self.cache(good)
        pairs = zip(values["mean"], values["deviation"], strict=True)
        return dict(zip(good, pairs, strict=True)), failures
