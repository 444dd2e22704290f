"""A traced run (tests.traced) on a cluster of one machine, and the faults that hit it.

Every fault returns what it hit, so that a test can tell that it did hit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from pyarrow import parquet
from ray.cluster_utils import Cluster

from tests import pipeline
from tests.traced import SECONDS, Block, read_trace

WAIT = 300
CPUS = 1.2  # of an actor: one fits on a node of 2


def until(what: Callable[[], Any], why: str) -> Any:
    """What the function returns as soon as it is true."""
    end = time.monotonic() + WAIT
    while not (found := what()):
        assert time.monotonic() < end, why
        time.sleep(0.1)
    return found


class Disturbed:
    """`folder` holds the run, `actors` have a node each, `spare` nodes stand by."""

    def __init__(self, folder: Path, actors: int, spare: int = 0, **options: int) -> None:
        self.out, self.trace, self.log = folder / "out", folder / "trace", folder / "log"
        self.out.mkdir(parents=True)
        self.trace.mkdir()
        self.hold = self.trace / "hold"
        self.options = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        self.actors = actors
        # The head has room for the readers and the writer, none for an actor.
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        self.nodes: list[Any] = []
        for _ in range(actors + spare):
            self.add_node()
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        call = [sys.executable, "-m", "tests.traced", str(self.out), str(self.trace)]
        call += [str(self.actors), *self.options, f"--ray={self.cluster.address}", f"--cpus={CPUS}"]
        env = pipeline.environment(PYTHONPATH=str(pipeline.ROOT))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                call, stdout=log, stderr=log, start_new_session=True, cwd=pipeline.ROOT, env=env
            )

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.cluster.shutdown()

    def finish(self) -> None:
        """Wait for the run's end, which must be a good one."""
        assert self.process.wait(WAIT) == 0, self.log.read_text()

    def committed(self, images: int) -> None:
        """Wait until the checkpoint has that many images."""

        def enough() -> bool:
            assert self.process.poll() is None, f"the run ended\n{self.log.read_text()}"
            return pipeline.images_done(self.out) >= images

        until(enough, f"no {images} images\n{self.log.read_text()}")

    def busy(self) -> list[Block]:
        """The blocks that living actors compute now."""
        return [b for b in read_trace(self.trace, "busy") if psutil.pid_exists(b.process)]

    @contextmanager
    def _held(self) -> Iterator[Block]:
        """A block that does not get done before its actor has died of what is done meanwhile."""
        self.hold.touch()
        since = time.time_ns() - int(SECONDS * 1e9)  # older ones may be past the hold

        def young() -> list[Block]:
            return [block for block in self.busy() if block.time > since]

        (block, *_) = until(young, "no actor is busy")
        yield block
        until(lambda: not psutil.pid_exists(block.process), "its actor lives")
        self.hold.unlink()

    def kill_actor(self) -> Block:
        """SIGKILL of an actor's process in the middle of a block."""
        with self._held() as block:
            os.kill(block.process, signal.SIGKILL)
        return block

    def remove_node(self) -> Block:
        """The node of a busy actor goes away without a word."""
        with self._held() as block:
            (node,) = (n for n in self.nodes if n.node_id == block.node)
            self.nodes.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)
        return block

    def add_node(self) -> Any:
        node = self.cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
        self.nodes.append(node)
        return node

    def kill_driver(self) -> Block:
        """SIGKILL of the driver while an actor is busy; its actors follow it."""
        with self._held() as block:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)
        return block

    def computed(self) -> list[tuple[str, str]]:
        """Every pair that was computed, as often as it was."""
        return [pair for block in read_trace(self.trace) for pair in block.pairs]

    @property
    def block(self) -> int:
        """Pairs of the largest block."""
        return largest_block(self.out)


def largest_block(out: Path) -> int:
    """How many pairs the largest block of a run has."""
    (index,) = out.glob("work/*/*/blocks.parquet")
    return max(parquet.read_table(index)["pairs"].to_pylist())


def scores(out: Path) -> dict[tuple[str, str], np.ndarray]:
    """The store's errors by pair; every pair must be there once, and none have failed."""
    table = pipeline.scores(out)
    keys = list(zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(keys) == len(set(keys))
    assert table["failure"].null_count == len(keys)
    return dict(zip(keys, np.array(table["l2"].to_pylist()), strict=True))


def assert_same(found: dict[Any, Any], wanted: dict[Any, Any]) -> None:
    """The same pairs with the same errors."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5)
