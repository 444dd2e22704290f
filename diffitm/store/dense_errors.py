"""Lists of errors as arrays: whole ones, and those of which races stored a part."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def dense(lists: pa.ListArray, places: pa.ListArray, steps: int) -> np.ndarray:
    """Errors float32 [pairs, steps] of lists of them and of their places in the plan (null: all of it in
    order). NaN where there are none; what is stored as NaN is infinite here, so that the two differ."""
    out = np.full((len(lists), steps), np.nan, np.float32)
    present, parts = _valid(lists), _valid(places)
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
