"""How fast are scores made? Four ways in one run, on one table and one model, on the CPU.

plain   the published algorithm as tests/plain.py has it, at its default batch of 4 images
ours    diffitm from the examples to the Parquet store, through Ray
raced   the same, scoring candidates only as far as their decision needs
bare    the model alone, doing only the work that the table needs, at its best batch size

README.md says how to run it and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffitm.core import storage
from diffitm.core.schema import Example
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.race_table import Races, write_races
from diffitm.evaluation.races import RaceOptions, pair_values
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import resolve
from diffitm.scoring.racing import RacePlan, Racing, hold
from diffitm.scoring.scorer import RowScorer
from diffitm.scoring.specs import DiffusionSpec
from diffitm.shapes.layouts import CANDIDATES, World, write_flickr30k
from diffitm.store.join import read_scored
from diffitm.store.pair_table import WorkTable, write_examples
from diffitm.store.score_store import Store, open_store
from diffitm.store.work_table import open_pairs, open_work
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from tests.plain import BATCH, Pair, Plain, list_pairs, published_timesteps

BATCH_SIZES = (16, 32, 64, 128)
PROBE = 1024  # forwards that tell how good a batch size is
PLAIN, WHOLE, OURS, BARE = "plain", "ours, whole", "ours, actors up", "bare"
RACED_WHOLE, RACED = "raced, whole", "raced, actors up"
RATIOS = ((OURS, PLAIN), (RACED, PLAIN), (RACED, OURS), (OURS, BARE), (WHOLE, BARE))
TASK = Flickr30kText()  # whose contests are those of both directions
model: Plain  # in each process of `plain` and `bare`, which begin together at the start line
start_line: Any


@dataclass(frozen=True)
class Table:
    """One text and one image decision for every image; the two share no pair, so that what is
    measured does not hang on how much a data set repeats itself."""

    root: str
    text: list[Example]
    image: list[Example]
    timesteps: tuple[int, ...]

    @property
    def pair_steps(self) -> int:
        """How many (pair, timestep)s the decisions ask for."""
        return sum(len(e.images) * len(e.texts) for e in self.text + self.image) * len(
            self.timesteps
        )

    @property
    def forwards(self) -> int:
        """How many forwards of the U-Net they need: also the empty text once an image."""
        images = len({i for e in self.image for i in e.images})
        return self.pair_steps + images * len(self.timesteps)

    @property
    def texts(self) -> int:
        """How many distinct texts there are, with the empty one."""
        return len({text for e in self.text + self.image for text in e.texts}) + 1

    def decisions(self, examples: list[Example]) -> list[list[Pair]]:
        """The candidates of each example, images as files."""
        files = [[str(Path(self.root, image)) for image in e.images] for e in examples]
        return [list_pairs(f, e.texts) for f, e in zip(files, examples, strict=True)]


def make_table(root: str, images: int, timesteps: int) -> Table:
    """Draw the shapes world's gallery; image retrieval asks with another wording than text's."""
    write_flickr30k(World(root, images))
    image = [replace(e, texts=(e.texts[0].capitalize(),)) for e in Flickr30kImage().examples(root)]
    steps = tuple(published_timesteps(timesteps))
    return Table(root, list(Flickr30kText().examples(root)), image, steps)


def batches(total: int, size: int) -> list[int]:
    """The sizes of the batches that make up `total`."""
    return [min(size, total - start) for start in range(0, total, size)]


def load(folder: str, timesteps: Sequence[int], barrier: Any) -> None:
    global model, start_line
    torch.set_num_threads(1)
    model, start_line = Plain(folder, timesteps), barrier


def plain(text: list[list[Pair]], image: list[list[Pair]]) -> None:
    model.score(text, image_retrieval=False)
    model.score(image, image_retrieval=True)


@torch.inference_mode()
def bare(forwards: int, images: int, texts: int, batch: int) -> None:
    pixels, noised = torch.zeros(batch, 3, model.side, model.side), model.noise[:batch]
    ids = torch.zeros(batch, model.tokenizer.model_max_length, dtype=torch.long)
    hidden, steps = model.text_encoder(ids).last_hidden_state, torch.full((batch,), 500)
    for size in batches(images, batch):
        model.vae.encode(pixels[:size])
    for size in batches(texts, batch):
        model.text_encoder(ids[:size])
    for size in batches(forwards, batch):
        model.unet(noised[:size], steps[:size], hidden[:size])


def timed(job: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """When the job began, which is at the same moment in all processes, and when it ended."""
    start_line.wait()
    start = time.time()
    job(*arguments)
    return start, time.time()


class Workers:
    """As many one-thread processes with the model as `ours` has actors."""

    def __init__(self, folder: str, timesteps: Sequence[int], processes: int) -> None:
        spawn, self.processes = multiprocessing.get_context("spawn"), processes
        given = (folder, timesteps, spawn.Barrier(processes))
        self.pool = ProcessPoolExecutor(processes, spawn, load, given)

    def seconds(self, job: Callable[..., None], shards: Iterable[Sequence[Any]]) -> float:
        """From the start to the last end of `job` over the shards, one a process."""
        futures = [self.pool.submit(timed, job, *shard) for shard in shards]
        spans = [future.result() for future in futures]
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def plain(self, table: Table, images: int) -> float:
        """Seconds of the published algorithm, from those for `images` images in each process."""
        n, text, image = self.processes, *map(table.decisions, (table.text, table.image))
        parts = [slice(i * images, (i + 1) * images) for i in range(n)]
        seconds = self.seconds(plain, ((text[part], image[part]) for part in parts))
        return seconds * len(text) / (images * n)

    def bare(self, batch: int, *work: int) -> float:
        """Seconds of the bare model for this many forwards, images and texts."""
        n = self.processes
        shards = ([(total + i) // n for total in work] for i in range(n))
        return self.seconds(bare, ([*shard, batch] for shard in shards))


@dataclass(frozen=True)
class StampedSpec(DiffusionSpec):
    """Leaves a file behind when an actor has its model: from then on it could score."""

    stamps: str = ""

    def build(self, device: str) -> RowScorer:
        scorer = super().build(device)
        Path(self.stamps, repr(time.time())).touch()
        return scorer


class Ours:
    """diffitm on this machine's Ray, an actor a core."""

    def __init__(self, table: Table, model: str, doubt: float) -> None:
        # Ray would give its workers a low priority, and the other two ways have the usual one.
        os.environ.update(RAY_worker_niceness="0")
        from diffitm.distributed import session

        session.connect("local")
        self.pool = session.choose_pool(None, None, 1.0, 0.0)
        self.table, self.source, self.options = table, resolve(model), RaceOptions(Racing(doubt))
        self.sides: dict[bool, list[bool]] = {}  # of each contest's right answer, by `raced`
        self.forwards: dict[bool, int] = {}

    def seconds(self, raced: bool) -> dict[str, float]:
        """From the examples to the last stored score: all, and since the first actor was up."""
        from diffitm.commands.stages.score import score

        with tempfile.TemporaryDirectory() as out:
            start = time.time()
            place = {"root": self.table.root, "stamps": tempfile.mkdtemp(dir=out)}
            steps = self.table.timesteps
            spec = StampedSpec(self.source, protocol="diffusionitm", timesteps=steps, **place)
            store = open_store(out, self.source.name, spec.store_config())
            wanted = self.table.text + self.table.image
            examples, _ = write_examples("mixed", wanted, f"{out}/examples", None)
            plan = self.options.plan(store, "l2", None)
            assert plan is not None
            races = Races(self.options, plan, {"mixed": TASK})

            def write(uri: str) -> WorkTable:
                found = {"mixed": Examples(examples, examples)}
                return write_races(found, store, races, self.pool.min_actors, uri)

            if raced:
                done = score(spec, open_work(out, store, write, []), store, self.pool, plan)
            else:
                done = score(spec, open_pairs(out, store, [examples], []), store, self.pool)
            end = time.time()
            if not raced and done.forwards != self.table.forwards:
                raise RuntimeError(f"{done.forwards} forwards, needed {self.table.forwards}")
            self.forwards[raced] = done.forwards
            rules = plan if raced else replace(plan, rules=Racing(0.0))
            self.sides[raced] = outcomes(examples, store, rules)
            up = min(float(name) for name in os.listdir(spec.stamps))
            names = (RACED_WHOLE, RACED) if raced else (WHOLE, OURS)
            return dict(zip(names, (end - start, end - up), strict=True))


