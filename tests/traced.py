"""A run that leaves a trace of every block that an actor computes; the tests disturb it.

`python -m tests.traced OUT TRACE ACTORS`: the shapes world's CLEVR task, four timesteps; with
--asleep N, that many pairs of a model that sleeps.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray

from diffitm.commands.stages.score import score
from diffitm.core.schema import PairRow
from diffitm.distributed import session
from diffitm.models.loading import resolve
from diffitm.scoring.scorer import RowScorer
from diffitm.scoring.specs import DiffusionSpec
from diffitm.shapes.layouts import write_world
from diffitm.store.blocks import SECONDS as SECONDS_OF_A_BLOCK
from diffitm.store.pair_table import write_examples
from diffitm.store.score_store import open_store
from diffitm.store.work_table import finish, open_pairs
from diffitm.tasks.clevr import Clevr
from tests.faults import sleeping
from tests.faults.sleeping import SleepSpec

# A block's least time: as with a real model, one is written long before the next is done.
SECONDS = 1.5
STEPS = (10, 260, 510, 760)
PAIRS = 30  # of a block


class Block(NamedTuple):
    """What an actor computes or has computed: its process, its node, and the pairs."""

    time: int  # nanoseconds
    process: int
    node: str
    pairs: list[tuple[str, str]]


class Tracer:
    """Passes everything on to the scorer and writes down which rows it was given.

    A block's file ends in .busy until it is done, then in .json. While there is a file `hold`, no
    block gets done.
    """

    def __init__(self, scorer: RowScorer, trace: str, poison: str | None = None) -> None:
        self.scorer, self.trace, self.cost = scorer, Path(trace), scorer.cost
        self.poison = poison
        self.node = ray.get_runtime_context().get_node_id()

    def measure_rate(self) -> float:
        """So slow that a block is of a few images."""
        return PAIRS * self.cost / SECONDS_OF_A_BLOCK

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        pairs = [(row.image, text) for row in rows for text in row.texts]
        block = Block(time.time_ns(), os.getpid(), self.node, pairs)
        busy = self.trace / f"{block.time}-{block.process}.busy"
        part = busy.with_suffix(".part")
        part.write_text(json.dumps(block))
        part.rename(busy)
        if self.poison in dict(pairs):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(SECONDS)
        while (self.trace / "hold").exists():
            time.sleep(0.05)
        lines = self.scorer.score(rows)
        busy.rename(busy.with_suffix(".json"))
        return lines


def read_trace(trace: Path, kind: str = "json") -> list[Block]:
    """The blocks that are done, or those of kind 'busy' (a killed actor leaves its own behind)."""
    found = []
    for path in sorted(trace.glob(f"*.{kind}")):
        try:
            *block, pairs = json.loads(path.read_text())
            found.append(Block(*block, [(image, text) for image, text in pairs]))
        except FileNotFoundError:
            continue  # done right now
    return found


@dataclass(frozen=True)
class TracedSpec(DiffusionSpec):
    trace: str = ""
    poison: str | None = None  # an image that ends its actor's process

    def build(self, device: str) -> RowScorer:
        return Tracer(super().build(device), self.trace, self.poison)


@dataclass(frozen=True)
class TracedSleep(SleepSpec):
    def build(self, device: str) -> Any:
        return Tracer(super().build(device), self.trace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out")
    parser.add_argument("trace")
    parser.add_argument("actors", type=int)
    parser.add_argument("--max-actors", type=int)
    parser.add_argument("--cpus", type=float)
    parser.add_argument("--ray", default="local")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--asleep", type=int)
    parser.add_argument("--poison")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    root = f"{given.out}/world"
    if given.asleep:
        spec: Any = TracedSleep(given.trace, 0.02)
        drawn = sleeping.examples(given.asleep)
    else:
        write_world(root, given.scenes)
        more = {"trace": given.trace, "poison": given.poison}
        spec = TracedSpec(resolve("shapes"), root, "diffusionitm", STEPS, **more)
        drawn = Clevr().examples(root)
    examples, _ = write_examples("clevr", drawn, f"{given.out}/examples", None)
    store = open_store(given.out, "shapes", spec.store_config())
    session.connect(given.ray)
    pool = session.choose_pool(given.actors, given.max_actors, given.cpus, 0.0)
    work = open_pairs(given.out, store, [examples], ["clevr"])
    finish(work, score(spec, work, store, pool))


if __name__ == "__main__":
    main()
