"""Which ends of a training group count as retries, and what is said of them."""

from __future__ import annotations

import logging
import socket
from collections.abc import Set

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from diffitm.core.errors import InputError
from diffitm.distributed import restarts
from diffitm.distributed.restarts import MOST, Group, Restarts
from diffitm.distributed.worker_group import describe_end, is_own_error


class Cluster:
    """Nodes that are up; each look at them may be the last for one of them."""

    def __init__(self, *nodes: str) -> None:
        self.up, self.leaving, self.looks = set(nodes), dict[str, int](), 0

    def __call__(self, nodes: Set[str]) -> set[str]:
        self.looks += 1
        self.up -= {node for node, look in self.leaving.items() if look <= self.looks}
        return set(nodes) & self.up


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept; the clock goes on by as much."""
    slept: list[float] = []
    monkeypatch.setattr(restarts.time, "sleep", slept.append)
    monkeypatch.setattr(restarts.time, "monotonic", lambda: sum(slept))
    return slept


def group(*nodes: str, saved: int = 0, why: str = "worker 0 on node x: it is gone") -> Group:
    return Group(frozenset(nodes), saved, why)


def test_a_lost_node_is_no_retry(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster("a", "b", "c")
    counted = Restarts(0, cluster)
    for node in ("a", "b"):
        cluster.up.remove(node)
        counted.count(group(node, "c"))
    with caplog.at_level(logging.WARNING), pytest.raises(InputError):
        counted.count(group("c"))


def test_a_worker_that_ends_on_a_living_node_is_one(waits: list[float]) -> None:
    counted = Restarts(2, Cluster("a", "b"))
    counted.count(group("a", "b", saved=5))
    counted.count(group("a", "b", saved=10))
    assert waits == []
    with pytest.raises(InputError) as caught:
        counted.count(group("a", "b", saved=15, why="worker 1 on node y: out of memory"))
    assert str(caught.value) == (
        "the workers ended 3 times other than with a node, and --retries is 2; the last time: "
        "worker 1 on node y: out of memory"
    )


def test_a_node_may_last_a_little_longer_than_its_workers(waits: list[float]) -> None:
    cluster = Cluster("a", "b")
    cluster.leaving = {"a": 5}
    Restarts(0, cluster).count(group("a", "b"))
    assert 0 < sum(waits) < restarts.PATIENCE


def test_a_crash_that_takes_its_node_along_does_not_go_on_for_ever(waits: list[float]) -> None:
    """Each node that it is tried on goes; the tries come slower and slower."""
    counted = Restarts(3, Cluster())
    for number in range(MOST):
        counted.count(group(str(number)))
    assert max(waits) == restarts.LONGEST
    with pytest.raises(
        InputError, match=rf"{MOST + 1} groups of workers in a row ended before a new"
    ):
        counted.count(group("last"))


def test_a_long_training_may_lose_any_number_of_nodes() -> None:
    """Where there is a new checkpoint each time."""
    counted = Restarts(0, Cluster())
    for number in range(3 * MOST):
        counted.count(group(str(number), saved=number))


def test_what_ended_a_group() -> None:
    """The worker that is gone, not one that missed it; where it was; a loop's own error; the start."""
    places = {0: ("id0", "node 10.0.0.1 (aaaa)"), 1: ("id1", "node 10.0.0.2 (bbbb)")}
    gone = WorkerHealthCheckFailedError("A worker health check failed.", ActorDiedError())
    missed = RuntimeError("Connection closed by peer [10.0.0.2]:1234")
    error = WorkerGroupError("..", {0: missed, 1: gone})
    told = describe_end(error, places)
    assert told == (
        "worker 1 on node 10.0.0.2 (bbbb): The actor died unexpectedly before finishing this task."
    )
    assert not is_own_error(error)
    own = WorkerGroupError("..", {0: ValueError("a\n  bad   value")})
    assert describe_end(own, places) == "worker 0 on node 10.0.0.1 (aaaa): ValueError: bad value"
    assert is_own_error(own)
    start = ControllerError(RuntimeError("no room"))
    assert describe_end(start, {}) == "RuntimeError: no room"
    assert not is_own_error(start)


def test_a_node_is_up_while_something_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that were asked about, whatever Ray still believes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_server(("127.0.0.1", 0)) as other:
            closed = other.getsockname()[1]
        nodes = [
            {"NodeID": name, "Alive": alive, "NodeManagerAddress": "127.0.0.1"}
            | {"NodeManagerPort": where}
            for name, alive, where in (
                ("up", True, port), ("gone", True, closed), ("dead", False, port),
                ("another", True, port),
            )
        ]  # fmt: skip
        monkeypatch.setattr(restarts.ray, "nodes", lambda: nodes)
        assert restarts.living({"up", "gone", "dead"}) == {"up"}


def test_waits_between_groups_that_get_nothing_done(waits: list[float]) -> None:
    """None after the first, then longer and longer; a new checkpoint begins anew."""
    counted = Restarts(0, Cluster())
    for saved in (0, 0, 0, 5, 5):
        counted.count(group("x", saved=saved))
    assert waits == [2.0, 4.0, 2.0]


def test_what_is_said_of_a_loss(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster("a")
    counted = Restarts(1, cluster)
    counted.count(group("a", why="worker 0: it crashed"))
    counted.count(group("b", saved=1, why="worker 1: it is gone"))
    text = "the training goes on from its last checkpoint after "
    assert caplog.messages == [
        f"{text}worker 0: it crashed",
        f"{text}worker 1: it is gone (its node is gone: no retry)",
    ]
    with pytest.raises(InputError, match="ended 2 times other than with a node"):
        counted.count(group("a", saved=2))
    with pytest.raises(InputError, match="ended once other than with a node, and --retries is 0"):
        Restarts(0, cluster).count(group("a"))
