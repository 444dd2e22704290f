"""Images that Parquet itself holds: which columns do, where none is missing, what stands for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet


class Held(str):
    """The reference of an image that the file itself holds."""


def holds_image(kind: Any) -> bool:
    """Whether a column holds an encoded image a row: binary, or the Hub's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def has_all(file: parquet.ParquetFile, name: str) -> bool:
    """Whether every row of a column has one image of its own, by the file's counts of what is null, as the
    images themselves are long to read."""
    paths = [file.schema.column(n).path for n in range(len(file.schema))]
    places = [n for n, path in enumerate(paths) if path in (name, f"{name}.bytes")]
    groups = (file.metadata.row_group(n) for n in range(file.num_row_groups))
    counts = [group.column(place).statistics for group in groups for place in places]
    return bool(places) and all(c and c.has_null_count and not c.null_count for c in counts)


def reference(place: str, value: Any) -> str | None:
    """What stands for the image of a row: its place in the file or, where bytes are missing, the path that
    it gives instead."""
    is_struct = isinstance(value, dict)
    if (value["bytes"] if is_struct else value) is not None:
        return Held(place)
    return value.get("path") if is_struct else None


def batches(
    file: parquet.ParquetFile, names: list[str], most: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows with these columns, `most` at a time; without columns they are empty."""
    if not names:
        yield [{} for _ in range(file.metadata.num_rows)]
        return
    for batch in file.iter_batches(most, columns=names):
        yield batch.to_pylist()
