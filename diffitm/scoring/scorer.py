"""What scores images against texts, and rows of the pair table to rows of the score store."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from diffitm.core import images, storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_outside, patiently
from diffitm.core.schema import PairRow
from diffitm.scoring.batching import Batch


class Scorer(Protocol):
    """A scorer of one's own: a class whose objects score images against texts.

    It is made as Class(device=..), or as Class(argument, device=..) where its name has an argument. It
    may say what else its scores depend on by a class method `identity(argument) -> dict`, which is asked
    before it is made. `version` grows when the same input would give other scores; `score` is the kind of
    score in tables.
    """

    version: int
    score: str

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
        """Scores [images, texts], higher is better, of upright RGB images."""


class Loaded(NamedTuple):
    """A prepared image or why there is none; `outside`: the network or a server is to blame."""

    value: Any
    digest: str | None
    failure: str | None
    outside: bool = False


class RowScorer(ABC):
    """What the distributed code needs of a model. One that runs a model in batches has them in
    `batches`, that of its forwards first."""

    root: str
    cost: int = 1  # forwards of the model a pair
    batches: Sequence[Batch] = ()

    def measure_rate(self) -> float:
        """Forwards a second of the bare model, 0 if they cost next to nothing."""
        return 0.0

    def cut(self, texts: Sequence[str]) -> list[int]:
        """Places of the texts that are longer than the model reads, whose rest it never sees."""
        return []

    @abstractmethod
    def prepare(self, image: Image.Image) -> Any:
        """An image as score_loaded takes it, made in a thread beside others."""

    @abstractmethod
    def score_loaded(
        self, rows: Sequence[PairRow], loaded: Sequence[Loaded]
    ) -> list[dict[str, Any]]:
        """The rows of the score store for all pairs of rows whose images are prepared or failed."""

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        """The rows of the score store for all pairs of the work rows. An unreadable image is a failure of
        its own pairs."""
        return self.score_loaded(rows, load_images(rows, self.root, self.prepare))


def load_images(
    rows: Sequence[PairRow], root: str, prepare: Callable[[Any], Any], threads: int = 4
) -> list[Loaded]:
    """Read, decode and prepare the rows' images in a few threads.

    Raises Unavailable where the network or a server keeps all of them from being read.
    """
    away = False  # once an image was waited for in vain, the others are asked for once

    def one(row: PairRow) -> Loaded:
        nonlocal away
        read = functools.partial(images.load, root, row.image)
        try:
            image, digest = read() if away else patiently(read)
            return Loaded(prepare(image), digest, None)
        except Exception as error:  # whatever a decoder raises is that image's failure
            outside = is_outside(error)
            away = away or outside
            return Loaded(None, None, _reason(error), outside)

    if len(rows) < 2:
        loaded = [one(row) for row in rows]
    else:
        with ThreadPoolExecutor(min(threads, len(rows))) as pool:
            loaded = list(pool.map(one, rows))
    if rows and not any(item.failure is None for item in loaded):
        _check_reachable(root, rows, loaded)
    return loaded


def _check_reachable(root: str, rows: Sequence[PairRow], loaded: Sequence[Loaded]) -> None:
    """Raises Unavailable where no image could be read for a reason that is not their own."""
    text = f"none of {len(rows)} images could be read, such as {rows[0].image}: {loaded[0].failure}"
    if all(item.outside for item in loaded) and len(loaded) > 1:
        raise Unavailable(text)
    try:
        gone = not storage.exists(root)
    except InputError as error:
        raise Unavailable(f"{text}; {error}") from error
    if gone:
        raise Unavailable(f"{text}; there is no folder {storage.without_query(root)} here")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"unreadable image: {type(error).__name__}: {error}"


def blank(row: PairRow, text: str, digest: str | None) -> dict[str, Any]:
    """A line of the store without any score yet."""
    return {
        "row": row.row,
        "image": row.image,
        "text": text,
        "timesteps": None,
        "positions": None,
        "l2": None,
        "l1": None,
        "huber": None,
        "elements": None,
        "similarity": None,
        "digest": digest,
        "failure": None,
    }


def _failure(row: PairRow, loaded: Loaded) -> list[dict[str, Any]]:
    return [{**blank(row, text, loaded.digest), "failure": loaded.failure} for text in row.texts]


def similarity_lines(
    rows: Sequence[PairRow], loaded: Sequence[Loaded], similarities: Sequence[np.ndarray | None]
) -> list[dict[str, Any]]:
    """Lines of the store for a model with one similarity a pair; None where the image failed."""
    out = []
    for row, item, values in zip(rows, loaded, similarities, strict=True):
        if values is None:
            out += _failure(row, item)
            continue
        for text, value in zip(row.texts, values, strict=True):
            out.append({**blank(row, text, item.digest), "similarity": float(value)})
    return out
