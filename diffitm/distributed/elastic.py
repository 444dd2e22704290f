"""Groups of training workers, one after the other: a lost one is followed by the next, a small one by a
larger one when there is room."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import Result, TrainingFailedError

from diffitm.core.errors import InputError
from diffitm.distributed.capacity import Capacity
from diffitm.distributed.restarts import Group, Restarts
from diffitm.distributed.worker_group import (
    GroupSettings,
    describe_end,
    has_no_room,
    is_own_error,
    run_group,
)

log = logging.getLogger("diffitm")
GROW_AFTER = 60.0  # seconds that a group trains before a larger one takes over


class ElasticTraining:
    """Runs groups of as many workers as `places` has room for, until all updates of the plan are done."""

    def __init__(self, plan: GroupSettings, places: Capacity, monitor: Any, retries: int) -> None:
        self.plan, self.places, self.monitor = plan, places, monitor
        self.restarts = Restarts(retries)
        self.begun: float | None = None  # when the present group was

    def to_end(self) -> Result:
        """The last group's result. Raises InputError if workers were lost too often, or if they have told
        why they failed."""
        result = None
        while result is None:
            result = self._run_group()
        return result

    def look(self) -> None:
        """Ask for more room once the present group is there, and let it end when that is found."""
        begun = self.begun
        if begun is None or not ray.get(self.monitor.group.remote())[0]:
            return
        if self.places.has_more() and time.monotonic() - begun > GROW_AFTER:
            self.monitor.grow.remote()

    def _run_group(self) -> Result | None:
        """Its result, None if another group is to go on."""
        count = self.places.take()
        ray.get(self.monitor.open.remote())
        before = frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])
        self.begun = time.monotonic()
        try:
            with _interruptible():
                result = run_group(self.plan, count, self.monitor)
        except (TrainingFailedError, RayError) as error:
            if not has_no_room(error):
                self._count(error, before)
            return None
        finally:
            self.begun = None
        _, stopped = ray.get(self.monitor.end.remote())
        if stopped is not None or result.return_value == self.plan.job.steps:
            return result
        log.info("update %s: there is room for more workers than %d", result.return_value, count)
        return None

    def _count(self, error: Exception, before: frozenset[str]) -> None:
        """A group of nodes among those that were there `before` has ended. Raises what the run ends with,
        if it does."""
        _, stopped = ray.get(self.monitor.end.remote())
        if stopped is not None:
            raise InputError(stopped) from error
        places, saved = ray.get(self.monitor.group.remote())
        nodes = frozenset(node for node, _ in places.values()) or before
        try:
            self.restarts.count(Group(nodes, saved, describe_end(error, places)))
        except InputError as ending:
            if not is_own_error(error):
                raise ending from error
            log.error("%s", ending)
            raise error from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes KeyboardInterrupt of the exit that Ray Train's own handler makes of Ctrl-C, and puts back the
    handler that was there."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():  # a trial of a sweep is not in it
            signal.signal(signal.SIGINT, handler)
