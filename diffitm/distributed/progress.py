"""Progress of what actors do: watched from the driver, told in lines with the time left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("diffitm")
REPORT_EVERY = 10.0  # seconds
SILENCE = 60.0  # seconds without news of the actors after which there is a line, and then again


class Watch(threading.Thread):
    """While the block runs, passes `actor.read()` to `tell` every so many seconds.

    Where that stays the same for long, logs so, with `standing()`: what there is to wait for.
    """

    def __init__(
        self,
        actor: Any,
        tell: Callable[[Any], None],
        seconds: float = REPORT_EVERY,
        standing: Callable[[], str] | None = None,
    ) -> None:
        super().__init__(daemon=True)
        self.actor, self.tell, self.seconds, self.standing = actor, tell, seconds, standing
        self.last: Any = None
        self.since = self.told = time.monotonic()
        self.stopped = threading.Event()

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        import ray

        while not self.stopped.wait(self.seconds):
            try:
                found = ray.get(self.actor.read.remote(), timeout=30)
                self.tell(found)
                self._tell_silence(found)
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return

    def _tell_silence(self, found: Any) -> None:
        now = time.monotonic()
        if found != self.last:
            self.last, self.since, self.told = found, now, now
        elif self.standing and now - self.told >= SILENCE:
            self.told = now
            silent = clock(now - self.since)
            log.info("no news of the actors for %s: the cluster has %s", silent, self.standing())


def clock(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min'."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
