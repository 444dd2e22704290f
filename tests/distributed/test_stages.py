"""A stage's rounds, what is left of it and when it ends, without Ray."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.commands.stages import score
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.schema import SCORES
from diffitm.distributed import stages
from diffitm.distributed.actors import StageActor, WorkerSpec
from diffitm.distributed.attempts import RETRIES, Trouble
from diffitm.distributed.session import ActorPool
from diffitm.distributed.stages import Build, ItemCounter, Stage, in_rounds, run_stage
from diffitm.store.blocks import Cost
from diffitm.store.pair_table import Left
from diffitm.store.run_summary import Done
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


class Blocks:
    """A data set of Ray Data that takes down what is asked of it."""

    def __init__(self) -> None:
        self.context, self.asked = SimpleNamespace(), dict[str, Any]()

    def repartition(self, **how: Any) -> Blocks:
        self.asked["repartition"] = how
        return self

    def map_batches(self, kind: type, **how: Any) -> Blocks:
        self.asked["map_batches"] = (kind, how)
        return self

    def write_parquet(self, folder: str, **how: Any) -> None:
        self.asked["write_parquet"] = (folder, how)


def read_blocks(monkeypatch: pytest.MonkeyPatch, module: Any) -> Blocks:
    """What Ray Data reads from now on; the progress is not watched."""
    blocks = Blocks()

    def read_parquet(paths: Any, **how: Any) -> Blocks:
        blocks.asked["read"] = (paths, how)
        return blocks

    def read_datasource(source: Any, **how: Any) -> Blocks:
        return read_parquet(source, **how)

    monkeypatch.setattr(stages.ray.data, "read_parquet", read_parquet)
    monkeypatch.setattr(stages.ray.data, "read_datasource", read_datasource)

    def watch(*given: Any, **more: Any) -> Any:
        blocks.asked["watch"] = given
        return contextlib.nullcontext()

    monkeypatch.setattr(module, "Watch", watch)
    return blocks


def assert_blocks_stay_whole(blocks: Blocks, pool: ActorPool, rows: int) -> None:
    """Read as one, cut into blocks of so many rows, of which each is an actor's batch."""
    assert blocks.asked["read"][1]["override_num_blocks"] == 1
    assert blocks.asked["repartition"] == {"target_num_rows_per_block": rows}
    kind, how = blocks.asked["map_batches"]
    assert kind is StageActor
    assert (how["batch_size"], how["batch_format"]) == (rows, "pyarrow")
    assert (how["num_cpus"], how["num_gpus"]) == (pool.cpus, pool.gpus)
    assert (how["compute"].min_size, how["compute"].max_size) == (pool.min_actors, pool.max_actors)


def test_what_ray_data_is_asked_for(
    tmp_path: Path,
    attempts: Told,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A stage goes on from a checkpoint beside its results that a kill has not spoiled."""
    blocks, mended = read_blocks(monkeypatch, stages), list[str]()
    monkeypatch.setattr(stages, "mend", mended.append)
    pool = ActorPool(2, 5, 0.5, 0.25)
    stage = a_stage(tmp_path / "out", together=7)
    build = Build(int, (), "counter")
    (tmp_path / "out").mkdir()
    Written(tmp_path / "out").write([0, 3])
    stages._execute(stage, build, pool, "attempts")
    assert_blocks_stay_whole(blocks, pool, 10)
    assert blocks.asked["read"][0] == ["in"]
    assert mended == [str(tmp_path / "checkpoint")]
    assert blocks.asked["watch"][0] is build.counter
    with caplog.at_level(logging.INFO, "diffitm"):
        blocks.asked["watch"][1](1)
    assert caplog.messages[0].startswith("embed: 3 of 5 (60%)")  # two were there before
    config = blocks.context.checkpoint_config
    assert (config.checkpoint_path, config.id_column) == (str(tmp_path / "checkpoint"), "row")
    spec, handle = blocks.asked["map_batches"][1]["fn_constructor_args"]
    assert spec == WorkerSpec(build, SCHEMA, "row", 0.25) and handle == "attempts"
    folder, how = blocks.asked["write_parquet"]
    assert folder == str(tmp_path / "out")
    assert (how["row_group_size"], how["compression"]) == (7, "NONE")


def test_what_scoring_asks_for(
    tmp_path: Path, attempts: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work table in blocks, until all of its rows are in the checkpoint; the seconds it took."""
    blocks, now = read_blocks(monkeypatch, score), [50.0]
    done = Done(pairs=6, seconds=1.0)
    monkeypatch.setattr(
        score, "start_here", lambda kind: Handle(SimpleNamespace(read=lambda: done))
    )
    asked: list[tuple[str, str]] = []
    counts = [Left(1, 3, 0), Left(0, 0, 0)]

    def remaining(table: Any, checkpoint: str) -> Left:
        asked.append((table.uri, checkpoint))
        return counts[min(len(asked) - 1, 1)]

    monkeypatch.setattr(score, "remaining", remaining)
    monkeypatch.setattr(score.time, "monotonic", lambda: now[0])
    write = blocks.write_parquet

    def write_parquet(folder: str, **how: Any) -> None:
        now[0] += 8.0
        write(folder, **how)

    monkeypatch.setattr(blocks, "write_parquet", write_parquet)
    where = SimpleNamespace(uri=str(tmp_path / "work.parquet"))
    work: Any = SimpleNamespace(table=where, checkpoint=f"{tmp_path}/c", left=Left(80, 240, 0))
    spec: Any = SimpleNamespace(cost=7, image_cost=3)
    store: Any = SimpleNamespace(model="m", uri=str(tmp_path / "scores"))
    pool = ActorPool(2, 5, 0.5, 0.25)
    assert score.score(spec, work, store, pool) == replace(done, seconds=8.0)
    assert_blocks_stay_whole(blocks, pool, 1)
    source = blocks.asked["read"][0]
    assert (source.table, source.cost, source.actors) == (where, Cost(7, 3), 2)
    config = blocks.context.checkpoint_config
    assert (config.checkpoint_path, config.id_column) == (f"{tmp_path}/c", "row")
    spec_of_actor = blocks.asked["map_batches"][1]["fn_constructor_args"][0]
    assert (spec_of_actor.schema, spec_of_actor.column, spec_of_actor.gpus) == (SCORES, "row", 0.25)
    assert (spec_of_actor.build.worker, spec_of_actor.build.arguments) == (
        score.ScoringActor,
        (spec, "m"),
    )
    assert blocks.asked["write_parquet"][0] == store.uri
    _, tell, seconds, _ = blocks.asked["watch"]
    lines = tell.__self__
    assert (lines.name, lines.total, lines.cost, lines.actors) == ("m", 240, 7, 2)
    assert seconds == 0.5
    assert set(asked) == {(where.uri, work.checkpoint)}
