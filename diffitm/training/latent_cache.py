"""Micro-batches whose latents were computed beforehand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from diffitm.scoring.encoded_items import Cache
from diffitm.training.job import Training
from diffitm.training.sampler import Item, Loaded, images_in


class CachedLoader:
    """Micro-batches of one worker in order, with the latents of their images."""

    def __init__(self, job: Training, folder: str, rank: int, world: int) -> None:
        self.job, self.rank, self.world = job, rank, world
        self.cache = Cache(folder)
        self.waited = 0.0

    def steps(self, start: int) -> Iterator[list[Loaded]]:
        """For each step: (items, mean and deviation by path, failures) of its micro-batches."""
        plan = self.job.sampler()
        for step in range(start, self.job.steps):
            begin = time.perf_counter()
            own = plan.batches(step, self.rank, self.world)
            found = [(items, *self._latents(items)) for items in own]
            self.waited += time.perf_counter() - begin
            yield found

    def _latents(self, items: list[Item]) -> tuple[dict[str, Any], list[str]]:
        paths = images_in(items)
        lost = self.cache.failures
        good = [path for path in paths if path not in lost]
        failures = [f"{path}: {lost[path]}" for path in paths if path in lost]
        if not good:
            return {}, failures
        values = self.cache(good)
        pairs = zip(values["mean"], values["deviation"], strict=True)
        return dict(zip(good, pairs, strict=True)), failures
