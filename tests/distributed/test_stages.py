"""A stage's rounds, what is left of it and when it ends, without Ray."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed import stages
from diffitm.distributed.attempts import RETRIES, Trouble
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import Build, ItemCounter, Stage, in_rounds, run_stage
from tests.ranks import Handle

SCHEMA = pa.schema([("position", pa.int64()), ("value", pa.string())])
TROUBLES = {"node A": Trouble(2, 1, "OSError: busy"), "node B": Trouble(1, 0, "CUDA error")}


class Told:
    """What Attempts has heard."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.troubles = error, dict[str, Trouble]()

    def read_error(self) -> Exception | None:
        return self.error

    def read_troubles(self) -> dict[str, Trouble]:
        return self.troubles


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Told:
    told, made = Told(), list[Any]()

    def start_here(kind: type, *arguments: Any) -> Any:
        made.append((kind, arguments))
        return Handle(told)

    monkeypatch.setattr(stages, "start_here", start_here)
    monkeypatch.setattr(stages.ray, "get", lambda value: value)
    monkeypatch.setattr(stages.gc, "collect", lambda: 0)  # half a second
    told.made = made  # type: ignore[attr-defined]
    return told


def rounds(left: list[int]) -> tuple[Callable[[Any], None], Callable[[], int], list[int]]:
    """What runs a round, how many rows are left before the first and after each, the rounds run."""
    done: list[int] = []
    return (
        lambda handle: done.append(len(done)),
        lambda: left[min(len(done), len(left) - 1)],
        done,
    )


def test_rounds_go_on_until_nothing_is_left(
    attempts: Told, caplog: pytest.LogCaptureFixture
) -> None:
    """Others do what failed; at the end each place in trouble is named."""
    attempts.troubles = TROUBLES
    execute, left, done = rounds([9, 1_234, 0])
    with caplog.at_level(logging.WARNING, "diffitm"):
        in_rounds("embed", execute, left, 3)
    assert len(done) == 2
    assert attempts.made == [(stages.Attempts, (3,))]  # type: ignore[attr-defined]
    assert caplog.messages == [
        "embed: 1,234 rows were left to others; another round does them",
        "embed: 2 failures on node A, the last: OSError: busy; others did its rows",
        "embed: 1 failure on node B, the last: CUDA error; others did its rows",
    ]


def test_rounds_that_get_nothing_done_end(attempts: Told) -> None:
    """Only so many in a row: a round that does something begins the count anew."""
    execute, left, done = rounds([9, *[9] * RETRIES, 8])
    attempts.troubles = TROUBLES
    with pytest.raises(Unavailable) as caught:
        in_rounds("embed", execute, left, 1)
    assert len(done) == RETRIES + 1 + RETRIES + 1
    assert str(caught.value) == (
        "embed: 8 rows could not be done anywhere. 2 failures on node A, the last: OSError: busy; "
        "1 failure on node B, the last: CUDA error"
    )


def test_an_actors_own_error_ends_the_rounds(attempts: Told) -> None:
    """Instead of the traceback that Ray makes of it."""

    def execute(handle: Any) -> None:
        raise RuntimeError("a traceback of Ray")

    with pytest.raises(RuntimeError, match="a traceback of Ray"):
        in_rounds("embed", execute, lambda: 5, 1)
    attempts.error = InputError("no such column")
    with pytest.raises(InputError, match="no such column"):
        in_rounds("embed", execute, lambda: 5, 1)


POOL = ActorPool(2, 8, 1.0, 0.0)


class Written:
    """Stands in for a run through the actors: writes the positions of the next round."""

    def __init__(self, folder: Path, *rounds: list[int]) -> None:
        self.folder, self.rounds, self.pools = folder, list(rounds), list[ActorPool]()
        self.builds: list[Build] = []

    def __call__(self, stage: Stage, build: Build, pool: ActorPool, attempts: Any) -> None:
        self.pools.append(pool)
        self.builds.append(build)
        self.write(self.rounds.pop(0))

    def write(self, positions: list[int]) -> None:
        lines = [{"position": position, "value": ""} for position in positions]
        table = pa.Table.from_pylist(lines, SCHEMA)
        self.folder.mkdir(exist_ok=True)
        parquet.write_table(table, self.folder / f"{len(list(self.folder.iterdir()))}.parquet")


