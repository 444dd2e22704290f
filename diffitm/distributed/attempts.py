"""What is known of failures on all nodes, and what an actor that failed is to do next."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import ray

RETRIES = 3
MOST = 20  # times that a thing may be begun, whatever ended it
HERE = 2  # failures at one place before a block is left to another
PATIENCE = 300.0  # seconds that all actors may fail for an outside reason before the run ends
ALONE = (
    120.0  # seconds that one node may fail for a cause of its own while others are still awaited
)
STARTING = (
    60.0  # seconds of failures, with nothing done, after which a block waits no more for an actor
)
SHORT = 30.0  # seconds at most until a block is left: others may have nothing else to do by then
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


def delay(in_a_row: int, first: float) -> float:
    """Seconds to wait after so many failures in a row, the first of which costs `first`."""
    return min(first * 2.0 ** (in_a_row - 1), LONGEST)


class Attempts:
    """An actor beside the driver that is told what begins, ends and fails.

    A thing that was begun and neither ended nor failed has ended its process. It is given up after
    1 + RETRIES times, those aside in which the node went away, and after MOST of all. Ray's own bounds
    cannot be used: the loss of a node takes it several seconds to see, and several retries.
    """

    def __init__(self, wanted: int = 1, living: Callable[[], set[str]] = living_nodes) -> None:
        self.wanted, self.living = wanted, living  # `wanted`: actors of the pool
        self.started = set[str]()  # actors
        self.begun: dict[str, list[str]] = {}  # thing -> nodes
        self.failed_at: dict[str, list[tuple[str, str]]] = {}  # thing -> places' names, and why
        self.troubles: dict[str, Trouble] = {}  # name of a place -> what went wrong there
        self.working: dict[str, str] = {}  # actor -> node, unless its last news is a failure
        self.did_well: dict[str, float] = {}  # name of a place -> when it ended a block
        self.error: Exception | None = None  # that ends the run
        self.refused = False  # an actor was told to end the run, which it does with its next block
        self.since: float | None = None  # of the first failure since anything went well

    def start(self, what: str, actor: str, place: Place) -> Verdict:
        """An actor starts. At a place in trouble it waits, so that others get the blocks."""
        self.started.add(actor)
        verdict = self.begin(what, actor, place)
        self.refused |= verdict.why is not None
        trouble = self.troubles.get(place.name)
        if verdict.why is None and trouble and trouble.in_a_row and self._others(actor):
            return Verdict(delay(trouble.in_a_row, 5.0))
        return verdict

    def begin(self, what: str, actor: str, place: Place) -> Verdict:
        """An actor begins a thing."""
        if self._is_for_others(what, actor, place):
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
        self.did_well[place.name] = time.monotonic()
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
        self.since = self.since or time.monotonic()
        if trouble.in_a_row > RETRIES and not self._is_worth_waiting(
            actor, place, cause, transient
        ):
            self.refused = True
            return Verdict(why=f"{what} failed {trouble.in_a_row} times on {place.name}: {cause}")
        seconds = delay(trouble.in_a_row, 5.0 if transient else 1.0)
        leave = self._is_for_others(what, actor, place)
        return Verdict(min(seconds, SHORT) if leave else seconds, leave)

    def give_up(self, error: Exception) -> None:
        """An actor ends the run with this error, of which Ray hands on a traceback alone."""
        self.error = self.error or error

    def read_error(self) -> Exception | None:
        """What ended the run, if it was an actor's error."""
        return self.error

    def read_troubles(self) -> dict[str, Trouble]:
        """What went wrong, by place."""
        return self.troubles

    def has_trouble(self) -> bool:
        """Whether actors fail for good, or for so long that a block should not wait for one."""
        failing = self.since is not None and time.monotonic() - self.since > STARTING
        return self.refused or failing

    def _is_for_others(self, what: str, actor: str, place: Place) -> bool:
        """Whether a thing that failed here is left to others, who do well: after HERE failures, or after
        the first at a place where others failed before it."""
        failures = sum(name == place.name for name, _ in self.failed_at.get(what, []))
        if not failures or not self._others(actor):
            return False
        return max(failures, self.troubles[place.name].in_a_row) >= HERE

    def _is_worth_waiting(self, actor: str, place: Place, cause: str, transient: bool) -> bool:
        """Whether an actor that fails may yet do well, or another in its place: one at a place that did
        well a moment ago, one that is still awaited where no two places fail for the same cause."""
        now = time.monotonic()
        if any(name != place.name and now - at < ALONE for name, at in self.did_well.items()):
            return True
        seconds = now - (self.since or 0.0)
        alike = sum(t.in_a_row > 0 and t.cause == cause for t in self.troubles.values())
        awaited = len(self.started) < self.wanted and alike == 1 and seconds < ALONE
        return awaited or (transient and seconds < PATIENCE) or self._others(actor)

    def _well(self, actor: str, place: Place) -> None:
        """Count the actor among those that do well, unless its place is in trouble."""
        if place.name not in self.troubles or not self.troubles[place.name].in_a_row:
            self.working[actor] = place.node

    def _others(self, actor: str) -> bool:
        """Whether another actor does well, as far as is known."""
        living = self.living()
        return any(node in living for other, node in self.working.items() if other != actor)
