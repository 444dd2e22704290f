"""What scoring did and cost, as actors count it and as a run's summary tells it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from diffitm.core import storage

SHOWN = 3  # of many


@dataclass(frozen=True)
class Done:
    """What was done; two add up. Times are seconds, of all actors together except for `seconds`."""

    pairs: int = 0
    forwards: int = 0  # of the model
    failures: int = 0  # pairs
    busy: float = 0.0  # scoring, without `loading`
    actors: int = 0
    rate: float = 0.0  # measured forwards a second, of all actors together
    waited: float = 0.0  # for the next block
    inside: float = 0.0  # of `busy`, in the model's forwards
    begun: int = 0  # blocks
    finished: int = 0  # blocks
    memory: int = 0  # the most GPU memory that an actor used, bytes
    batch_size: int = 0  # the smallest, 0 of models without
    seconds: float = 0.0  # from the start of scoring to its end
    smaller: tuple[str, ...] = ()  # a line for each time that an actor ran out of GPU memory
    not_finite: int = 0  # pairs whose score is NaN or infinite
    strange: tuple[str, ...] = ()  # a few of these
    loading: float = 0.0  # waiting for a block's images, with nothing else to do
    not_compiled: tuple[str, ...] = ()  # the cause for each actor whose --compile failed

    def __add__(self, other: Done) -> Done:
        both = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        both["memory"] = max(self.memory, other.memory)
        both["strange"] = both["strange"][:SHOWN]
        both["batch_size"] = min(filter(None, (self.batch_size, other.batch_size)), default=0)
        return Done(**both)


@dataclass(frozen=True)
class Summary:
    """A line of summary.json: what this run did for a model. Nothing to divide by gives null."""

    model: str
    pairs: int
    forwards: int
    failures: int
    retries: int  # blocks that were begun and not finished, so that another actor did them
    seconds: float
    forwards_per_second: float | None
    forwards_per_second_of_an_actor: float | None  # while it scores
    unet_share: float | None  # of the time that actors scored, that in the U-Net's forwards
    waiting_share: float | None  # of the actors' time since they were up, that without work
    loading_share: float | None  # of the same time, that in which they waited for images
    gpu_memory_bytes: int
    batch_size: int | None
    out_of_memory: int  # times that an actor made its batches smaller
    not_compiled: int  # actors whose --compile failed


def summarise(model: str, done: Done) -> Summary:
    """The summary of what was done for a model."""
    up = done.waited + done.loading + done.busy
    return Summary(
        model=model,
        pairs=done.pairs,
        forwards=done.forwards,
        failures=done.failures,
        retries=done.begun - done.finished,
        seconds=done.seconds,
        forwards_per_second=_ratio(done.forwards, done.seconds),
        forwards_per_second_of_an_actor=_ratio(done.forwards, done.busy),
        unet_share=_ratio(done.inside, done.busy) if done.inside else None,
        waiting_share=_ratio(done.waited, up),
        loading_share=_ratio(done.loading, up),
        gpu_memory_bytes=done.memory,
        batch_size=done.batch_size or None,
        out_of_memory=len(done.smaller),
        not_compiled=len(done.not_compiled),
    )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def write_summary(names: Sequence[str], done: Sequence[Done], out: str) -> list[Summary]:
    """summary.json below `out`: what was done for each model, and the total. The models' lines, then
    the total's."""
    lines = [summarise(name, part) for name, part in zip(names, done, strict=True)]
    total = summarise("total", sum(done, Done()))
    found = {"models": [asdict(line) for line in lines], "total": asdict(total)}
    storage.write_text(storage.join(out, "summary.json"), json.dumps(found, indent=2))
    return [*lines, total]
