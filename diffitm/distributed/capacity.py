"""Room for training workers: waited for where the log can say so, and noticed when there is more."""

from __future__ import annotations

import logging
import threading
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

log = logging.getLogger("diffitm")
SETTLE = 1.0  # seconds that more than the least number of workers may take to find room
SOON = 10.0  # seconds of waiting without a word
Place = tuple[PlacementGroup, ray.ObjectRef]  # and what is there once it has room


class Capacity:
    """Asks for room for workers of one share each: for `least` at once, for more one by one, `most` in all.

    Ray's own scheduler answers, so what other work of the cluster holds is not counted in, and a
    request that waits is what an autoscaler brings nodes up for. Ray Train's elastic policy counts the
    nodes' whole resources, as they were up to 20 s before, and a killed run's share for 180 s; while it
    waits it keeps a processor busy and hears no Ctrl-C; and it ends a running group in the middle of an
    update.
    """

    def __init__(self, share: dict[str, float], least: int, most: int) -> None:
        self.share, self.least, self.most = share, least, most
        self.taken: int | None = None  # workers, None while room is looked for
        self.more: list[Place] = []
        self.lock = threading.Lock()  # who asks for more is another thread

    def take(self) -> int:
        """How many workers there is room for now, once there is for the least number."""
        with self.lock:
            self._forget()
            self.taken = None
            at_once = self._ask(self.least)
        self._await(at_once)
        # Not before: as nodes come one by one, each would be taken for a worker of its own.
        self.more = [self._ask(1) for _ in range(self.most - self.least)]
        end = time.monotonic() + SETTLE
        while self._ready() < len(self.more) and time.monotonic() < end:
            time.sleep(0.1)
        with self.lock:
            self.taken = self.least + self._ready()
            remove_placement_group(at_once[0])
            self._forget()
        return self.taken

    def has_more(self) -> bool:
        """Whether there is room for more workers than were taken. To be asked once those are there: a
        request that waits would take what was found for them."""
        with self.lock:
            if self.taken is None:
                return False
            if not self.more:
                self.more = [self._ask(1) for _ in range(self.most - self.taken)]
            return self._ready() > 0

    def close(self) -> None:
        """Ask for no more."""
        with self.lock:
            self.taken = None
            self._forget()

    def _forget(self) -> None:
        for group, _ in self.more:
            remove_placement_group(group)
        self.more = []

    def standing(self) -> str:
        """What the cluster has, and what is waited for."""
        total, free = ray.cluster_resources(), ray.available_resources()
        names = (("CPU", "processors"), ("GPU", "GPUs"))
        has = " and ".join(f"{total.get(k, 0):g} {n} ({free.get(k, 0):g} free)" for k, n in names)
        nodes = sum(node["Alive"] for node in ray.nodes())
        does = "wait for room" if self.taken is None else "have it"
        return f"{has} on {nodes} nodes; {self} {does}"

    def __str__(self) -> str:
        takes = " and ".join(
            f"{self.share[k]:g} {n}"
            for k, n in (("CPU", "processors"), ("GPU", "GPUs"))
            if k in self.share
        )
        return f"{self.taken or self.least} workers of {takes} each"

    def _ask(self, workers: int) -> Place:
        group = placement_group([self.share] * workers)
        return group, group.ready()

    def _await(self, place: Place) -> None:
        if not ray.wait([place[1]], timeout=SOON)[0]:
            log.info("the training waits: the cluster has %s", self.standing())
            ray.wait([place[1]])

    def _ready(self) -> int:
        refs = [ref for _, ref in self.more]
        return len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) if refs else 0
