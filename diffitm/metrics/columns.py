"""Numbers of examples by key, of which an example need not have each."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

import numpy as np

K = TypeVar("K", bound=Hashable)


class Columns(Generic[K]):
    """Columns that grow; `fill` stands where an example has no number."""

    def __init__(self, fill: float | bool = np.nan) -> None:
        self.fill = fill
        self._columns: dict[K, np.ndarray] = {}
        self._first: dict[K, tuple[int, int]] = {}

    def put(self, key: K, places: np.ndarray, values: np.ndarray) -> None:
        """Set the numbers of the examples at these places, which rise."""
        if not len(places):
            return
        column = self._columns.setdefault(key, self._blank(0))
        if len(column) <= places[-1]:
            more = max(int(places[-1]) + 1, 2 * len(column)) - len(column)
            column = self._columns[key] = np.concatenate([column, self._blank(more)])
        column[places] = values
        there = places[~np.isnan(values)]
        if len(there):
            found = int(there[0]), len(self._first)
            self._first[key] = min(self._first.get(key, found), found)

    def read(self, size: int) -> dict[K, np.ndarray]:
        """The columns of the first `size` examples, in the order in which examples have them."""
        keys = sorted(self._first, key=lambda key: self._first[key])
        return {key: self._whole(key, size) for key in keys}

    def _whole(self, key: K, size: int) -> np.ndarray:
        column = self._columns[key][:size]
        return np.concatenate([column, self._blank(size - len(column))])

    def _blank(self, size: int) -> np.ndarray:
        return np.full(size, self.fill)
