"""An actor that collects what training workers tell. Its process imports nothing heavy."""

from __future__ import annotations

Line = dict[str, float]


class Monitor:
    """Lines of the log, unreadable images, why to stop."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.lost: dict[str, int] = {}
        self.stopped: str | None = None

    def add(self, line: Line) -> None:
        self.lines.append(line)

    def lose(self, failure: str) -> None:
        self.lost[failure] = self.lost.get(failure, 0) + 1

    def restore(self, lost: dict[str, int]) -> None:
        """What a checkpoint knows of images that were lost before it."""
        self.lost |= {failure: max(n, self.lost.get(failure, 0)) for failure, n in lost.items()}

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def read(self) -> list[Line]:
        found, self.lines = self.lines, []
        return found

    def end(self) -> tuple[dict[str, int], str | None]:
        return self.lost, self.stopped
