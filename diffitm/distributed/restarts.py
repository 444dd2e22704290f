"""How often a training was cut short, and whether it may begin once more."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Set
from typing import Any, NamedTuple

import ray

from diffitm.core.errors import InputError

log = logging.getLogger("diffitm")
MOST = 20  # groups of workers in a row that end before a new checkpoint, whatever ended them
PATIENCE = 30.0  # seconds that a node may last after its workers, when it goes away
LONGEST = 60.0  # seconds before a group is started again


class Group(NamedTuple):
    """Workers that ended together: the nodes that they were on, the update of the last checkpoint that
    there was then, and what was seen of the end."""

    nodes: frozenset[str]
    saved: int
    why: str


def living(nodes: Set[str]) -> set[str]:
    """Those of the nodes that are up: Ray takes up to a minute to see that one has gone, but nothing
    listens there any more."""
    return {
        node["NodeID"]
        for node in ray.nodes()
        if node["NodeID"] in nodes and node["Alive"] and _listens(node)
    }


def _listens(node: dict[str, Any]) -> bool:
    try:
        address = (node["NodeManagerAddress"], node["NodeManagerPort"])
        socket.create_connection(address, timeout=5).close()
    except OSError:
        return False
    return True


class Restarts:
    """Allows `retries` groups to end other than with one of their nodes, and any number that lose a
    node, as spot nodes are lost, if a checkpoint is made now and then."""

    def __init__(self, retries: int, living: Callable[[Set[str]], set[str]] = living) -> None:
        self.retries, self.living = retries, living
        self.ended: list[Group] = []

    def count(self, group: Group) -> None:
        """Another one has ended. Raises InputError if that was the last one."""
        self.ended.append(group)
        end = time.monotonic() + PATIENCE
        while (crashes := self._crashes()) > self.retries and time.monotonic() < end:
            time.sleep(1)
        if crashes > self.retries:
            times = f"{crashes} times" if crashes > 1 else "once"
            raise InputError(
                f"the workers ended {times} other than with a node, and --retries is {self.retries}; "
                f"the last time: {group.why}"
            )
        vain = self._in_vain()
        if vain > MOST:
            text = (
                f"{vain} groups of workers in a row ended before a new checkpoint, with a node or"
            )
            raise InputError(f"{text} without; the last time: {group.why}")
        text = "the training goes on from its last checkpoint after %s%s"
        log.warning(text, group.why, " (its node is gone: no retry)" if self._lost(group) else "")
        if vain > 1:
            time.sleep(min(LONGEST, 2.0 ** (vain - 1)))

    def _lost(self, group: Group) -> bool:
        return not group.nodes <= self.living(group.nodes)

    def _crashes(self) -> int:
        """Groups that ended with all of their nodes up, as far as is known now."""
        return sum(not self._lost(group) for group in self.ended)

    def _in_vain(self) -> int:
        """Groups at the end of the list that left no new checkpoint."""
        last = self.ended[-1].saved
        count = 0
        for group in reversed(self.ended):
            if group.saved != last:
                break
            count += 1
        return count
