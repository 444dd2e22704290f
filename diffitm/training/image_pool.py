"""Images without captions: folders, WebDataset shards, Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import is_image, row_of
from diffitm.training.rows import TrainingRow
from diffitm.training.webdataset import members

COLUMN = "image"


class Paths(Sequence[TrainingRow]):
    """Rows of an image alone, without an object for each of millions."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: Any) -> Any:
        return TrainingRow(self.paths[int(position)], "")


def in_folder(uri: str) -> list[str]:
    """Paths of a folder's images below it, or references into its Parquet files; sorted.

    Raises InputError if it holds neither.
    """
    _, top = storage.filesystem(uri)
    paths = [p.removeprefix(top).lstrip("/") for p in storage.files(uri, recursive=True)]
    found = [path for path in paths if is_image(path)]
    if not found:
        tables = [path for path in paths if path.endswith(".parquet")]
        found = [f for path in tables for f in in_parquet(storage.join(uri, path), path)]
    if not found:
        if not storage.exists(uri):
            raise InputError(f"{uri}: there is no such folder", "data")
        what = "holds no image (.jpg, .jpeg, .png) and no .parquet; shards are given as DIR/*.tar"
        raise InputError(f"{uri}: {what}", "data")
    return found


def in_parquet(uri: str, name: str) -> list[str]:
    """What the column `image` holds: paths, or a reference to the row of `name` where it has the
    encoded images themselves, as binary or as the Hub's struct of bytes and path.

    Raises InputError that names the column and what is right.
    """
    found, path = storage.filesystem(uri)
    try:
        with found.open_input_file(path) as stream:
            file = parquet.ParquetFile(stream)
            schema = file.schema_arrow
            if COLUMN not in schema.names:
                raise InputError(f"{uri}: no column {COLUMN}; it has {', '.join(schema.names)}")
            kind = schema.field(COLUMN).type
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return [p for p in file.read(columns=[COLUMN])[COLUMN].to_pylist() if p]
            if not _holds_bytes(kind):
                raise InputError(f"{uri}: column {COLUMN} is {kind}; expects paths or bytes")
            return [row_of(name, row) for row in range(file.metadata.num_rows)]
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", "data") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f": {uri} is no Parquet: {error}", "data") from error


def _holds_bytes(kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def in_shard(shard: str) -> tuple[list[str], str | None]:
    """References of a shard's images, and why it could be read no further, if it breaks off.

    Raises InputError for one that cannot be read now: another time it might give more.
    """
    found: list[str] = []
    try:
        for _, _, value in members(shard, texts=False):
            found.append(value)
    except InputError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return found, str(error)
    return found, None


def split(paths: Sequence[str], most: int | None, held: int) -> tuple[list[str], list[str]]:
    """The images to train on and `held` others to measure on, each path once, evenly spread; at most
    `most` to train on, which changes nothing of the others. Raises InputError if too few are left."""
    unique = list(dict.fromkeys(paths))
    if held >= len(unique):
        raise InputError(f"{held}: there are only {len(unique):,} images", "held_out")
    kept = {i * len(unique) // held for i in range(held)} if held else set()
    trained = [path for i, path in enumerate(unique) if i not in kept]
    if most is not None and most < len(trained):
        trained = [trained[i * len(trained) // most] for i in range(most)]
    return trained, [unique[i] for i in sorted(kept)]
