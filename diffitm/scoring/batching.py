"""Items through a model in batches that a GPU's memory holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from diffitm.core.errors import InputError

T = TypeVar("T")
LONG = 5.0  # seconds of a measurement beside which warming up is nothing
HELP = "--dtype fp16, a smaller model, fewer actors on a GPU or one with more memory would help"
# How the libraries below torch, and the driver of a GPU that is shared, tell that memory is spent.
TOLD = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def measured(count: int, work: Callable[[], object]) -> float:
    """Items a second of work on so many, the second time; the first is enough where it was long."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        if seconds > LONG:
            break
    return count / seconds


class Stopwatch:
    """Adds up the time of blocks of code, on a GPU as that sees it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Adds the time of the block to `spent`; on a GPU between two of its events, without
        waiting for it. So a block that gives the GPU nothing to do adds the time for which it had nothing."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        yield
        end.record()
        self._events.append((begin, end))

    def spent(self) -> float:
        """Seconds in `timed` blocks since the last call."""
        if self._events:
            self._events[-1][1].synchronize()
        found = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._events) / 1000
        self._seconds = 0.0
        self._events.clear()
        return found


class Batch(Stopwatch):
    """How many items a model takes at once: halved for good when they do not fit the memory. It adds up
    the time of the model.

    `what` is its name in messages. `tell` is given a line for each time that it gets smaller.
    """

    def __init__(self, size: int, what: str = "batch size") -> None:
        super().__init__()
        self.size, self.what = size, what
        self.tell: Callable[[str], object] = lambda line: None

    def run(self, count: int, work: Callable[[int, int], T]) -> Iterator[T]:
        """work(start, end) of the ranges that range(count) is cut into, in order; what runs out of
        memory is done again in smaller ones.

        Raises InputError if a single item does not fit.
        """
        start = 0
        while start < count:
            end = min(start + self.size, count)
            # Outside of `except`, which would keep the failed call's tensors alive.
            if found := _fitting(work, start, end):
                yield found[0]
                start = end
            else:
                self._halve(end - start)

    def _halve(self, tried: int) -> None:
        if tried == 1:
            text = f"the GPU's memory is too small for the model even at a {self.what} of 1"
            raise InputError(f"{text}: {HELP}")
        before, self.size = self.size, tried // 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tell(f"{self.what} {before} -> {self.size}")


def _fitting(work: Callable[[int, int], T], start: int, end: int) -> list[T]:
    """The one result, none if the memory was too small."""
    try:
        return [work(start, end)]
    except RuntimeError as error:
        if is_out_of_memory(error):
            return []
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's memory was too small."""
    told = isinstance(error, RuntimeError) and any(text in str(error) for text in TOLD)
    return told or isinstance(error, torch.OutOfMemoryError)
