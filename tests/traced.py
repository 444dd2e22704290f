"""A run that leaves a trace of every block that an actor computes; the tests kill it.

`python -m tests.traced OUT TRACE ACTORS`: the shapes world's CLEVR task, four timesteps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffitm.distributed import session
from diffitm.distributed.score import _block_rows, score
from diffitm.models.load import resolve
from diffitm.pairs import write_examples
from diffitm.resume import finish, open_work
from diffitm.scorers import DiffusionSpec
from diffitm.scoring import Scorer, Work
from diffitm.shapes.layouts import write_world
from diffitm.store import open_store
from diffitm.tasks.clevr import Clevr


class Tracer:
    """Passes everything on to the scorer and writes down which rows it was given."""

    def __init__(self, scorer: Scorer, trace: str) -> None:
        self.scorer, self.trace, self.cost = scorer, Path(trace), scorer.cost

    def measure_rate(self) -> float:
        return self.scorer.measure_rate()

    def score(self, rows: Sequence[Work]) -> list[dict[str, Any]]:
        lines = self.scorer.score(rows)
        name = f"{time.time_ns()}-{rows[0].row}.json"
        (self.trace / name).write_text(json.dumps([row.row for row in rows]))
        return lines


@dataclass(frozen=True)
class TracedSpec(DiffusionSpec):
    trace: str = ""

    def build(self, device: str) -> Scorer:
        return Tracer(super().build(device), self.trace)


def main(out: str, trace: str, actors: int) -> None:
    root = f"{out}/world"
    write_world(root, 60)
    spec = TracedSpec(resolve("shapes"), root, "diffusionitm", (10, 260, 510, 760), trace=trace)
    examples, _ = write_examples("clevr", Clevr().examples(root), f"{out}/examples", None)
    store = open_store(out, "shapes", spec.store_config())
    session.connect("local")
    pool = session.choose_pool(actors, None, None, 0.0)
    work = open_work(out, store, [examples], ["clevr"])
    block = Path(out, "block")
    if not block.exists():
        block.write_text(str(_block_rows(work, spec.cost, pool)))
    finish(work, score(spec, work, store, pool))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
