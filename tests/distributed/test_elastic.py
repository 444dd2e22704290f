"""One group of training workers after the other, without Ray."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from diffitm.core.errors import InputError
from diffitm.distributed import elastic, restarts
from diffitm.distributed.elastic import ElasticTraining
from diffitm.distributed.monitor import Monitor
from tests.ranks import Handle

STEPS = 9
GONE = WorkerGroupError("..", {0: WorkerHealthCheckFailedError("..", ActorDiedError())})


class Room:
    """Room for one worker less each time; then there is more."""

    def __init__(self) -> None:
        self.free, self.more = 4, False

    def take(self) -> int:
        self.free -= 1
        return self.free

    def has_more(self) -> bool:
        return self.more


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs groups that come to such ends, on nodes of which some are still there; the training and how many
    workers each group had."""

    def run(ends: list[Any], retries: int = 0, living: set[str] = frozenset({"a"})) -> Any:  # type: ignore[assignment]
        monitor, sizes = Monitor(), list[int]()

        def run_group(plan: Any, workers: int, handle: Any) -> Any:
            sizes.append(workers)
            monitor.begin(0, "a", "node a")
            end = ends[len(sizes) - 1]
            if callable(end):
                end = end(monitor)
            if isinstance(end, Exception):
                raise end
            return SimpleNamespace(return_value=end)

        monkeypatch.setattr(elastic, "run_group", run_group)
        monkeypatch.setattr(elastic.ray, "get", lambda value: value)
        monkeypatch.setattr(elastic.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}])
        monkeypatch.setattr(restarts.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(restarts, "PATIENCE", 0)
        plan: Any = SimpleNamespace(job=SimpleNamespace(steps=STEPS))
        found = ElasticTraining(plan, Room(), Handle(monitor), retries)  # type: ignore[arg-type]
        found.restarts.living = lambda nodes: set(nodes) & living
        return found, found.to_end(), sizes

    return run


def test_a_group_after_each_loss_until_all_is_done(run: Any) -> None:
    """With as many workers as there is room for then; a lost node and a start without room are no retry."""
    no_room = ControllerError(WorkerGroupStartupTimeoutError(2))
    _, result, sizes = run([GONE, no_room, STEPS], living=set())
    assert (result.return_value, sizes) == (STEPS, [3, 2, 1])


def test_a_group_that_makes_room_for_a_larger_one(run: Any) -> None:
    _, result, sizes = run([4, STEPS])
    assert (result.return_value, sizes) == (STEPS, [3, 2])


def test_retries_are_counted(run: Any) -> None:
    with pytest.raises(
        InputError, match=r"ended 2 times .* --retries is 1; .* worker 0 on node a: "
    ):
        run([GONE, GONE, STEPS], retries=1)


def test_an_error_of_the_loop_keeps_its_traceback(run: Any) -> None:
    error = WorkerGroupError("Traceback ..", {0: ValueError("x")})
    with pytest.raises(WorkerGroupError, match=r"Traceback \.\."):
        run([error])


def test_what_a_worker_has_told_ends_the_run(run: Any) -> None:
    """Whether its group ended well or not."""

    def tells(monitor: Monitor) -> Any:
        monitor.stop("the recap does not fit")
        return GONE

    with pytest.raises(InputError, match="the recap does not fit"):
        run([tells, STEPS], retries=3)

    def stops(monitor: Monitor) -> Any:
        monitor.stop("the loss of row 3 is nan")
        return 4

    _, result, sizes = run([stops, STEPS])
    assert (result.return_value, len(sizes)) == (4, 1)


def test_ctrl_c_while_a_group_trains(run: Any) -> None:
    """Ray Train's handler exits; the one that was there before is put back."""

    def handler(number: int, frame: Any) -> None:
        raise AssertionError

    def exits(monitor: Monitor) -> Any:
        signal.signal(signal.SIGINT, handler)
        raise SystemExit

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run([exits])
    assert signal.getsignal(signal.SIGINT) is before


def test_what_is_counted_of_a_lost_group(run: Any) -> None:
    """Its nodes and its newest checkpoint; those that were up before if no worker has begun."""

    def begins_elsewhere(monitor: Monitor) -> Any:
        monitor.begin(1, "b", "node b")
        monitor.save(5)
        return GONE

    def begins_nowhere(monitor: Monitor) -> Any:
        monitor.open()
        return GONE

    found, _, sizes = run([begins_elsewhere, begins_nowhere, STEPS], retries=1)
    assert sizes == [3, 2, 1]
    one, two = found.restarts.ended
    assert (one.nodes, one.saved) == ({"a", "b"}, 5)
    assert (two.nodes, two.saved) == ({"a"}, 5)
    assert one.why.startswith("worker 0 on node a: ") and two.why.startswith("worker 0: ")


def test_a_larger_group_waits_its_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group is asked to end once it is there, old enough, and there is more room."""
    found, _, _ = run([STEPS])
    monitor: Monitor = found.monitor.actor
    found.places.more = True
    found.look()
    assert not monitor.should_end()  # between groups
    found.begun = elastic.time.monotonic()
    found.look()
    assert not monitor.should_end()
    monkeypatch.setattr(elastic, "GROW_AFTER", -1.0)
    monitor.open()
    found.look()
    assert not monitor.should_end()  # no worker has begun
    monitor.begin(0, "a", "node a")
    found.places.more = False
    found.look()
    assert not monitor.should_end()
    found.places.more = True
    found.look()
    assert monitor.should_end()
