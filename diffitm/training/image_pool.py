"""Images without captions, of which training takes some and measures on others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffitm.captions.read import divide, read, tell_lost
from diffitm.captions.row import Reading
from diffitm.captions.shards import read_shard
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.training.rows import TrainingRow

IMAGES = Reading(texts=())


class Paths(Sequence[TrainingRow]):
    """Rows of an image alone, without an object for each of millions."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: Any) -> Any:
        return TrainingRow(self.paths[int(position)], "")


def read_images(uri: str) -> tuple[list[str], dict[str, int]]:
    """References of the images of a table or a folder, in its order; and what was left out (what and why
    -> how often).

    Raises InputError that says what is right.
    """
    found, lost = divide(read(uri, IMAGES))
    tell_lost(uri, lost)
    return [row.image for row in found], dict(Counter(f"{r.place}: {r.failure}" for r in lost))


def in_shard(shard: str) -> tuple[list[str], list[str]]:
    """References of a shard's images, and what of it gives none, with the reasons.

    Raises InputError for one that cannot be read now: another time it might give more.
    """
    found, lost = divide(read_shard(shard, IMAGES))
    name = storage.name(shard)
    return [row.image for row in found], [f"{name}, {row.place}: {row.failure}" for row in lost]


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
