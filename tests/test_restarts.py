"""Which ends of a training group count as retries, and what is said of them."""

from __future__ import annotations

import logging
from collections.abc import Set

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from diffitm.distributed import restarts
from diffitm.distributed.restarts import MOST, Group, Restarts
from diffitm.distributed.trainer import describe_end, is_own_error
from diffitm.errors import InputError
from diffitm.training.exchange import BUCKET, Gradients


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


def test_gradients_are_views_of_few_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward passes add up in them, an exchange sums them in place, and a part that waits is left out."""
    module = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)])
    first, second = (list(part.parameters()) for part in module)
    gradients = Gradients([first, second])
    inputs = torch.ones(1, 3)

    def backward() -> None:
        module[1](module[0](inputs)).sum().backward()

    backward()
    once = [p.grad.clone() for p in module.parameters()]  # type: ignore[union-attr]
    backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(module.parameters(), once, strict=True))  # type: ignore[arg-type]
    assert len(gradients.buffers) == 2
    gradients.zero()
    assert not any(p.grad.any() for p in module.parameters())  # type: ignore[union-attr]
    exchanged: list[int] = []

    class Work:
        def wait(self) -> None:
            return

    def all_reduce(tensor: torch.Tensor, **_: object) -> Work:
        exchanged.append(tensor.numel())
        tensor.mul_(3)
        return Work()

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    gradients.wait(first, True)
    backward()
    gradients.exchange()
    assert exchanged == [3] and first[0].grad is None
    assert torch.equal(second[0].grad, 3 * once[2])  # type: ignore[arg-type]
    gradients.wait(first, False)
    gradients.zero()
    backward()
    gradients.exchange()
    assert exchanged == [3, 8, 3]
    assert torch.equal(first[0].grad, 3 * once[0])  # type: ignore[arg-type]


def test_buckets_are_bounded() -> None:
    """A parameter larger than one has a bucket of its own."""
    sizes = [BUCKET // 8, BUCKET // 8, BUCKET, 10]
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    gradients = Gradients([parameters])
    assert [len(buffer) for buffer in gradients.buffers] == [BUCKET // 4, BUCKET, 10]
