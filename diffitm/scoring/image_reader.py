"""Images of rows, read, decoded and prepared in threads. It imports no torch."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from diffitm.core import images, storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.outside import is_outside, patiently
from diffitm.core.schema import PairRow

THREADS = 16  # read: most of them wait for a store or a disk
DECODED = 2  # images that are decoded at a time, where no more processors are known of


class Loaded(NamedTuple):
    """A prepared image or why there is none; `outside`: the network or a server is to blame."""

    value: Any
    digest: str | None
    failure: str | None
    outside: bool = False


class ImageReader:
    """Reads, decodes and prepares the images of rows in a few threads, some ahead of who takes them.

    An image that cannot be read is a failure of its own. `ahead` are those that are asked for at first.
    No more than `decoded` are decoded at a time, as they are large until they are prepared.
    """

    def __init__(
        self,
        rows: Sequence[PairRow],
        root: str,
        prepare: Callable[[Any], Any],
        ahead: int,
        threads: int,
        decoded: int = DECODED,
    ) -> None:
        self.rows, self.root, self.prepare = rows, root, prepare
        self.away = False  # once an image was waited for in vain, the others are asked for once
        self.failed: list[Loaded] = []
        self.left = iter(rows)
        self.asked: deque[Future[Loaded]] = deque()
        self.decoding = threading.Semaphore(decoded)
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
