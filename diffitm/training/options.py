"""Options that every tuning pipeline has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffitm.core.config import OnRay, find_outside, option
from diffitm.core.errors import InputError
from diffitm.training.tracking import track_problems

MOST_WORKERS = 10_000


@dataclass(frozen=True)
class Shared(OnRay):
    """Options of an update's size, of checkpoints, workers and the log."""

    steps: int | None = option(
        None, "updates of the weights (default: those of --epochs)", at_least=1
    )
    epochs: float = option(1.0, "how often each row or image is seen, unless --steps says", above=0)
    effective_batch: int = option(
        32, "examples or images of an update, over all workers", at_least=1
    )
    warmup_steps: int = option(
        0, "updates until the full learning rate, where the schedule has any", at_least=0
    )
    clip_norm: float = option(1.0, "norm that the gradient is clipped to", above=0)
    variant: str | None = option(None, "weights variant, such as fp16, of a diffusers folder")
    single_file_config: str | None = option(
        None,
        "diffusers folder or Hub id whose configs and tokenizers a model in one file has (default: a "
        "Hub id that diffusers tells by the weights)",
    )
    gradient_checkpointing: bool = option(False, "less memory, more time")
    seed: int = option(0, "of everything that is drawn", at_least=0)
    scenes: int = option(2000, "scenes that --data shapes draws for training", at_least=1)
    checkpoint_every: int = option(100, "updates between checkpoints", at_least=1)
    log_every: int = option(10, "updates between lines of the log", at_least=1)
    track: list[str] = option([], "wandb, mlflow: trackers of yours that show the log, too")
    workers: int | str = option(
        1,
        "training processes that share an update's micro-batches out: N, or MIN:MAX for as many as "
        "there is room for while nodes come and go",
    )
    cpus_per_worker: float | None = option(
        None,
        "processors of a worker (default: it asks for 1, and decodes images on its share of the node)",
    )
    gpus_per_worker: float | None = option(None, "GPUs of a worker (default: 1 if there are any)")
    retries: int = option(
        3, "how often workers are replaced that ended other than with their node", at_least=0
    )


def span(workers: int | str) -> tuple[int, int]:
    """The least and the most workers of --workers. Raises InputError for what is neither N nor MIN:MAX."""
    first, colon, last = str(workers).partition(":")
    try:
        least, most = int(first), int(last if colon else first)
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most <= MOST_WORKERS:
        raise InputError(
            f"--workers {workers}: must be a number of processes, or MIN:MAX such as 2:8, from 1 to "
            f"{MOST_WORKERS} and rising"
        )
    return least, most


def shared_problems(config: Any) -> list[str]:
    """What is wrong with them, and all numbers outside of their bounds."""
    problems = find_outside(config)
    try:
        span(config.workers)
    except InputError as error:
        problems.append(error.on_command_line())
    return problems + track_problems(config.track)
