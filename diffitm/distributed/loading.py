"""Micro-batches with decoded pixels, which Ray Data's tasks prepare ahead of the training loop.

Nothing here imports torch: the tasks' processes would take seconds to start.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from diffitm import images

if TYPE_CHECKING:
    from diffitm.training.draw import Item, Loaded
    from diffitm.training.job import Training
    from diffitm.training.views import Views, Whole

READ_AHEAD = 4  # micro-batches
BLOCK = 4  # micro-batches of a task
LOADER_CPUS = 0.25
CHUNK = 200  # steps that one execution of Ray Data loads


def load_batch(table: pa.Table, root: str, view: Whole | Views) -> pa.Table:
    """A task of Ray Data: pixels uint8 of each micro-batch's images, or why one is unreadable."""
    lines = []
    for line in table.to_pylist():
        pixels, failures = [], []
        for path, seed in zip(line["images"], line["seeds"], strict=True):
            try:
                image, _ = images.load(root, path)
                pixels.append(b"".join(part.tobytes() for part in view(image, seed)))
                failures.append("")
            except Exception as error:  # whatever a decoder raises costs its own example
                pixels.append(b"")
                failures.append(f"{path}: {type(error).__name__}: {error}")
        lines.append({"number": line["number"], "pixels": pixels, "failures": failures})
    return pa.Table.from_pylist(lines)


class Loader:
    """Micro-batches of one worker in order, with the pixels that Ray Data decoded meanwhile."""

    def __init__(self, job: Training, rank: int, world: int, view: Whole | Views) -> None:
        self.job, self.rank, self.world, self.view = job, rank, world, view
        self.waited = 0.0

    def steps(self, start: int) -> Iterator[list[Loaded]]:
        """For each step: (items, the view's pixels uint8 [H, W, 3] by path, failures) of its
        micro-batches."""
        for first in range(start, self.job.steps, CHUNK):
            yield from self._chunk(range(first, min(first + CHUNK, self.job.steps)))

    def _chunk(self, steps: range) -> Iterator[list[Loaded]]:
        from diffitm.training.draw import images_in

        plan = self.job.plan()
        own = [plan.batches(step)[self.rank :: self.world] for step in steps]
        flat = [batch for batches in own for batch in batches]
        paths = [images_in(batch) for batch in flat]
        seeds = [_seeds(batch, found) for batch, found in zip(flat, paths, strict=True)]
        table = pa.table({"number": range(len(paths)), "images": paths, "seeds": seeds})
        loaded = iter(self._loaded(table))
        number = 0
        for batches in own:
            found = []
            for batch in batches:
                begin = time.perf_counter()
                line = next(loaded)
                self.waited += time.perf_counter() - begin
                assert line["number"] == number
                found.append((batch, *self._pixels(paths[number], line)))
                number += 1
            yield found

    def _loaded(self, table: pa.Table) -> Iterator[dict[str, Any]]:
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        blocks = ray.data.from_arrow(table).repartition(target_num_rows_per_block=BLOCK)
        arguments = (self.job.root, self.view)
        loaded = blocks.map_batches(
            load_batch,
            fn_args=arguments,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=LOADER_CPUS,
            compute=ray.data.TaskPoolStrategy(size=self._tasks()),
        )
        for batch in loaded.iter_batches(
            batch_size=1, batch_format="pyarrow", prefetch_batches=READ_AHEAD
        ):
            yield from batch.to_pylist()

    def _tasks(self) -> int:
        """How many load at a time, each in a process of its own: as many as the worker's share of the
        processors, more where they wait for an object store."""
        import ray

        share = ray.cluster_resources().get("CPU", 1) / self.world
        return max(1, int(share / LOADER_CPUS if "://" in self.job.root else share))

    def _pixels(
        self, paths: list[str], line: dict[str, Any]
    ) -> tuple[dict[str, list[np.ndarray]], list[str]]:
        found = {
            path: self._parts(np.frombuffer(data, np.uint8))
            for path, data in zip(paths, line["pixels"], strict=True)
            if data
        }
        return found, [failure for failure in line["failures"] if failure]

    def _parts(self, data: np.ndarray) -> list[np.ndarray]:
        sides = self.view.sides
        ends = np.cumsum([3 * side**2 for side in sides])[:-1]
        parts = zip(np.split(data, ends), sides, strict=True)
        return [part.reshape(side, side, 3) for part, side in parts]


def _seeds(items: list[Item], paths: list[str]) -> list[int]:
    """Of each image the seed of the example that it is the right one of, for its crop."""
    known = {item.image: item.seed for item in reversed(items)}
    return [known.get(path, 0) for path in paths]
