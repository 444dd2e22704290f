"""A sleeping model with faults: nodes that cannot load it or read images, a GPU that fails once, a long
block."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from diffitm.core.errors import InputError, Unavailable
from diffitm.core.schema import PairRow
from tests.faults.sleeping import Sleeper, SleepSpec


@dataclass(frozen=True)
class BrokenSpec(SleepSpec):
    """A node with the resource `without` cannot load, one with `away` cannot read an image; the block
    with the image `fails` meets a CUDA error the first time, the first block of all takes `long` seconds."""

    without: str = "none"
    away: str = "none"
    fails: str = ""
    long: float = 0.0

    def build(self, device: str) -> Sleeper:
        if is_here(self.without):
            raise InputError("--model sleeping: no driver here")
        return Broken(self)


def is_here(resource: str) -> bool:
    """Whether this process runs on a node with that resource."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return resource in node["Resources"]


class Broken(Sleeper):
    spec: BrokenSpec

    def __init__(self, spec: BrokenSpec) -> None:
        super().__init__(spec)
        self.away = is_here(spec.away)

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        if self.away:
            raise Unavailable("none of 32 images could be read")
        if self.spec.fails in [row.image for row in rows] and self._first("failed"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if self.spec.long and self._first("long"):
            time.sleep(self.spec.long)
        return super().score(rows)

    def _first(self, what: str) -> bool:
        try:
            Path(f"{self.spec.trace}-{what}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
