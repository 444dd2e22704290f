"""What a scoring actor counts, how long its blocks are, and what the log says of the time left."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.commands.stages import score
from diffitm.commands.stages.score import BlockSource, ScoringActor, ScoringCounter, _Lines
from diffitm.core.schema import BLOCK, SCORES, WORK
from diffitm.scoring.batching import Batch
from diffitm.store.blocks import LEAST_SECONDS, Cost
from diffitm.store.pair_table import Left, WorkTable
from diffitm.store.run_summary import Done, summarise
from tests.ranks import Handle

COST = 7  # forwards of a pair


class Waiting:
    """A stopwatch."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def spent(self) -> float:
        found, self.seconds = self.seconds, 0.0
        return found


class Scorer:
    """Takes three seconds for a block, and waits for images for as long as `waits` says; a text 'bad'
    fails."""

    cost = COST

    def __init__(self, clock: list[float], batches: list[Batch]) -> None:
        self.clock, self.batches = clock, batches
        self.loading, self.waits = Waiting(), 0.0

    def measure_rate(self) -> float:
        return 50.0

    def score(self, rows: list[Any]) -> list[dict[str, Any]]:
        self.clock[0] += 3.0 + self.waits
        self.loading.seconds += self.waits
        if self.waits < 0:
            raise ConnectionError
        empty = dict.fromkeys(SCORES.names)
        return [
            {**empty, "row": r.row, "image": r.image, "text": text}
            | {"failure": "unreadable" if text == "bad" else None}
            for r in rows
            for text in r.texts
        ]


def a_block(**columns: Any) -> pa.Table:
    return pa.Table.from_pylist([{"row": 4, "stored": None, **columns}], BLOCK)


