"""Room for training workers: waited for where the log can say so, and noticed when there is more."""

from __future__ import annotations

import logging
import time

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

log = logging.getLogger("diffitm")
SETTLE = 1.0  # seconds that more than the least number of workers may take to find room
SOON = 10.0  # seconds of waiting without a word


class Places:
    """Asks for room for workers of one share each: for `least` at once, for more one by one, `most` in all.

    Ray's own scheduler answers, so what other work of the cluster holds is not counted in, and a
    request that waits is what an autoscaler brings nodes up for. Ray Train's elastic policy counts the
    nodes' whole resources, as they were up to 20 s before, and a killed run's share for 180 s; while it
    waits it keeps a processor busy and hears no Ctrl-C; and it ends a running group in the middle of an
    update.
    """

    def __init__(self, share: dict[str, float], least: int, most: int) -> None:
        self.share, self.least, self.most = share, least, most
        self.more: list[tuple[PlacementGroup, ray.ObjectRef]] = []
        self.waiting = False

    def take(self) -> int:
        """How many workers there is room for now, once there is for the least number."""
        all_at_once = self._ask(self.least)
        self.more += [self._ask(1) for _ in range(self.most - self.least - len(self.more))]
        self._await(all_at_once)
        end = time.monotonic() + SETTLE
        while self.more and not self._are_ready(self.more) and time.monotonic() < end:
            time.sleep(0.1)
        ready = [place for place in self.more if self._are_ready([place])]
        self.more = [place for place in self.more if place not in ready]
        for group, _ in (all_at_once, *ready):
            remove_placement_group(group)
        return self.least + len(ready)

    def has_more(self) -> bool:
        """Whether there is room for more workers than were taken."""
        return any(self._are_ready([place]) for place in self.more)

    def close(self) -> None:
        """Ask for no more."""
        for group, _ in self.more:
            remove_placement_group(group)
        self.more = []

    def standing(self) -> str:
        """What the cluster has, and what is waited for."""
        total, free = ray.cluster_resources(), ray.available_resources()
        names = (("CPU", "processors"), ("GPU", "GPUs"))
        has = " and ".join(f"{total.get(k, 0):g} {n} ({free.get(k, 0):g} free)" for k, n in names)
        nodes = sum(node["Alive"] for node in ray.nodes())
        does = f"{self} wait for room" if self.waiting else "the workers run"
        return f"{has} on {nodes} nodes; {does}"

    def __str__(self) -> str:
        takes = " and ".join(
            f"{self.share[k]:g} {n}"
            for k, n in (("CPU", "processors"), ("GPU", "GPUs"))
            if k in self.share
        )
        return f"{self.least} workers of {takes} each"

    def _ask(self, workers: int) -> tuple[PlacementGroup, ray.ObjectRef]:
        group = placement_group([self.share] * workers)
        return group, group.ready()

    def _await(self, place: tuple[PlacementGroup, ray.ObjectRef]) -> None:
        self.waiting = True
        if not ray.wait([place[1]], timeout=SOON)[0]:
            log.info("%s wait for room: the cluster has %s", self, self.standing())
            ray.wait([place[1]])
        self.waiting = False

    def _are_ready(self, places: list[tuple[PlacementGroup, ray.ObjectRef]]) -> bool:
        refs = [ref for _, ref in places]
        return len(ray.wait(refs, num_returns=len(refs), timeout=0)[0]) == len(refs)
