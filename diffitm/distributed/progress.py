"""Progress of what actors do: watched from the driver, told in lines with the time left."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

REPORT_EVERY = 10.0  # seconds


class Watch(threading.Thread):
    """While the block runs, passes `actor.read()` to `tell` every so many seconds."""

    def __init__(
        self, actor: Any, tell: Callable[[Any], None], seconds: float = REPORT_EVERY
    ) -> None:
        super().__init__(daemon=True)
        self.actor, self.tell, self.seconds = actor, tell, seconds
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
                self.tell(ray.get(self.actor.read.remote(), timeout=30))
            except ray.exceptions.GetTimeoutError:
                continue
            except ray.exceptions.RayError:
                return


def clock(seconds: float) -> str:
    """'45 s', '3 min 20 s', '2 h 5 min'."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