def an_actor(
    monkeypatch: pytest.MonkeyPatch, batches: list[Batch]
) -> tuple[ScoringActor, ScoringCounter, list[float]]:
    clock, counter = [10.0], ScoringCounter()
    monkeypatch.setattr(score.ray, "get", lambda found: found)
    shown: list[Done] = []
    monkeypatch.setattr(score.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(
        score, "Metrics", lambda name: SimpleNamespace(add=shown.append, shown=shown)
    )
    monkeypatch.setattr(score, "gpu_memory", lambda device: 99 if device == "cuda" else 0)
    spec: Any = SimpleNamespace(build=lambda device: Scorer(clock, batches))
    return ScoringActor(spec, "m", "cuda", Handle(counter)), counter, clock


@pytest.mark.parametrize(
    ("line", "finite"),
    [
        ({"l2": np.array([1.0, 2.0]), "similarity": None}, True),
        ({"l2": np.array([1.0, np.nan]), "similarity": None}, False),
        ({"l2": None, "similarity": math.inf}, False),
        ({"l2": None, "similarity": 0.5}, True),
        ({"l2": None, "similarity": None}, True),  # failed, which is counted by itself
    ],
)
def test_scores_that_are_no_numbers(line: dict[str, Any], finite: bool) -> None:
    assert score.is_finite(line) == finite


def test_what_an_actor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that failed took no forward; it waited between blocks."""
    batch = Batch(16)
    actor, counter, clock = an_actor(monkeypatch, [batch])
    assert counter.read() == Done(actors=1, rate=50.0)
    monkeypatch.setattr(batch, "spent", lambda: 2.5)
    rows = a_block(images=["a", "b"], texts=[["x", "bad"], ["y"]])
    rows = rows.append_column("more", [[1]])
    clock[0] = 14.0
    found = actor(rows)
    assert found.schema == SCORES
    assert found["text"].to_pylist() == ["x", "bad", "y"]
    clock[0] += 1.0
    actor(rows)
    assert counter.read() == Done(
        actors=1, rate=50.0, begun=2, finished=2, pairs=6, failures=2, forwards=4 * COST, busy=6.0,
        waited=5.0, inside=5.0, memory=99, batch_size=16,
    )  # fmt: skip
    metrics: Any = actor.metrics
    assert [part.forwards for part in metrics.shown] == [2 * COST] * 2
    batch.tell("batch size 8")
    assert counter.read().smaller == ("batch size 8",)


def test_a_model_that_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The actor tells the cause, the driver logs it once for all actors; the summary counts them."""
    compiled = SimpleNamespace(tell=None)
    monkeypatch.setattr(Scorer, "compiled", compiled, raising=False)
    _, counter, _ = an_actor(monkeypatch, [])
    tell: Any = compiled.tell
    for _ in range(2):
        tell("RuntimeError: no compiler")
    lines = _Lines("m", Left(500, 1000, 0), Cost(COST), 2, 2)
    lines.tell(counter.read())
    lines.tell_troubles(counter.read())
    assert caplog.messages == ["m: --compile failed, so it runs without: RuntimeError: no compiler"]
    assert summarise("m", counter.read()).not_compiled == 2


def test_pairs_that_are_no_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of them, by image and text."""
    actor, counter, _ = an_actor(monkeypatch, [])
    scorer: Any = actor.scorer

    def score_nan(rows: list[Any]) -> list[dict[str, Any]]:
        lines = Scorer.score(scorer, rows)
        return [line | {"l2": np.array([np.nan])} for line in lines]

    scorer.score = score_nan
    for image in ("a.png", "b.png"):
        texts = ["x", "y" * 99]
        actor(a_block(images=[image], texts=[texts]))
    done = counter.read()
    assert done.not_finite == 4
    assert done.strange == ("a.png with 'x'", f"a.png with '{'y' * 59}", "b.png with 'x'")


def test_time_in_which_images_are_waited_for_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted by itself, and that of a try that failed not with the block's."""
    actor, counter, clock = an_actor(monkeypatch, [])
    scorer: Any = actor.scorer
    rows = a_block(images=["a"], texts=[["x"]])
    clock[0] += 1.0
    scorer.waits = -7.0
    with pytest.raises(ConnectionError):
        actor(rows)
    scorer.waits = 0.75
    clock[0] += 4.0
    actor(rows)
    done = counter.read()
    assert (done.waited, done.loading, done.busy) == (1.0, 0.75, 3.0)


def test_a_model_without_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    actor, counter, _ = an_actor(monkeypatch, [])
    actor(a_block(images=["a"], texts=[["x"]]))
    assert (counter.read().inside, counter.read().batch_size) == (0, 0)


def test_a_rate_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors that come up later take that of the others."""
    _, counter, _ = an_actor(monkeypatch, [])
    monkeypatch.setattr(Scorer, "measure_rate", lambda self: 1 / 0)
    spec: Any = SimpleNamespace(build=lambda device: Scorer([0.0], []))
    ScoringActor(spec, "m", "cuda", Handle(counter))
    assert counter.read() == Done(actors=2, rate=100.0)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BlockSource:
    """Of eight pairs of four images; an actor comes up at the third look."""
    pairs = [{"image": image, "text": text, "stored": None} for image in "abcd" for text in "xy"]
    table = WorkTable(str(tmp_path / "work.parquet"), 4, 8, 0)
    parquet.write_table(pa.Table.from_pylist(pairs, WORK), table.uri)
    looks = iter([Done(), Done(), Done(actors=2, rate=2 * 8 / LEAST_SECONDS)])
    monkeypatch.setattr(score.ray, "get", lambda found: found)
    monkeypatch.setattr(score, "LOOKS", 0.0)
    counter = Handle(SimpleNamespace(read=lambda: next(looks)))
    attempts = Handle(SimpleNamespace(has_trouble=lambda: False))
    return BlockSource(table, Cost(4), 2, counter, attempts)


def read(source: BlockSource) -> list[list[str]]:
    """The images of each block."""
    (task,) = source.get_read_tasks(1)
    return [line["images"] for table in task() for line in table.to_pylist()]


def test_blocks_are_cut_once_an_actor_is_up(source: BlockSource) -> None:
    """By its rate; a later read takes them as they are, whatever the rate is."""
    assert read(source) == [["a"], ["b"], ["c"], ["d"]]
    source.counter = None
    assert read(source) == [["a"], ["b"], ["c"], ["d"]]


def test_blocks_do_not_wait_for_actors_that_fail(source: BlockSource) -> None:
    """One of them ends the run, with the block that it is given."""
    source.counter = Handle(SimpleNamespace(read=Done))
    troubles = iter([False, True])
    source.attempts = Handle(SimpleNamespace(has_trouble=lambda: next(troubles)))
    assert {image for images in read(source) for image in images} == set("abcd")


def test_a_clip_is_told_in_images(caplog: pytest.LogCaptureFixture) -> None:
    lines = _Lines("m", Left(1000, 3000, 0), Cost(1, 64), actors=1, most=1)
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.tell(Done(actors=1, rate=640.0))
    assert caplog.messages == ["m: 1 of 1 actors up, 10 images/s each: about 1 min 45 s"]


def test_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An estimate once all actors are up, then every 10 s pairs, rate and time left, by the actors' time in
    blocks that are done; one that was lost and replaced is not a third."""
    now = [100.0]
    monkeypatch.setattr(score.time, "monotonic", lambda: now[0])
    lines = _Lines("m", Left(500, 1000, 0), Cost(COST), actors=2, most=2)
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.tell(Done())
        lines.tell(Done(actors=1, rate=35.0))
        assert caplog.messages == []
        lines.tell(Done(actors=2, rate=70.0))
        now[0] = 109.9
        lines.tell(Done(actors=2, rate=70.0, pairs=50, busy=10.0))
        now[0] = 110.0
        lines.tell(Done(actors=2, rate=70.0, pairs=100, busy=16.0, loading=3.0, waited=1.0))
        now[0] = 119.0
        lines.tell(Done(actors=2, rate=70.0, pairs=200, busy=30.0))
        now[0] = 120.0
        lines.tell(Done(actors=3, rate=105.0, pairs=300, busy=40.0))
    assert caplog.messages == [
        "m: 2 of 2 actors up, 35 forwards/s each: about 1 min 40 s",
        "m: 100 of 1,000 pairs (10%), 70 forwards/s, 1 min 30 s left",
        "m: 300 of 1,000 pairs (30%), 105 forwards/s, 47 s left",
    ]


def test_an_estimate_without_all_actors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As many looks after the first actor; it counts on the others."""
    lines = _Lines("m", Left(500, 1000, 0), Cost(COST), actors=4, most=4)
    with caplog.at_level(logging.INFO, "diffitm"):
        for _ in range(score.PATIENCE):
            lines.tell(Done(actors=1, rate=35.0))
        assert caplog.messages == []
        lines.tell(Done(actors=1, rate=35.0))
    assert caplog.messages == ["m: 1 of 4 actors up, 35 forwards/s each: about 50 s"]


def test_smaller_batches_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lines = _Lines("m", Left(500, 1000, 0), Cost(COST), 2, 2)
    lines.tell_troubles(Done(smaller=("batch size 8", "batch size 8")))
    lines.tell_troubles(Done(smaller=("batch size 8", "batch size 4")))
    text = "m: an actor ran out of GPU memory, "
    assert caplog.messages == [f"{text}batch size 8", f"{text}batch size 4"]
