"""How fast are scores made? Three ways in one run, on one table and one model, on the CPU.

plain   the published algorithm as tests/plain.py has it, at its default batch of 4 images
ours    diffitm from the examples to the Parquet store, through Ray
bare    the model alone, doing only the work that the table needs, at its best batch size

`python -m benchmarks.scoring` in the repository's root; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffitm import storage
from diffitm.matching.scorer import Scorer
from diffitm.models.load import SHAPES, resolve
from diffitm.pairs import write_examples, write_work
from diffitm.schema import Example
from diffitm.scorers import DiffusionSpec
from diffitm.shapes.layouts import CANDIDATES, World, write_flickr30k
from diffitm.store import open_store
from diffitm.tasks.flickr30k import Flickr30kText
from tests.plain import Pair, Plain, list_pairs, published_timesteps

TIMESTEPS = tuple(published_timesteps(10))
BATCH_SIZES = (16, 32, 64, 128)
PROBE = 1024  # forwards that tell how good a batch size is
NAMES = {
    "plain": "plain",
    "plain alone": "plain, one process",
    "ours whole": "ours, whole",
    "ours": "ours, actors up",
    "bare": "bare",
}
RATIOS = {
    ("ours", "plain"): " (aim: at least 4)",
    ("ours", "plain alone"): "",
    ("ours", "bare"): " (aim: at least 0.9)",
    ("ours whole", "bare"): "",
}
Span = tuple[float, float]  # when a job began and ended, seconds since the epoch
worker: Worker  # in the processes of `plain` and `bare`


@dataclass(frozen=True)
class Table:
    """One text and one image decision for every image; the two share no pair, so that what is
    measured does not hang on how much a data set repeats itself."""

    root: str
    text: list[Example]
    image: list[Example]

    @property
    def pair_steps(self) -> int:
        """How many (pair, timestep)s the decisions ask for."""
        return sum(len(e.images) * len(e.texts) for e in self.text + self.image) * len(TIMESTEPS)

    @property
    def forwards(self) -> int:
        """How many forwards of the U-Net they need: also the empty text once an image."""
        return self.pair_steps + len({i for e in self.image for i in e.images}) * len(TIMESTEPS)

    @property
    def texts(self) -> int:
        """How many distinct texts there are, with the empty one."""
        return len({text for e in self.text + self.image for text in e.texts}) + 1

    def decisions(self, examples: list[Example]) -> list[list[Pair]]:
        """The candidates of each example, images as files."""
        files = [[str(Path(self.root, image)) for image in e.images] for e in examples]
        return [list_pairs(f, e.texts) for f, e in zip(files, examples, strict=True)]


def make_table(root: str, images: int) -> Table:
    """Draw the shapes world's gallery; image retrieval asks with another wording than text's."""
    write_flickr30k(World(root, images))
    asked = json.loads(Path(root, "flickr30k/val_top10_RN50x64.json").read_text())
    image = [
        Example(caption, tuple(p.removeprefix("datasets/") for p in paths), (caption,), "image")
        for caption, paths in itertools.islice(asked.items(), 1, None, 5)
    ]
    return Table(root, list(Flickr30kText().examples(root)), image)


class Worker:
    """The model in a process of its own, for `plain` and `bare`."""

    def __init__(self, folder: str, barrier: Any) -> None:
        self.model, self.barrier = Plain(folder, TIMESTEPS), barrier

    def plain(self, text: list[list[Pair]], image: list[list[Pair]]) -> None:
        self.model.score(text, image_retrieval=False)
        self.model.score(image, image_retrieval=True)

    @torch.inference_mode()
    def bare(self, forwards: int, images: int, texts: int, batch: int) -> None:
        model = self.model
        pixels = torch.zeros(batch, 3, model.side, model.side)
        ids = torch.zeros(batch, model.tokenizer.model_max_length, dtype=torch.long)
        steps, noised = torch.full((batch,), 500), model.noise[:batch]
        hidden = model.text_encoder(ids).last_hidden_state
        for size in batches(images, batch):
            model.vae.encode(pixels[:size])
        for size in batches(texts, batch):
            model.text_encoder(ids[:size])
        for size in batches(forwards, batch):
            model.unet(noised[:size], steps[:size], hidden[:size])


def batches(total: int, size: int) -> list[int]:
    """The sizes of the batches that make up `total`."""
    return [min(size, total - start) for start in range(0, total, size)]


def start_worker(folder: str, barrier: Any) -> None:
    global worker
    worker = Worker(folder, barrier)


def work(job: str, arguments: tuple[Any, ...], threads: int, together: bool) -> Span:
    """Run a worker's job; all processes begin at the same moment."""
    torch.set_num_threads(threads)
    if together:
        worker.barrier.wait()
    start = time.time()
    getattr(worker, job)(*arguments)
    return start, time.time()


