"""Micro-batches with decoded pixels, which a torch DataLoader's processes prepare ahead of the loop."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from diffitm.core import images
from diffitm.core.outside import patiently

if TYPE_CHECKING:
    from diffitm.training.crops import Views, Whole
    from diffitm.training.job import Training
    from diffitm.training.sampler import Item, Loaded

READ_AHEAD = 2  # micro-batches of each process
AT_ONCE = 8  # images that a process reads, where it waits for an object store
START = "forkserver"  # neither CUDA nor pyarrow's S3 nor a Ray worker may be forked
_starting = threading.Lock()
Request = list[tuple[str, int]]  # of a micro-batch: each image's path and the seed of its crop
# Of the images that are readable, by view uint8 [N, side, side, 3]; why each other one is not, else ''.
Answer = tuple[list[Tensor], list[str]]


def prepare_processes() -> None:
    """Start what the loader's processes are forked from: it imports torch beside the caller, who has a
    model to load meanwhile."""
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload(["torch", __name__])
    from multiprocessing.forkserver import ensure_running

    ensure_running()


class Images(Dataset[Answer]):
    """Decoded images of a micro-batch, asked for by path and seed."""

    def __init__(self, root: str, view: Whole | Views) -> None:
        self.root, self.view = root, view
        self.threads = AT_ONCE if "://" in root else 1

    def __getitem__(self, request: Request) -> Answer:
        if self.threads == 1:
            loaded = [self._load(*image) for image in request]
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                loaded = list(pool.map(self._load, *zip(*request, strict=True)))
        good = [pixels for pixels, _ in loaded if pixels is not None]
        by_view = [torch.from_numpy(np.stack(squares)) for squares in zip(*good, strict=True)]
        return by_view, [failure for _, failure in loaded]

    def _load(self, path: str, seed: int) -> tuple[list[np.ndarray] | None, str]:
        try:
            image, _ = patiently(partial(images.load, self.root, path))
            return self.view(image, seed), ""
        except Exception as error:  # whatever a decoder raises costs its own example
            return None, f"{path}: {type(error).__name__}: {error}"


class Loader:
    """Micro-batches of one worker in their order, decoded by a process for each of its processors."""

    def __init__(
        self, job: Training, rank: int, world: int, view: Whole | Views, processors: float
    ) -> None:
        self.job, self.rank, self.world, self.view = job, rank, world, view
        self.processes = max(1, int(processors))
        self.waited = 0.0

    def steps(self, start: int) -> Iterator[list[Loaded]]:
        """For each step: (items, the view's pixels uint8 [H, W, 3] by path, failures) of its
        micro-batches."""
        plan = self.job.sampler()
        planned: deque[tuple[list[Item], Request]] = deque()

        def requests() -> Iterator[Request]:
            for step in range(start, self.job.steps):
                for items in plan.batches(step, self.rank, self.world):
                    planned.append((items, wanted(items)))
                    yield planned[-1][1]

        own = len(range(self.rank, self.job.grad_accum_steps, self.world))
        with _without_main():
            loaded: Iterator[Answer] = iter(self._answers(requests()) if own else ())
        for _ in range(start, self.job.steps):
            found: list[Loaded] = []
            for _ in range(own):
                begin = time.perf_counter()
                by_view, failures = next(loaded)
                self.waited += time.perf_counter() - begin
                items, request = planned.popleft()
                found.append(
                    (items, _by_path(request, by_view, failures), list(filter(None, failures)))
                )
            yield found

    def _answers(self, requests: Iterator[Request]) -> DataLoader[Answer]:
        return DataLoader(
            Images(self.job.root, self.view),
            sampler=requests,
            batch_size=None,
            num_workers=self.processes,
            multiprocessing_context=START,
            prefetch_factor=READ_AHEAD,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # not the one that the loop may draw from
        )


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start now do not run the caller's script once more, which for a worker of Ray is to
    import Ray: half a second each."""
    with _starting:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _unchanged(answer: Any) -> Any:
    return answer


def wanted(items: list[Item]) -> Request:
    """The images of a micro-batch, each with the seed of the example that it is the right one of, for
    its crop."""
    from diffitm.training.sampler import images_in

    seeds = {item.image: item.seed for item in reversed(items)}
    return [(path, seeds.get(path, 0)) for path in images_in(items)]


def _by_path(
    request: Request, by_view: list[Tensor], failures: list[str]
) -> dict[str, list[np.ndarray]]:
    good = [path for (path, _), failure in zip(request, failures, strict=True) if not failure]
    return {path: [pixels[i].numpy() for pixels in by_view] for i, path in enumerate(good)}
