"""The settings of a tuning run, as a value that travels to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffitm.models.load import Source
from diffitm.training.draw import Schedule
from diffitm.training.objectives import Objective
from diffitm.training.rows import Row


@dataclass(frozen=True)
class Validation:
    """Tasks below `root` that are scored every so many steps, `examples` of each, evenly spread."""

    root: str
    tasks: tuple[str, ...]
    every: int
    examples: int
    timesteps: int


@dataclass(frozen=True)
class Job:
    """Everything that the weights depend on, and where images lie.

    `size` examples make a micro-batch, `micro` of those a step, whatever the number of workers.
    """

    source: Source
    variant: str | None
    dtype: str
    objective: Objective
    rows: Sequence[Row]
    kept: Sequence[int]
    root: str
    resize: str
    negatives: str
    per_example: bool
    size: int
    micro: int
    steps: int
    rate: float
    schedule: str
    warmup: int
    weight_decay: float
    clip: float
    rank: int
    ema: float | None
    checkpointing: bool
    seed: int
    checkpoint_every: int
    log_every: int
    validation: Validation | None
    latents: str | None  # folders of training.cached, None to encode on the way
    texts: str | None

    def plan(self) -> Schedule:
        """Which rows make up which step."""
        return Schedule(
            self.rows, self.kept, self.size, self.micro, self.negatives, self.per_example, self.seed
        )
