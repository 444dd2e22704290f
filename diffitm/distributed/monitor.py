"""An actor that collects what training workers tell. Its process imports nothing heavy."""

from __future__ import annotations

Line = dict[str, float]


class Monitor:
    """Lines of the log, unreadable images, why to stop; and of the present group of workers, where they
    are and whether they should make room for a larger one."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.lost: dict[str, int] = {}
        self.stopped: str | None = None
        self.saved = 0
        self.open()

    def open(self) -> None:
        """A group of workers is about to start."""
        self.places: dict[int, tuple[str, str]] = {}
        self.room = False

    def begin(self, rank: int, node: str, name: str) -> None:
        """A worker of the group is there, on a node; `name` is that of the place."""
        self.places[rank] = (node, name)

    def group(self) -> tuple[dict[int, tuple[str, str]], int]:
        """The group's places by rank, and the update of the newest checkpoint of all groups."""
        return self.places, self.saved

    def add(self, line: Line) -> None:
        self.lines.append(line)

    def lose(self, failure: str) -> None:
        self.lost[failure] = self.lost.get(failure, 0) + 1

    def restore(self, lost: dict[str, int]) -> None:
        """What a checkpoint knows of images that were lost before it."""
        self.lost |= {failure: max(n, self.lost.get(failure, 0)) for failure, n in lost.items()}

    def save(self, step: int) -> dict[str, int]:
        """A checkpoint of that update is made: the images that were lost until now."""
        self.saved = max(self.saved, step)
        return self.lost

    def grow(self) -> None:
        """There is room for a larger group."""
        self.room = True

    def should_end(self) -> bool:
        """Whether the group should end with a checkpoint, for a larger one to go on."""
        return self.room

    def stop(self, why: str) -> None:
        self.stopped = self.stopped or why

    def read(self) -> list[Line]:
        found, self.lines = self.lines, []
        return found

    def end(self) -> tuple[dict[str, int], str | None]:
        return self.lost, self.stopped
