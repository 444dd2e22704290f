"""The training loop on several ranks that are threads of this process: no Ray, no process group."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffitm.distributed import train_loop
from diffitm.distributed.monitor import Monitor
from diffitm.training.job import Training
from diffitm.training.module import TrainModule
from diffitm.training.run_folder import WEIGHTS


class Ranks:
    """Stands in for Ray Train: its context, reports and checkpoints, and the exchange between ranks."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monitor, self.local = folder, Monitor(), threading.local()
        self.checkpoints: list[Path] = []
        for name in ("get_context", "get_checkpoint", "report"):
            monkeypatch.setattr(ray.train, name, getattr(self, name))
        monkeypatch.setattr(ray, "get", lambda value: value)
        monkeypatch.setattr(torch.distributed, "all_reduce", self.all_reduce)
        monkeypatch.setattr(train_loop, "worker_device", lambda: torch.device("cpu"))
        monkeypatch.setattr(train_loop, "gradient_group", lambda device, seconds: None)

    def train(self, kind: type[TrainModule], job: Training, world: int) -> list[int]:
        """Let so many ranks train from the last checkpoint on; the steps that each has done."""
        self.world, self.slots = world, [torch.zeros(())] * world
        self.barrier = threading.Barrier(world, timeout=120)
        handle: Any = Handle(self.monitor)
        runs = []
        for self.local.rank in range(world):  # models cannot be loaded in several threads
            runs.append(train_loop.TrainLoop(kind, job, handle, 1.0))

        def train(rank: int) -> int:
            self.local.rank = rank
            torch.set_num_threads(1)
            try:
                return runs[rank].train()
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(world) as pool:
            return list(pool.map(train, range(world)))

    def weights(self) -> dict[str, Tensor]:
        """Those of the last checkpoint."""
        return load_file(self.checkpoints[-1] / WEIGHTS)

    def losses(self) -> list[float]:
        return [line["loss"] for line in self.monitor.lines if "loss" in line]

    def all_reduce(self, tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if self.world > 1:
            self.slots[self.local.rank] = tensor.clone()
            self.barrier.wait()
            total = torch.stack(self.slots).sum(0)
            self.barrier.wait()
            tensor.copy_(total)
        return SimpleNamespace(wait=lambda: None)

    def get_context(self) -> Any:
        return SimpleNamespace(
            get_world_rank=lambda: self.local.rank, get_world_size=lambda: self.world
        )

    def get_checkpoint(self) -> Any:
        if not self.checkpoints:
            return None

        @contextlib.contextmanager
        def as_directory() -> Iterator[str]:
            yield str(self.checkpoints[-1])

        return SimpleNamespace(as_directory=as_directory)

    def report(self, metrics: Any, checkpoint: Any, **how: Any) -> None:
        """As Ray Train, deletes the local copy once the checkpoint is kept."""
        assert how["delete_local_checkpoint_after_upload"]
        if checkpoint is not None:
            kept = self.folder / how["checkpoint_dir_name"]
            shutil.move(checkpoint.path, kept)
            self.checkpoints.append(kept)


class Handle:
    """An actor's handle: each method has a `remote`."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self.actor, name))
