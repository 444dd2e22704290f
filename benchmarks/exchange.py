"""What does it cost two workers to sum up the gradients of a ViT-B? Two gloo processes on the CPU.

buckets  training.gradient_sync: gradients are views of buffers of 25 MB, sent while the last backward goes on
flat     one copy of all gradients is summed up and taken apart, as it was before
ddp      torch's DistributedDataParallel, no_sync for all but the last backward

    python -m benchmarks.exchange [--rounds 5] [--steps 8] [--backwards 2] [--out FILE]

An update is so many passes through a random transformer of ViT-B's size over 17 tokens; the ways take
turns, each in processes of its own; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from diffitm.training.gradient_sync import Gradients

WIDTH, LAYERS, TOKENS, WARM = 768, 12, 17, 2
WAYS = ("buckets", "flat", "ddp")


def tower() -> nn.Module:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, dropout=0.0, batch_first=True)

    return nn.Sequential(*[layer() for _ in range(LAYERS)])


def update(way: str, net: nn.Module, gradients: Gradients | None, backwards: int) -> None:
    """One update's gradients, the same on both processes when it returns."""
    parameters, inputs = list(net.parameters()), torch.randn(1, TOKENS, WIDTH)
    for parameter in parameters if gradients is None else ():
        if parameter.grad is not None:
            parameter.grad.zero_()
    if gradients is not None:
        gradients.zero()
    for number in range(backwards):
        waits: Any = contextlib.nullcontext()
        if way == "ddp" and number < backwards - 1:
            waits = net.no_sync()  # type: ignore[operator]
        if gradients is not None and number == backwards - 1:
            gradients.send()
        with waits:
            net(inputs).square().mean().backward()
    if gradients is not None:
        gradients.exchange()
    elif way == "flat":
        flat = torch.cat([p.grad.flatten() for p in parameters])  # type: ignore[union-attr]
        torch.distributed.all_reduce(flat)
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def work(rank: int, way: str, args: argparse.Namespace, port: int, told: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    net, gradients = tower(), None
    if way == "ddp":
        net = DistributedDataParallel(net, gradient_as_bucket_view=True, broadcast_buffers=False)
    elif way == "buckets":
        gradients = Gradients([list(net.parameters())])
    times = []
    for _ in range(args.steps):
        torch.distributed.barrier()
        begin = time.perf_counter()
        update(way, net, gradients, args.backwards)
        times.append(time.perf_counter() - begin)
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        told.put((statistics.median(times[WARM:]), peak))
    torch.distributed.destroy_process_group()


def measure(way: str, args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of an update, and the process's peak memory in GiB."""
    context = torch.multiprocessing.get_context("spawn")
    told = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = [context.Process(target=work, args=(rank, way, args, port, told)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    return told.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--backwards", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    count = sum(parameter.numel() for parameter in tower().parameters())
    print(f"{count / 1e6:.0f} million parameters")
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(measure(way, args))
        print({way: f"{1000 * rounds[-1][0]:.0f} ms" for way, rounds in found.items()}, flush=True)
    for way in WAYS:
        ratios = [a[0] / b[0] for a, b in zip(found[way], found["flat"], strict=True)]
        peak = statistics.median(one[1] for one in found[way])
        middle = statistics.median(ratios)
        print(
            f"{way} / flat: {middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}), {peak:.2f} GiB"
        )
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
