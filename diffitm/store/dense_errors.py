"""Lists of errors as arrays: whole ones, and those of which races stored a part."""

from __future__ import annotations

import tempfile
from typing import IO

import numpy as np
import pyarrow as pa

IN_MEMORY = 128 * 2**20  # bytes; a larger table lies in a file


class ErrorTable:
    """Rows of `steps` errors, float32, that are appended and then looked up by number."""

    def __init__(self, steps: int) -> None:
        self.steps, self.rows = steps, 0
        self._parts: list[np.ndarray] = []
        self._file: IO[bytes] | None = None
        self._table: np.ndarray | None = None

    def append(self, errors: np.ndarray) -> None:
        """Add rows [n, steps]."""
        self.rows += len(errors)
        self._parts.append(np.ascontiguousarray(errors, np.float32))
        if self.rows * self.steps * 4 > IN_MEMORY:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="diffitm-")  # noqa: SIM115 (as long as self)
            for part in self._parts:
                self._file.write(part.data)
            self._parts = []

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """The rows [n, steps] of these numbers, NaN where one is negative."""
        found = np.full((len(numbers), self.steps), np.nan, np.float32)
        there = numbers >= 0
        if there.all():
            np.take(self._whole(), numbers, 0, found)
        elif there.any():
            found[there] = self._whole()[numbers[there]]
        return found

    def fill(self, number: np.ndarray, other: np.ndarray) -> None:
        """Put the errors of `other` rows into what is NaN in rows, each of which is named once."""
        table = self._whole()
        for start in range(0, len(number), 10_000):
            to, of = number[start : start + 10_000], table[other[start : start + 10_000]]
            own = table[to]
            table[to] = np.where(np.isnan(own), of, own)

    def _whole(self) -> np.ndarray:
        if self._table is None:
            shape = self.rows, self.steps
            if self._file is None:
                self._table = np.concatenate([np.zeros((0, self.steps), np.float32), *self._parts])
            else:
                self._file.flush()
                self._table = np.memmap(self._file, np.float32, "r+", shape=shape)
            self._parts = []
        return self._table


def dense(lists: pa.ListArray, places: pa.ListArray, steps: int) -> np.ndarray:
    """Errors float32 [pairs, steps] of lists of them and of their places in the plan (null: all of it in
    order). NaN where there are none; what is stored as NaN is infinite here, so that the two differ."""
    out = np.full((len(lists), steps), np.nan, np.float32)
    present, parts = _valid(lists), _valid(places)
    if len(lists) and present.all() and not parts.any():
        out[:] = _measured(lists).reshape(len(lists), -1)
        return out
    if (whole := np.flatnonzero(present & ~parts)).size:
        out[whole] = _measured(lists.take(pa.array(whole))).reshape(len(whole), -1)
    if (raced := np.flatnonzero(present & parts)).size:
        chosen = places.take(pa.array(raced))
        rows = np.repeat(raced, chosen.value_lengths().to_numpy())
        out[rows, chosen.flatten().to_numpy()] = _measured(lists.take(pa.array(raced)))
    return out


def _valid(lists: pa.ListArray) -> np.ndarray:
    return np.asarray(lists.is_valid().to_numpy(zero_copy_only=False), bool)


def _measured(lists: pa.ListArray) -> np.ndarray:
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.where(np.isnan(values), np.inf, values)
