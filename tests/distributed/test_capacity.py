"""How many workers there is room for, on a cluster that answers as Ray's scheduler does."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from diffitm.distributed import capacity
from diffitm.distributed.capacity import SETTLE, SOON, Capacity

SHARE = {"CPU": 2.0, "GPU": 1.0}


class Group:
    """A request for room, with the bundles that it asks for."""

    def __init__(self, bundles: list[dict[str, float]]) -> None:
        self.bundles = bundles

    def ready(self) -> Group:
        return self


class Cluster:
    """Gives room for so many workers, in the order in which they were asked for."""

    def __init__(self, room: int) -> None:
        self.room, self.now = room, 0.0
        self.groups: list[Group] = []
        self.timeouts: list[float | None] = []

    def placement_group(self, bundles: list[dict[str, float]]) -> Group:
        assert all(bundle == SHARE for bundle in bundles)
        self.groups.append(Group(bundles))
        return self.groups[-1]

    def remove_placement_group(self, group: Group) -> None:
        self.groups.remove(group)

    def wait(self, refs: list[Group], num_returns: int = 1, timeout: float | None = None) -> Any:
        assert num_returns <= len(refs)
        self.timeouts.append(timeout)
        if timeout is None:
            self.room = max(self.room, 2)
        left, ready = self.room, []
        for group in self.groups:
            if left >= len(group.bundles):
                left -= len(group.bundles)
                ready.append(group)
        found = [ref for ref in refs if ref in ready][:num_returns]
        return found, [ref for ref in refs if ref not in found]

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": 4.0}

    def available_resources(self) -> dict[str, float]:
        return {"CPU": 3.0}

    def nodes(self) -> list[dict[str, bool]]:
        return [{"Alive": True}, {"Alive": False}, {"Alive": True}]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    made = Cluster(0)
    monkeypatch.setattr(capacity, "ray", made)
    monkeypatch.setattr(capacity, "placement_group", made.placement_group)
    monkeypatch.setattr(capacity, "remove_placement_group", made.remove_placement_group)
    monkeypatch.setattr(capacity.time, "sleep", made.sleep)
    monkeypatch.setattr(capacity.time, "monotonic", lambda: made.now)
    return made


@pytest.mark.parametrize(("room", "workers"), [(2, 2), (4, 4), (5, 5), (9, 5)])
def test_as_many_as_there_is_room_for(cluster: Cluster, room: int, workers: int) -> None:
    """From the least number to the most; whoever starts the workers finds the room empty."""
    cluster.room = room
    places = Capacity(SHARE, 2, 5)
    assert places.take() == workers == places.taken
    assert cluster.groups == []
    assert (cluster.now == 0) == (room >= 5)  # it waits for the others no longer than that
    assert cluster.now == pytest.approx(0 if room >= 5 else SETTLE, abs=0.11)
    assert cluster.timeouts[0] == SOON and None not in cluster.timeouts


def test_a_wait_for_the_least_number_is_told(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.room = 1
    places = Capacity(SHARE, 2, 3)
    with caplog.at_level(logging.INFO, "diffitm"):
        assert places.take() == 2
    assert caplog.messages == [
        "the training waits: the cluster has 8 processors (3 free) and 4 GPUs (0 free) on 2 nodes; "
        "2 workers of 2 processors and 1 GPUs each wait for room"
    ]
    assert places.standing().endswith("2 workers of 2 processors and 1 GPUs each have it")


def test_more_room_is_noticed(cluster: Cluster) -> None:
    """By one request for each worker that is missing, which stay until the next group is."""
    cluster.room = 2
    places = Capacity(SHARE, 2, 4)
    assert not places.has_more() and cluster.groups == []  # no group yet
    assert places.take() == 2
    cluster.room = 0  # the workers have taken it
    assert not places.has_more()
    assert [len(group.bundles) for group in cluster.groups] == [1, 1]
    assert not places.has_more() and len(cluster.groups) == 2
    cluster.room = 1
    assert places.has_more()
    cluster.room = 3
    assert places.take() == 3
    assert cluster.groups == []
    places.has_more()
    assert len(cluster.groups) == 1
    places.close()
    assert cluster.groups == [] and not places.has_more()


def test_a_group_of_all_workers_asks_for_none(cluster: Cluster) -> None:
    cluster.room = 4
    places = Capacity(SHARE, 4, 4)
    assert places.take() == 4
    assert not places.has_more() and cluster.groups == []