def outcomes(examples: str, store: Store, plan: RacePlan) -> list[bool]:
    """Whether each contest's right answer is among its winners."""
    found = []
    for item in read_scored(examples, store, plan.error, partial=True):
        for run in hold(TASK.contests(item.example), pair_values(item), plan):
            if not run.decided:
                raise RuntimeError(f"{item.example.id} is not decided")
            found.append(run.contest.about in run.race.winners)
    return found


def spread(values: Sequence[float], digits: int = 0) -> str:
    """'median (lowest to highest)'."""
    middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
    return f"{middle} ({low} to {high})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Times scoring in four ways; see README.md.")
    parser.add_argument("--model", default="shapes", help="shapes or a diffusers folder")
    parser.add_argument("--images", type=int, default=200, help="images of the table, 10 or more")
    parser.add_argument("--plain-images", type=int, default=BATCH, help="of plain, in a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timesteps", type=int, default=50, help="asked of the protocol")
    parser.add_argument("--doubt", type=float, default=0.05, help="of raced")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    least = max(CANDIDATES, args.plain_images * (os.cpu_count() or 1))
    if args.images < least or args.plain_images < 1 or args.rounds < 1:
        parser.error(f"wanted: images >= {least}, plain-images >= 1, rounds >= 1")
    with tempfile.TemporaryDirectory() as root:
        table = make_table(root, args.images, args.timesteps)
        ours = Ours(table, args.model, args.doubt)
        folder = str(SHAPES / "diffusion") if args.model == "shapes" else args.model
        workers = Workers(folder, table.timesteps, ours.pool.min_actors)
        workers.bare(BATCH_SIZES[0], PROBE, PROBE, PROBE)  # warms up
        probes = {size: PROBE / workers.bare(size, PROBE, 0, 0) for size in BATCH_SIZES}
        batch = max(probes, key=lambda size: probes[size])
        jobs: list[Callable[[], dict[str, float]]] = [
            lambda: {PLAIN: workers.plain(table, args.plain_images)},
            lambda: ours.seconds(False),
            lambda: ours.seconds(True),
            lambda: {BARE: workers.bare(batch, table.forwards, len(table.text), table.texts)},
        ]
        rounds = []
        for number in range(args.rounds):
            seconds: dict[str, float] = {}
            for job in jobs if number % 2 == 0 else reversed(jobs):
                seconds |= job()
            rounds.append({name: table.pair_steps / taken for name, taken in seconds.items()})
            print(f"round {number + 1}:", {name: round(r) for name, r in rounds[-1].items()})
    machine = f"{os.cpu_count()} cores {platform.machine()}, torch {torch.__version__}"
    print(f"{machine}, {workers.processes} processes of one thread")
    print(f"{args.images} images, {table.pair_steps} (pair, timestep)s, {table.forwards} forwards")
    print("bare U-Net forwards/s by batch size:", {size: round(r) for size, r in probes.items()})
    print(f"{'':34}{'(pair, timestep)/s':>24}{'forwards/s':>24}")
    for name in (PLAIN, WHOLE, OURS, RACED_WHOLE, RACED, BARE):
        # Half of plain's pairs are image retrieval's, whose unconditional error is one more.
        each = 1.5 if name == PLAIN else table.forwards / table.pair_steps
        if name in (RACED_WHOLE, RACED):
            each = ours.forwards[True] / table.pair_steps
        rates = [[scale * found[name] for found in rounds] for scale in (1, each)]
        print(f"{name:34}{spread(rates[0]):>24}{spread(rates[1]):>24}")
    for top, bottom in RATIOS:
        print(f"{top} / {bottom}: {spread([found[top] / found[bottom] for found in rounds], 2)}")
    alike = [one == other for one, other in zip(ours.sides[True], ours.sides[False], strict=True)]
    share = ours.forwards[True] / ours.forwards[False]
    print(
        f"raced at doubt {args.doubt}: {share:.1%} of the forwards, {sum(alike)} of {len(alike)} alike"
    )
    if args.out:
        result = {"machine": machine, "options": vars(args), "forwards": table.forwards}
        result |= {
            "raced_forwards": ours.forwards[True],
            "alike": sum(alike),
            "contests": len(alike),
        }
        result |= {"bare_batches": probes, "pair_steps_per_second": rounds}
        storage.write_text(args.out, json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
