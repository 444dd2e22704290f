"""What is known of failures on all nodes, and what an actor that failed is to do next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import ray

RETRIES = 3
MOST = 20  # times that a thing may be begun, whatever ended it
HERE = 2  # times that a block fails at one place before it is left to another
PATIENCE = 300.0  # seconds that all actors may fail for an outside reason before the run ends
LONGEST = 300.0  # seconds between two tries at a place that fails


class Place(NamedTuple):
    """Where an actor runs: the node's id, and what people call it, with its GPUs."""

    node: str
    name: str


class Verdict(NamedTuple):
    """What to do: go on after `delay` seconds, leave the block to others, or end the run with `why`."""

    delay: float = 0.0
    leave: bool = False
    why: str | None = None


class Trouble(NamedTuple):
    """What went wrong at a place: how often in all, how often since something went well, the last
    cause."""

    times: int
    in_a_row: int
    cause: str


def living_nodes() -> set[str]:
    """The ids of the cluster's nodes that are up."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class Attempts:
    """An actor beside the driver that is told what begins, ends and fails.

    A thing that was begun and neither ended nor failed has ended its process. It is given up after
    1 + RETRIES times, those aside in which the node went away, and after MOST of all. Ray's own bounds
    cannot be used: the loss of a node takes it several seconds to see, and several retries.
    """

    def __init__(self, living: Callable[[], set[str]] = living_nodes) -> None:
        self.living = living
        self.begun: dict[str, list[str]] = {}  # thing -> nodes
        self.failed_at: dict[str, list[tuple[str, str]]] = {}  # thing -> places' names, and why
        self.troubles: dict[str, Trouble] = {}  # name of a place -> what went wrong there
        self.working: dict[str, str] = {}  # actor -> node, unless its last news is a failure
        self.since: float | None = None  # of the first failure since anything went well

    def begin(self, what: str, actor: str, place: Place) -> Verdict:
        """An actor begins a thing."""
        if self._failures(what, place) >= HERE and self._others(actor):
            return Verdict(leave=True)
        nodes = self.begun.setdefault(what, [])
        nodes.append(place.node)
        self._well(actor, place)
        if len(nodes) <= 1 + RETRIES:
            return Verdict()
        living, last = self.living(), self.failed_at.get(what, [("", "")])[-1][1]
        cause = f", the last time by {last}" if last else ", for want of memory or by a crash"
        if sum(node in living for node in nodes) > 1 + RETRIES:
            return Verdict(why=f"{what}: ended its process {1 + RETRIES} times{cause}")
        if len(nodes) > MOST:
            return Verdict(
                why=f"{what}: was lost {MOST} times, with its process or its node{cause}"
            )
        return Verdict()

    def load(self, what: str, actor: str, place: Place) -> None:
        """An actor's worker is there. What a block met at this place still counts."""
        self.begun.pop(what, None)
        self._well(actor, place)

    def end(self, what: str, actor: str, place: Place) -> None:
        """A block is done."""
        self.begun.pop(what, None)
        self.failed_at.pop(what, None)
        self.since = None
        if place.name in self.troubles:
            self.troubles[place.name] = self.troubles[place.name]._replace(in_a_row=0)
        self._well(actor, place)

    def fail(
        self, what: str, actor: str, place: Place, cause: str, transient: bool, crash: bool
    ) -> Verdict:
        """It failed for a reason that lies at the place or outside; `transient` if time may mend it,
        `crash` if the process ends of it. The run ends where all fail that there are."""
        nodes = self.begun.get(what, [])
        if nodes and not crash:
            nodes.pop()
        self.failed_at.setdefault(what, []).append((place.name, cause))
        self.working.pop(actor, None)
        before = self.troubles.get(place.name, Trouble(0, 0, ""))
        trouble = Trouble(before.times + 1, before.in_a_row + 1, cause)
        self.troubles[place.name] = trouble
        now = time.monotonic()
        self.since = self.since or now
        patient = transient and now - self.since < PATIENCE
        if trouble.in_a_row > RETRIES and not patient and not self._others(actor):
            return Verdict(why=f"{what} failed {trouble.in_a_row} times on {place.name}: {cause}")
        leave = self._failures(what, place) >= HERE and self._others(actor)
        step = 5.0 if transient else 1.0
        return Verdict(min(step * 2.0 ** (trouble.in_a_row - 1), LONGEST), leave)

    def read_troubles(self) -> dict[str, Trouble]:
        """What went wrong, by place."""
        return self.troubles

    def _failures(self, what: str, place: Place) -> int:
        return sum(name == place.name for name, _ in self.failed_at.get(what, []))

    def _well(self, actor: str, place: Place) -> None:
        """Count the actor among those that do well, unless its place is in trouble."""
        if place.name not in self.troubles or not self.troubles[place.name].in_a_row:
            self.working[actor] = place.node

    def _others(self, actor: str) -> bool:
        """Whether another actor does well, as far as is known."""
        living = self.living()
        return any(node in living for other, node in self.working.items() if other != actor)
