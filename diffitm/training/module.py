"""What a worker trains, as an object that is handed to the one loop (distributed/train_loop.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffitm.training.dataloader import Loader
from diffitm.training.gradient_sync import Gradients
from diffitm.training.job import Training
from diffitm.training.latent_cache import CachedLoader
from diffitm.training.sampler import Item


@dataclass(frozen=True)
class Worker:
    """One process of the group that trains: its place in it, its device and its share of the processors.
    `monitor` is a handle of the run's Monitor."""

    rank: int
    world: int
    device: torch.device
    processors: float
    monitor: Any

    def summed(self, values: list[float] | Tensor) -> Tensor:
        """The values' sums over the workers, float64 on the CPU; all workers must call it alike."""
        sums = torch.as_tensor(values, dtype=torch.float64, device="cpu").clone()
        if self.world > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def lose(self, failure: str) -> None:
        """Count something that could not be used, and list it at the end of the run."""
        self.monitor.lose.remote(failure)


@dataclass(frozen=True)
class Measured:
    """What a validation found, by name of the log; `quality`, where the weights of the best one are kept."""

    values: dict[str, float] = field(default_factory=dict)
    quality: float | None = None


class TrainModule(ABC):
    """Networks, the losses of a micro-batch, and what a validation measures.

    A subclass sets in __init__ the `groups` of its parameters, each with its learning rate, and the
    `loader` of its micro-batches. `names` are the values of the log that come with each loss, `passes`
    the losses of a micro-batch if none of its images drops out.
    """

    names: tuple[str, ...]
    passes = 1
    groups: list[tuple[list[nn.Parameter], float]]
    loader: Loader | CachedLoader

    def __init__(self, job: Training, worker: Worker) -> None:
        self.job, self.worker = job, worker

    def gather(self, batches: list[tuple[list[Item], dict[str, Any]]]) -> None:
        """Called on every worker alike before the losses of a step, with this worker's micro-batches and
        what was loaded of their images: for what all micro-batches of an update decide together."""
        return

    @abstractmethod
    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Of a micro-batch whose images are all in `images`: losses to go backward from, one after the
        other, each with the values of `names`."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """What is trained, on the CPU."""

    @abstractmethod
    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over weights as weights() gives them."""

    @abstractmethod
    def measures(self, step: int) -> bool:
        """Whether a measurement is due at this step."""

    @abstractmethod
    def measure(self, step: int) -> Measured:
        """What is due at this step; called on every worker alike, under the averaged weights if any."""

    def prepare(self, step: int, gradients: Gradients) -> None:
        """Called before each step."""
        return

    def leave(self, folder: Path) -> None:
        """Add to the files of a last checkpoint; called on the first worker alone."""
        return

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that happens every so many steps, at the start and at the end is due."""
        return every > 0 and (step % every == 0 or step == self.job.steps)
