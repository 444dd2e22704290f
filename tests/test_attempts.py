"""What ends its process time and again is named, and a wait says what it is for."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from diffitm.distributed import attempts, progress
from diffitm.distributed.attempts import Attempts, Bounded
from diffitm.errors import InputError

TABLE = pa.table({"row": [7, 8, 9]})


class Here:
    """Attempts as Ray's handle of them, in this process."""

    def __init__(self) -> None:
        self.nodes = ["a node"]  # the last one lives
        found = Attempts()
        self.begun = found.begun
        self.begin, self.end = (SimpleNamespace(remote=f) for f in (found.begin, found.end))


class Killed(BaseException):
    """The process has ended."""


class Deadly:
    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, table: pa.Table) -> pa.Table:
        self.times -= 1
        if self.times >= 0:
            raise Killed
        return table


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    found = Here()
    context = SimpleNamespace(get_actor_id=lambda: "an actor", get_node_id=lambda: found.nodes[-1])
    fake = SimpleNamespace(get=lambda value: value, get_runtime_context=lambda: context)
    fake.nodes = lambda: [{"NodeID": n, "Alive": n == found.nodes[-1]} for n in found.nodes]
    monkeypatch.setattr(attempts, "ray", fake)
    return found


def run(actor: Bounded) -> Any:
    """The block, by actors that are started again."""
    while True:
        try:
            return actor(TABLE)
        except Killed:
            continue


def test_a_block_may_end_its_process_three_times(here: Here) -> None:
    assert run(Bounded(Deadly, (3,), here, "row")) == TABLE
    assert not here.begun


def test_the_fourth_time_is_the_last(here: Here) -> None:
    with pytest.raises(InputError, match=r"^row 7 and the 2 after it: ended its process 4 times"):
        run(Bounded(Deadly, (4,), here, "row"))


def lose(here: Here, times: int) -> None:
    """Nodes that go away, each with the block."""
    for number in range(times):
        here.nodes.append(f"node {len(here.nodes) + number}")
        with pytest.raises(Killed):
            Bounded(Deadly, (1,), here, "row")(TABLE)


def test_nodes_that_go_do_not_count(here: Here) -> None:
    lose(here, 6)
    assert run(Bounded(Deadly, (2,), here, "row")) == TABLE


def test_what_takes_node_after_node_ends(here: Here) -> None:
    lose(here, attempts.MOST)
    with pytest.raises(InputError, match=r"^row 7 and the 2 after it: was lost 20 times"):
        Bounded(Deadly, (0,), here, "row")(TABLE)


def test_a_start_that_ends_its_process(here: Here) -> None:
    def start() -> None:
        raise Killed

    for _ in range(4):
        with pytest.raises(Killed):
            Bounded(start, (), here, "row")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the start of an actor: ended its process 4 times"):
        Bounded(start, (), here, "row")  # type: ignore[arg-type]


def test_silence_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """After a minute without news and again each minute, with what there is; not after news."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    watch = progress.Watch(None, lambda _: None, standing=lambda: "3 processors")
    caplog.set_level(logging.INFO, "diffitm")
    for second, found in ((0, 1), (59, 1), (61, 1), (90, 1), (122, 1), (150, 2), (200, 2)):
        now[0] = second
        watch._tell_silence(found)
    text = "no news of the actors for %s: the cluster has 3 processors"
    assert caplog.messages == [text % "1 min 1 s", text % "2 min 2 s"]
