"""A model that is a fixed sleep a pair, images that take a while to be read, and what actors write down.

It imports no torch (actors with GPUs do), so that 64 actors fit on a small machine.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffitm.core import images
from diffitm.core.schema import SCORES, Example, PairRow
from diffitm.scoring.image_reader import THREADS, ImageReader

AT_ONCE = THREADS


def _picture() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (2, 2)).save(sink, "PNG")
    return sink.getvalue()


PICTURE = _picture()


class Block(NamedTuple):
    """Some pairs that an actor scored between two times, in seconds since the epoch."""

    start: float
    end: float
    pairs: int


class Actor(NamedTuple):
    """When an actor had its model, and the blocks it did."""

    up: float
    blocks: list[Block]


@dataclass(frozen=True)
class SleepSpec:
    """Actors write to files below `trace`; a pair takes `seconds` and has errors of `timesteps`, reading
    an image takes `read` seconds."""

    trace: str
    seconds: float = 0.05
    timesteps: int = 0
    read: float = 0.0
    image_cost = 0

    @property
    def cost(self) -> int:
        return max(1, self.timesteps)

    def store_config(self) -> dict[str, Any]:
        kind = "diffusion" if self.timesteps else "clip"
        timesteps = {"timesteps": list(range(self.timesteps))} if self.timesteps else {}
        return {"kind": kind, "seconds": self.seconds} | timesteps

    def build(self, device: str) -> Sleeper:
        return Sleeper(self)


class Sleeper:
    """Sleeps for every pair; its score is a function of the pair."""

    def __init__(self, spec: SleepSpec) -> None:
        self.spec, self.cost = spec, spec.cost
        self.file = Path(spec.trace, f"{os.getpid()}-{time.time_ns()}")
        self.file.write_text(f"{time.time()}\n")

    def measure_rate(self) -> float:
        return self.cost / self.spec.seconds if self.spec.seconds else 0.0

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        start = time.time()
        images.read = self._read
        lines, left = list[dict[str, Any]](), iter(rows)
        with ImageReader(rows, "", lambda image: image, AT_ONCE, THREADS) as reader:
            while found := reader.take(AT_ONCE):
                for item, row in zip(found, left):  # noqa: B905  # left has those of the next images, too
                    assert item.failure is None, item.failure
                    lines += [self._one(row, text) for text in row.texts]
        with self.file.open("a") as file:
            file.write(f"{start} {time.time()} {len(lines)}\n")
        return lines

    def _read(self, *place: str) -> bytes:
        time.sleep(self.spec.read)
        return PICTURE

    def _one(self, row: PairRow, text: str) -> dict[str, Any]:
        time.sleep(self.spec.seconds)
        line = dict.fromkeys(SCORES.names) | {"row": row.row, "image": row.image, "text": text}
        value = similarity(row.image, text)
        if not self.spec.timesteps:
            return {**line, "similarity": value}
        values = np.full(self.spec.timesteps, value, np.float32)
        return {
            **line,
            "timesteps": np.arange(len(values)),
            "l2": values,
            "l1": values,
            "huber": values,
        }


def similarity(image: str, text: str) -> float:
    """The score of a pair, a small whole number."""
    return float(sum(map(ord, image + text)))


def examples(pairs: int, texts_each: int = 5) -> Iterator[Example]:
    """One image with so many captions each."""
    for number in range(pairs // texts_each):
        texts = tuple(f"caption {k} of image {number}" for k in range(texts_each))
        yield Example(f"{number}", (f"images/{number:07d}.jpg",), texts, "text")


def read_trace(folder: Path) -> list[Actor]:
    """What each actor did, in order."""
    actors = []
    for path in folder.iterdir():
        up, *lines = path.read_text().splitlines()
        parts = [line.split() for line in lines]
        actors.append(Actor(float(up), [Block(float(s), float(e), int(n)) for s, e, n in parts]))
    return actors
