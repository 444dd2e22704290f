"""What scores images against texts, and rows of the pair table to rows of the score store."""

from __future__ import annotations

import functools
import itertools
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from diffitm.core import images, storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_outside, patiently
from diffitm.core.schema import PairRow
from diffitm.scoring.batching import Batch, Stopwatch

THREADS = 16  # read: most of them wait for a store or a disk
CLIP_IMAGE_COST = 64  # pairs whose cosines cost as much as an image's embedding
LEAST_DECODED = 2  # images that are decoded at a time, more where torch has more processors


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
        reader = ImageReader(rows, self.root, self.prepare, ahead, THREADS)
        return self._taken(reader, at_once)

    def _taken(self, reader: ImageReader, at_once: int) -> Iterator[list[Loaded]]:
        with reader:
            while True:
                with self.loading.timed(self.device):
                    found = reader.take(at_once)
                if not found:
                    return
                yield found


class ImageReader:
    """Reads, decodes and prepares the images of rows in a few threads, some ahead of who takes them.

    An image that cannot be read is a failure of its own. `ahead` are those that are asked for at first.
    """

    def __init__(
        self,
        rows: Sequence[PairRow],
        root: str,
        prepare: Callable[[Any], Any],
        ahead: int,
        threads: int,
    ) -> None:
        self.rows, self.root, self.prepare = rows, root, prepare
        self.away = False  # once an image was waited for in vain, the others are asked for once
        self.failed: list[Loaded] = []
        self.left = iter(rows)
        self.asked: deque[Future[Loaded]] = deque()
        self.decoding = threading.Semaphore(max(LEAST_DECODED, torch.get_num_threads()))
        self.pool = ThreadPoolExecutor(max(1, min(threads, len(rows))))
        self._ask(ahead)

    def __enter__(self) -> ImageReader:
        return self

    def __exit__(self, *_: object) -> None:
        # One that hangs must not hold up an error on its way.
        self.pool.shutdown(wait=False, cancel_futures=True)

    def take(self, count: int) -> list[Loaded]:
        """The next `count` images, none after the last; asks for as many more before it waits.

        Raises Unavailable with the last of them if the network or a server kept all from being read.
        """
        self._ask(count)
        found = [self.asked.popleft().result() for _ in range(min(count, len(self.asked)))]
        self.failed += [item for item in found if item.failure is not None]
        if found and len(self.failed) == len(self.rows):
            _check_reachable(self.root, self.rows, self.failed)
        return found

    def _ask(self, count: int) -> None:
        for row in itertools.islice(self.left, count):
            self.asked.append(self.pool.submit(self._read, row))

    def _read(self, row: PairRow) -> Loaded:
        read = functools.partial(images.read, self.root, row.image)
        try:
            data = read() if self.away else patiently(read)
            with self.decoding:
                image, digest = images.opened(data, row.image)
                return Loaded(self.prepare(image), digest, None)
        except Exception as error:  # whatever a decoder raises is that image's failure
            outside = is_outside(error)
            self.away = self.away or outside
            return Loaded(None, None, _reason(error), outside)


def load_images(
    rows: Sequence[PairRow], root: str, prepare: Callable[[Any], Any], threads: int = THREADS
) -> list[Loaded]:
    """Read, decode and prepare the rows' images in a few threads.

    Raises Unavailable where the network or a server keeps all of them from being read.
    """
    with ImageReader(rows, root, prepare, len(rows), threads) as reader:
        return reader.take(len(rows))


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
