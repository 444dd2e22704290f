"""What scores images against texts, and rows of the pair table to rows of the score store."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from diffitm.core.schema import PairRow
from diffitm.scoring.batching import Batch, Stopwatch
from diffitm.scoring.image_reader import DECODED, THREADS, ImageReader, Loaded

CLIP_IMAGE_COST = 64  # pairs whose cosines cost as much as an image's embedding


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


class RowScorer(ABC):
    """What the distributed code needs of a model. One that runs a model in batches has them in
    `batches`, that of its forwards first."""

    root: str
    cost: int = 1  # forwards of the model a pair
    batches: Sequence[Batch] = ()
    device = torch.device("cpu")

    @functools.cached_property
    def loading(self) -> Stopwatch:
        """Times in which there was nothing to do but to wait for images."""
        return Stopwatch()

    @property
    @abstractmethod
    def at_once(self) -> int:
        """How many images are waited for; while the model has these, as many more are read."""

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
        self, rows: Sequence[PairRow], loaded: Iterable[Sequence[Loaded]]
    ) -> list[dict[str, Any]]:
        """The rows of the score store for all pairs of rows whose images, prepared or failed, come in
        order, some at a time."""

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        """The rows of the score store for all pairs of the work rows. An unreadable image is a failure of
        its own pairs."""
        return self.score_loaded(rows, self.load(rows, self.at_once))

    def load(self, rows: Sequence[PairRow], at_once: int) -> Iterator[list[Loaded]]:
        """The rows' images in order, `at_once` at a time, as ImageReader reads them. Reading begins now."""
        # No thread is without work where the model takes few at once.
        ahead = max(at_once, THREADS)
        decoded = max(DECODED, torch.get_num_threads())
        reader = ImageReader(rows, self.root, self.prepare, ahead, THREADS, decoded)
        return self._taken(reader, at_once)

    def _taken(self, reader: ImageReader, at_once: int) -> Iterator[list[Loaded]]:
        with reader:
            while True:
                with self.loading.timed(self.device):
                    found = reader.take(at_once)
                if not found:
                    return
                yield found


def blank(row: PairRow, text: str, digest: str | None) -> dict[str, Any]:
    """A line of the store without any score yet."""
    return {
        "row": row.row,
        "image": row.image,
        "text": text,
        "timesteps": None,
        "sigmas": None,
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
