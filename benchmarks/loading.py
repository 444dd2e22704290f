"""How fast do images reach the training loop, and what do they cost its process? On the CPU.

processes  training.dataloader: a torch DataLoader's processes, forked from a server that has torch imported
threads    the same decoding in threads of the loop's process
ray-data   a task of Ray Data for every four micro-batches, as it was before

    python -m benchmarks.loading [--rounds 5] [--steps 60] [--lanes 2] [--out FILE]
    python -m benchmarks.loading --scoring [--rounds 5] [--out FILE]

With --scoring: does a scorer wait for them? A model whose forwards sleep reads images whose reads sleep, as
from an object store, in two ways: all images of a block before its first forward, or some ahead.

Each way runs in a process of its own, in turns, on JPEGs of 500 x 400 pixels that DIVA sees as 512 and 224
pixels; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

IMAGES, BATCH = 400, 16
FORWARD, READ = 0.0025, 0.06  # seconds that a forward and a read sleep with --scoring
BLOCKS = {"2 texts, 10 timesteps": (2, 10, 32), "5 texts, 10 timesteps": (5, 10, 32),
          "5 texts, 100 timesteps": (5, 100, 10)}  # texts of an image, timesteps, images  # fmt: skip


def draw(root: Path) -> None:
    """JPEGs with the detail of photographs: smooth shapes and noise, some 90 kB each."""
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = Image.fromarray(rng.integers(0, 256, (13, 16, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 400), Image.Resampling.BICUBIC)).astype(int)
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(root / f"{number}.jpg", quality=88)


def a_job(root: str, steps: int) -> Any:
    from diffitm.training.rows import TrainingRow
    from diffitm.training.sampler import BatchSampler

    rows = [TrainingRow(f"{i % IMAGES}.jpg", "") for i in range(steps * BATCH)]
    plan = BatchSampler(rows, range(len(rows)), BATCH, 1, "none", False, 0)
    return SimpleNamespace(root=root, steps=steps, grad_accum_steps=1, sampler=lambda: plan)


def processes(job: Any, view: Any, lanes: int) -> Iterator[Any]:
    from diffitm.training.dataloader import Loader

    return Loader(job, 0, 1, view, lanes).steps(0)


def requests(job: Any) -> Iterator[list[tuple[str, int]]]:
    from diffitm.training.dataloader import wanted

    plan = job.sampler()
    return (wanted(plan.batches(step)[0]) for step in range(job.steps))


def threads(job: Any, view: Any, lanes: int) -> Iterator[Any]:
    from diffitm.training.dataloader import Images

    images, left = Images(job.root, view), requests(job)
    with ThreadPoolExecutor(lanes) as pool:
        ahead = deque(pool.submit(images.__getitem__, r) for r in itertools.islice(left, 2 * lanes))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(images.__getitem__, r) for r in itertools.islice(left, 1))


def decode(table: Any, root: str, view: Any) -> Any:
    """A task of Ray Data."""
    import pyarrow as pa

    from diffitm.core import images

    lines = []
    for line in table.to_pylist():
        asked = zip(line["images"], line["seeds"], strict=True)
        squares = (view(images.load(root, path)[0], seed) for path, seed in asked)
        lines.append({"pixels": [b"".join(part.tobytes() for part in found) for found in squares]})
    return pa.Table.from_pylist(lines)


def ray_data(job: Any, view: Any, lanes: int) -> Iterator[Any]:
    import pyarrow as pa
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    asked = [list(zip(*request, strict=True)) for request in requests(job)]
    table = pa.table({"images": [a[0] for a in asked], "seeds": [a[1] for a in asked]})
    loaded = ray.data.from_arrow(table).repartition(target_num_rows_per_block=4).map_batches(
        decode, fn_args=(job.root, view), batch_size=None, batch_format="pyarrow", num_cpus=0.25,
        compute=ray.data.TaskPoolStrategy(size=lanes),
    )  # fmt: skip
    ends = np.cumsum([3 * side**2 for side in view.sides])[:-1]
    batches = loaded.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=4)
    for line in itertools.chain.from_iterable(batch.to_pylist() for batch in batches):
        yield [np.split(np.frombuffer(data, np.uint8), ends) for data in line["pixels"]]


WAYS: dict[str, Callable[[Any, Any, int], Iterator[Any]]] = {
    "processes": processes,
    "threads": threads,
    "ray-data": ray_data,
}


def measure(way: str, root: str, steps: int, lanes: int) -> dict[str, float]:
    """Seconds to the first micro-batch; then images a second, and milliseconds of processor that an image
    takes the thread that trains and its process."""
    import torch

    from diffitm.training.crops import Views

    torch.set_num_threads(1)
    job, view = a_job(root, steps), Views(512, 224, 0.9)
    if way == "ray-data":
        import ray

        ray.init(address="local", num_cpus=lanes + 2, include_dashboard=False, log_to_driver=False)
    begin = time.perf_counter()
    loaded = WAYS[way](job, view, lanes)
    next(loaded)
    first = time.perf_counter() - begin
    begin, process, thread = time.perf_counter(), time.process_time(), time.thread_time()
    images = BATCH * sum(1 for _ in loaded)
    return {
        "first": first,
        "images_per_second": images / (time.perf_counter() - begin),
        "thread_ms": 1000 * (time.thread_time() - thread) / images,
        "process_ms": 1000 * (time.process_time() - process) / images,
    }


def idle(texts: int, steps: int, images: int) -> dict[str, float]:
    """Shares of a scorer's time over three blocks that are no forward, with all images of a block first and
    with some ahead; of the latter that which it says it waited for images."""
    import torch

    from diffitm.core import images as files
    from diffitm.core.schema import PairRow
    from diffitm.scoring.diffusion import DiffusionScorer
    from diffitm.scoring.image_reader import load_images
    from diffitm.scoring.noise_plan import make_plan
    from tests import tiny

    class Sleeping(tiny.Fixed):
        def predict(self, noised: Any, timesteps: Any, condition: Any) -> Any:
            time.sleep(FORWARD * len(noised))
            return torch.zeros_like(noised)

    def read(*place: str) -> bytes:
        time.sleep(READ)
        return picture.getvalue()

    torch.set_num_threads(1)
    picture, model = io.BytesIO(), Sleeping(tiny.schedule())
    Image.new("RGB", (8, 8)).save(picture, "PNG")  # so that decoding costs next to nothing
    plan = make_plan(list(range(0, 1000, 1000 // steps)), model.latent_shape)
    scorer = DiffusionScorer(model, plan, "")
    words = [f"text {number}" for number in range(texts)]
    blocks = [
        [PairRow(n, f"{n}.jpg", words) for n in range(b * images, (b + 1) * images)]
        for b in range(3)
    ]
    found, real, files.read = dict[str, float](), files.read, read
    for way in ("first", "ahead"):
        begin = time.perf_counter()
        for rows in blocks:
            if way == "first":
                scorer.score_loaded(rows, [load_images(rows, "", scorer.prepare, 4)])
            else:
                scorer.score(rows)
        seconds = time.perf_counter() - begin
        found[way] = 1 - scorer.batches[0].spent() / seconds
    found["waited for images"] = scorer.loading.spent() / seconds
    files.read = real
    return found


def scoring(rounds: int) -> dict[str, list[dict[str, float]]]:
    """What `idle` finds, `rounds` times for each kind of block."""
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in BLOCKS}
    for _, kind in itertools.product(range(rounds), BLOCKS):
        found[kind].append(idle(*BLOCKS[kind]))
        print(kind, {k: round(v, 3) for k, v in found[kind][-1].items()}, flush=True)
    return found


def show(found: dict[str, list[dict[str, float]]], scale: float) -> None:
    """The median of each figure with the lowest and the highest."""
    for way, rounds in found.items():
        for key in rounds[0]:
            values = [scale * one[key] for one in rounds]
            middle = statistics.median(values)
            print(f"{way} {key}: {middle:.2f} ({min(values):.2f} to {max(values):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "--lanes", type=int, default=2, help="processes, threads or tasks that decode"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--root")
    parser.add_argument("--scoring", action="store_true", help="shares of a scorer's time in %%")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.root, args.steps, args.lanes)))
        return
    if args.scoring:
        found = scoring(args.rounds)
        show(found, 100)
        if args.out:
            args.out.write_text(json.dumps(found, indent=1))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    found = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as root:
        draw(Path(root))
        for _, way in itertools.product(range(args.rounds), WAYS):
            options = ["--way", way, "--root", root, "--steps", args.steps, "--lanes", args.lanes]
            command = [
                sys.executable,
                "-W",
                "ignore",
                "-m",
                "benchmarks.loading",
                *map(str, options),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
            print(way, {key: round(value, 2) for key, value in found[way][-1].items()}, flush=True)
    show(found, 1)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