def a_stage(folder: Path, **more: Any) -> Stage:
    stage = Stage("embed", str(folder), SCHEMA, ["in"], "row", 10, 4, total=5)
    return stage._replace(**more)


def test_a_stage_runs_until_it_is_whole(
    tmp_path: Path, attempts: Told, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """With no more actors than blocks; what a kill cut off is not counted, what is done is not done
    again."""
    out = tmp_path / "out"
    written = Written(out, [2, 3], [4])
    written.write([0, 1])
    (out / "cut.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(stages, "_execute", written)
    with caplog.at_level(logging.INFO, "diffitm"):
        run_stage(a_stage(out), int, ("a", 1), POOL)
        assert written.pools == [replace(POOL, max_actors=4)] * 2
        assert (written.builds[0].worker, written.builds[0].arguments) == (int, ("a", 1))
        run_stage(a_stage(out), int, (), POOL)
    assert caplog.messages == [
        "embed: going on where it stopped, 2 of 5",
        "embed: 3 to do",
        "embed: 1 rows were left to others; another round does them",
        "embed: all 5 are done already",
    ]
    assert attempts.made[0] == (stages.Attempts, (2,))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("blocks", "pool", "sizes"), [(1, POOL, (1, 1)), (40, POOL, (2, 8)), (3, POOL, (2, 3))]
)
def test_actors_of_a_stage(
    tmp_path: Path,
    attempts: Told,
    monkeypatch: pytest.MonkeyPatch,
    blocks: int,
    pool: ActorPool,
    sizes: tuple[int, int],
) -> None:
    written = Written(tmp_path / "out", [0, 1, 2, 3, 4])
    monkeypatch.setattr(stages, "_execute", written)
    run_stage(a_stage(tmp_path / "out", blocks=blocks), int, (), pool)
    assert [(p.min_actors, p.max_actors) for p in written.pools] == [sizes]


def test_a_position_that_is_there_twice(
    tmp_path: Path, attempts: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is no other one's; where all are there and some twice, the folder is of no use."""
    written = Written(tmp_path / "out", [0, 1, 1, 2, 3], [4])
    monkeypatch.setattr(stages, "_execute", written)
    with pytest.raises(InputError, match=r"out holds 6 of 5: delete it, run again"):
        run_stage(a_stage(tmp_path / "out"), int, (), POOL)
    assert written.rounds == []


def test_progress_counts_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In 10 s 20 of 100 items beside 40: 2 a second, 20 s for the other 40."""
    now = [100.0]
    monkeypatch.setattr(stages.time, "monotonic", lambda: now[0])
    tell = stages._lines(a_stage(tmp_path, total=100), 40)
    now[0] = 110.0
    with caplog.at_level(logging.INFO, "diffitm"):
        tell(0)
        tell(20)
        tell(70)  # a block that was done twice
    assert caplog.messages == [
        "embed: 60 of 100 (60%), 2/s, 20 s left",
        "embed: 100 of 100 (100%), 7/s, 1 s left",
    ]


def test_what_actors_are_built_of() -> None:
    counter = ItemCounter()
    counter.add(2)
    counter.add(3)
    assert counter.read() == 5
    assert Build(lambda *given: given, ("a", "b"), counter)("cuda") == ("a", "b", "cuda", counter)  # type: ignore[arg-type]


def test_a_checkpoint_stays(tmp_path: Path) -> None:
    """Under the id's column, for the next run to go on from."""
    config = stages.checkpoint(str(tmp_path / "c"), "row")
    assert (config.id_column, config.delete_checkpoint_on_success) == ("row", False)
    assert config.checkpoint_path == str(tmp_path / "c")
