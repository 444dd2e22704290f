"""What a scoring actor counts, how long its blocks are, and what the log says of the time left."""

from __future__ import annotations

import logging
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from diffitm.commands.stages import score
from diffitm.commands.stages.score import ScoringActor, ScoringCounter, _block_rows, _Lines
from diffitm.core.schema import SCORES
from diffitm.distributed.session import ActorPool
from diffitm.scoring.batching import Batch
from diffitm.store.pair_table import Left
from diffitm.store.run_summary import Done
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


def an_actor(
    monkeypatch: pytest.MonkeyPatch, batches: list[Batch]
) -> tuple[ScoringActor, ScoringCounter, list[float]]:
    clock, counter = [10.0], ScoringCounter()
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
    rows = pa.table(
        {
            "row": [4, 5],
            "image": ["a", "b"],
            "texts": [["x", "bad"], ["y"]],
            "stored": pa.nulls(2),
            "more": [1, 2],
        }
    )
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


def test_time_in_which_images_are_waited_for_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is counted by itself, and that of a try that failed not with the block's."""
    actor, counter, clock = an_actor(monkeypatch, [])
    scorer: Any = actor.scorer
    rows = pa.table({"row": [4], "image": ["a"], "texts": [["x"]], "stored": pa.nulls(1)})
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
    actor(pa.table({"row": [4], "image": ["a"], "texts": [["x"]], "stored": pa.nulls(1)}))
    assert (counter.read().inside, counter.read().batch_size) == (0, 0)


@pytest.mark.parametrize(
    ("rows", "pairs", "cost", "actors", "expected"),
    [
        (10_000, 10_000, 1, 4, 32),  # the most rows
        (100, 100, 1, 4, 4),  # 8 blocks for each actor, rounded up
        (10_000, 20_000, 100, 4, 25),  # 200 forwards a row, 5000 a block
        (3, 3, 1, 4, 1),
        (10_000, 10_000, 10**6, 4, 1),
    ],
)
def test_rows_of_a_block(rows: int, pairs: int, cost: int, actors: int, expected: int) -> None:
    work: Any = SimpleNamespace(left=Left(rows, pairs, 0))
    assert _block_rows(work, cost, ActorPool(actors, 99, 1.0, 0.0)) == expected


def test_lines_of_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An estimate once all actors are up, then every 10 s pairs, rate and time left."""
    now = [100.0]
    monkeypatch.setattr(score.time, "monotonic", lambda: now[0])
    lines = _Lines("m", pairs_left=1000, cost=COST, actors=2)
    with caplog.at_level(logging.INFO, "diffitm"):
        lines.tell(Done())
        lines.tell(Done(actors=1, rate=35.0))
        assert caplog.messages == []
        lines.tell(Done(actors=2, rate=70.0))
        now[0] = 109.9
        lines.tell(Done(actors=2, rate=70.0, pairs=50))
        now[0] = 110.0
        lines.tell(Done(actors=2, rate=70.0, pairs=100))
        now[0] = 119.0
        lines.tell(Done(actors=2, rate=70.0, pairs=200))
        now[0] = 120.0
        lines.tell(Done(actors=2, rate=70.0, pairs=300))
    assert caplog.messages == [
        "m: 2 of 2 actors up, 35 forwards/s each: about 1 min 40 s",
        "m: 100 of 1,000 pairs (10%), 70 forwards/s, 1 min 30 s left",
        "m: 300 of 1,000 pairs (30%), 105 forwards/s, 47 s left",
    ]


def test_an_estimate_without_all_actors(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As many looks after the first actor; it counts on the others."""
    lines = _Lines("m", pairs_left=1000, cost=COST, actors=4)
    with caplog.at_level(logging.INFO, "diffitm"):
        for _ in range(score.PATIENCE):
            lines.tell(Done(actors=1, rate=35.0))
        assert caplog.messages == []
        lines.tell(Done(actors=1, rate=35.0))
    assert caplog.messages == ["m: 1 of 4 actors up, 35 forwards/s each: about 50 s"]


def test_smaller_batches_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    lines = _Lines("m", 1000, COST, 2)
    lines.tell_smaller(Done(smaller=("batch size 8", "batch size 8")))
    lines.tell_smaller(Done(smaller=("batch size 8", "batch size 4")))
    text = "m: an actor ran out of GPU memory, "
    assert caplog.messages == [f"{text}batch size 8", f"{text}batch size 4"]