class Workers:
    """As many one-thread processes as there are actors, or one process with as many threads."""

    def __init__(self, folder: str, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        arguments = (folder, context.Barrier(processes))
        self.pool = ProcessPoolExecutor(processes, context, start_worker, arguments)
        self.processes = processes

    def seconds(self, job: str, *shards: Sequence[Any]) -> float:
        """From the first start to the last end of `job` over the shards, one a process."""
        threads, together = self.processes // len(shards), len(shards) == self.processes
        futures = [self.pool.submit(work, job, tuple(s), threads, together) for s in shards]
        spans = [future.result() for future in futures]
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def plain(self, table: Table, images: int, processes: int) -> float:
        """Seconds of the published algorithm for the decisions of the first `images` images."""
        text, image = table.decisions(table.text[:images]), table.decisions(table.image[:images])
        shards = [(text[i::processes], image[i::processes]) for i in range(processes)]
        return self.seconds("plain", *shards)

    def bare(self, forwards: int, images: int, texts: int, batch: int) -> float:
        """Seconds of the bare model for this much work."""
        n = self.processes
        parts = [[(total + i) // n for total in (forwards, images, texts)] for i in range(n)]
        return self.seconds("bare", *([*part, batch] for part in parts))


@dataclass(frozen=True)
class StampedSpec(DiffusionSpec):
    """Leaves a file behind when an actor has its model: from then on it could score."""

    stamps: str = ""

    def build(self, device: str) -> Scorer:
        scorer = super().build(device)
        Path(self.stamps, repr(time.time())).touch()
        return scorer


class Ours:
    """diffitm on this machine's Ray, an actor a core."""

    def __init__(self, table: Table, model: str) -> None:
        from diffitm.distributed import session

        start = time.time()
        session.connect("local")
        self.pool = session.choose_pool(None, None, 1.0, 0.0)
        self.start_seconds = time.time() - start
        self.table, self.source = table, resolve(model)

    def seconds(self) -> tuple[float, float]:
        """From the examples to the last stored score: all of it, and since the first actor was up."""
        from diffitm.distributed.score import score

        with tempfile.TemporaryDirectory() as out:
            start = time.time()
            stamps = Path(out, "stamps")
            stamps.mkdir()
            spec = StampedSpec(
                self.source, self.table.root, "diffusionitm", TIMESTEPS, stamps=str(stamps)
            )
            store = open_store(out, self.source.name, spec.store_config())
            examples = f"{out}/examples.parquet"
            write_examples("mixed", self.table.text + self.table.image, examples, None)
            todo = write_work([examples], store, f"{out}/work/work.parquet")
            done = score(spec, todo, store, f"{out}/work/checkpoint", self.pool)
            end = time.time()
            if done.forwards != self.table.forwards:
                raise RuntimeError(f"{done.forwards} forwards, needed {self.table.forwards}")
            return end - start, end - min(float(stamp.name) for stamp in stamps.iterdir())


def measure(table: Table, workers: Workers, ours: Ours, plain_images: int, rounds: int,
            batch: int) -> dict[str, list[float]]:  # fmt: skip
    """(pair, timestep)s a second of every way in every round, in alternating order."""
    rates: dict[str, list[float]] = {name: [] for name in NAMES}
    share = plain_images / len(table.text)

    def plain() -> None:
        for name, processes in (("plain", workers.processes), ("plain alone", 1)):
            seconds = workers.plain(table, plain_images, processes)
            rates[name].append(table.pair_steps * share / seconds)

    def through_ray() -> None:
        for name, seconds in zip(("ours whole", "ours"), ours.seconds(), strict=True):
            rates[name].append(table.pair_steps / seconds)

    def bare() -> None:
        seconds = workers.bare(table.forwards, len(table.text), table.texts, batch)
        rates["bare"].append(table.pair_steps / seconds)

    jobs: list[Callable[[], None]] = [plain, through_ray, bare]
    for number in range(rounds):
        for job in jobs if number % 2 == 0 else reversed(jobs):
            job()
    return rates


def spread(values: Sequence[float], digits: int = 0) -> str:
    """'median (lowest to highest)'."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="shapes", help="shapes or a diffusers folder")
    parser.add_argument("--images", type=int, default=200, help="images of the table, 10 or more")
    parser.add_argument("--plain-images", type=int, default=8, help="images that plain does")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    if args.images < CANDIDATES or not 1 <= args.plain_images <= args.images or args.rounds < 1:
        parser.error("wanted: images >= 10, 1 <= plain-images <= images, rounds >= 1")
    with tempfile.TemporaryDirectory() as root:
        table = make_table(root, args.images)
        ours = Ours(table, args.model)
        folder = str(SHAPES / "diffusion") if args.model == "shapes" else args.model
        workers = Workers(folder, ours.pool.min_actors)
        workers.bare(PROBE, PROBE, PROBE, BATCH_SIZES[0])  # warms up
        probes = {size: PROBE / workers.bare(PROBE, 0, 0, size) for size in BATCH_SIZES}
        batch = max(probes, key=lambda size: probes[size])
        rates = measure(table, workers, ours, args.plain_images, args.rounds, batch)
    ratios = {
        f"{top}/{bottom}": [b / a for b, a in zip(rates[top], rates[bottom], strict=True)]
        for top, bottom in RATIOS
    }
    result = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"{workers.processes} processes of one thread",
        "options": vars(args),
        "forwards": table.forwards,
        "pair_steps": table.pair_steps,
        "ray_start_seconds": ours.start_seconds,
        "bare_batches": probes,
        "pair_steps_per_second": rates,
        "ratios": ratios,
    }
    show(result, batch)
    if args.out:
        storage.write_text(args.out, json.dumps(result, indent=2))


def show(result: dict[str, Any], batch: int) -> None:
    """Print medians and ranges."""
    forwards = result["forwards"] / result["pair_steps"]
    # Half of plain's pairs are image retrieval's, whose unconditional error is a forward more.
    each = dict.fromkeys(NAMES, forwards) | {"plain": 1.5, "plain alone": 1.5}
    print(result["machine"])
    print(f"{result['options']['images']} images, {result['pair_steps']} (pair, timestep)s")
    probes = ", ".join(f"{size}: {rate:.0f}" for size, rate in result["bare_batches"].items())
    print(f"bare U-Net forwards/s by batch size: {probes}; taken: {batch}")
    print(f"Ray's start, in no figure below: {result['ray_start_seconds']:.1f} s")
    print(f"{'':34}{'(pair, timestep)/s':>24}{'forwards/s':>24}")
    for name, what in NAMES.items():
        rates = result["pair_steps_per_second"][name]
        print(f"{what:34}{spread(rates):>24}{spread([each[name] * r for r in rates]):>24}")
    for (top, bottom), aim in RATIOS.items():
        values = result["ratios"][f"{top}/{bottom}"]
        print(f"{NAMES[top]} / {NAMES[bottom]}: {spread(values, 2)}{aim}")


if __name__ == "__main__":
    main()
