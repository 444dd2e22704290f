"""Candidate search: memory and time by gallery size, and which library multiplies fastest.

    python -m benchmarks.candidates [--galleries 1000 10000 100000] [--out FILE]

Synthetic unit embeddings of RN50x64's width, written as shards; a process of its own for each
figure (Linux: the peak is the kernel's VmHWM, less what the imports took). `faiss-cpu` is optional.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from diffitm.commands.stages.embed import GALLERY, QUERIES
from diffitm.retrieval.candidate_lists import Side, write_lists
from diffitm.retrieval.exact_knn import gallery_blocks, on_grid, to_table, top_k

K, SHARD, CAPTIONS = 10, 4096, 5
MIB = 2**20


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    values = rng.standard_normal((count, width), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    return on_grid(values, str)


def write_gallery(folder: Path, count: int, width: int) -> None:
    """Shards as the pipeline leaves them."""
    rng = np.random.default_rng(0)
    for row, start in enumerate(range(0, count, SHARD)):
        positions = range(start, min(start + SHARD, count))
        values = unit(rng, len(positions), width)
        size = len(positions)
        table = to_table(row, positions, [[0]] * size, [None] * size, values)
        path = folder / f"{row:04d}.parquet"
        pq.write_table(table, path, use_dictionary=False, compression="NONE")


def shards(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.parquet"))


def streamed(folder: Path, queries: np.ndarray) -> None:
    """The pipeline's search of one block of queries."""
    blocks = gallery_blocks(str(folder), shards(folder), GALLERY["cpu"])
    top_k(queries, [[]] * len(queries), blocks, K)


def at_once(folder: Path, queries: np.ndarray) -> None:
    """The plain way: the gallery and all scores in memory, torch.topk."""
    blocks = gallery_blocks(str(folder), shards(folder), SHARD)
    gallery = np.concatenate([embeddings for _, embeddings in blocks])
    (torch.from_numpy(queries) @ torch.from_numpy(gallery).T).topk(K)


def lists(folder: Path, queries: np.ndarray) -> None:
    """What the driver does: names of the whole gallery, five captions an image, lists to disk."""
    count = sum(pq.read_metadata(path).num_rows for path in shards(folder))
    images = [f"flickr30k-images/{i:010d}.jpg" for i in range(count)]
    words = "a person in a coloured shirt stands beside a bench and looks at another person"
    captions = [f"{words} {i}" for i in range(count * CAPTIONS)]
    truth = [[i // CAPTIONS] for i in range(len(captions))]
    found = ((i, [(i + j) % count for j in range(K)]) for i in range(len(captions)))
    with tempfile.TemporaryDirectory() as out:
        write_lists(f"{out}/list.json", found, Side("image", captions, images, truth, {}), K, True)


WAYS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "streamed": streamed,
    "at once": at_once,
    "lists": lists,
}


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def child(way: str, folder: str, count: int, width: int) -> None:
    """Runs one figure and prints it; the queries are part of what is measured."""
    before = peak()
    queries = unit(np.random.default_rng(1), count, width)
    start = time.perf_counter()
    WAYS[way](Path(folder), queries)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "mib": (peak() - before) / MIB}))


def measure(way: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    call = [sys.executable, "-m", "benchmarks.candidates", "--child", way, "--folder", str(folder)]
    call += ["--queries", str(args.queries), "--width", str(args.width)]
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def memory_curve(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table, printed as they come."""
    print(f"{args.queries} queries, width {args.width}, top {K}, {args.threads} thread(s)")
    print(f"{'gallery':>9}  {'way':9} {'seconds':>8} {'peak MiB':>9} {'pairs/s':>12}")
    rows = []
    for count in args.galleries:
        with tempfile.TemporaryDirectory() as name:
            write_gallery(Path(name), count, args.width)
            for way in WAYS:
                found = measure(way, Path(name), args)
                rate = count * args.queries / found["seconds"] if way != "lists" else float("nan")
                rows.append({"gallery": count, "way": way, **found})
                text = f"{found['seconds']:8.2f} {found['mib']:9.0f} {rate:12,.0f}"
                print(f"{count:9,}  {way:9} {text}", flush=True)
    return rows


def with_numpy(queries: np.ndarray, blocks: list[np.ndarray]) -> None:
    for block in blocks:
        torch.from_numpy(queries @ block.T).topk(K)


def with_torch(queries: np.ndarray, blocks: list[np.ndarray]) -> None:
    for block in blocks:
        (torch.from_numpy(queries) @ torch.from_numpy(block).T).topk(K)


def with_faiss(queries: np.ndarray, blocks: list[np.ndarray]) -> None:
    import faiss

    for block in blocks:
        faiss.knn(queries, block, K, metric=faiss.METRIC_INNER_PRODUCT)


def with_diffitm(queries: np.ndarray, blocks: list[np.ndarray]) -> None:
    places = (np.arange(i * len(b), i * len(b) + len(b)) for i, b in enumerate(blocks))
    top_k(queries, [[]] * len(queries), zip(places, blocks, strict=True), K)


def libraries(args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each library for one block of queries past 20 blocks in memory."""
    ways = {"numpy": with_numpy, "torch": with_torch, "diffitm": with_diffitm}
    try:
        import faiss

        faiss.omp_set_num_threads(args.threads)
        ways["faiss"] = with_faiss
    except ImportError:
        print("faiss is not installed: pip install faiss-cpu to compare with it")
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(2)
    queries = unit(rng, args.queries, args.width)
    blocks = [unit(rng, GALLERY["cpu"], args.width) for _ in range(20)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name in sorted(ways, reverse=bool(number % 2)):
            start = time.perf_counter()
            ways[name](queries, blocks)
            seconds[name].append(time.perf_counter() - start)
    median = {name: float(np.median(taken)) for name, taken in seconds.items()}
    print(f"\n{args.queries} queries past {len(blocks)} blocks of {GALLERY['cpu']}, in memory")
    for name, taken in median.items():
        span = f"{min(seconds[name]):.2f} to {max(seconds[name]):.2f}"
        print(f"{name:8} {taken:6.2f} s ({span}), {median['torch'] / taken:.2f} times torch")
    return median


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--galleries", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--queries", type=int, default=QUERIES["cpu"])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the product, as an actor has")
    parser.add_argument("--out", help="JSON file for the figures")
    parser.add_argument("--child", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.child:
        child(args.child, args.folder, args.queries, args.width)
        return
    figures = {"memory": memory_curve(args), "libraries": libraries(args)}
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
