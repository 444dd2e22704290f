"""Faults of a cluster in the middle of a run: every pair is scored once, with the same scores."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import pipeline
from tests.faults.disturb import WAIT, Disturbed, assert_same, scores, until
from tests.traced import Block, read_trace

pytestmark = pytest.mark.slow
IMAGES, ACTORS = 60, 2
tried: Counter[str] = Counter()
survived: Counter[str] = Counter()


@contextmanager
def disturbed(folder: Path, **options: int) -> Iterator[Disturbed]:
    """A run that has written a fifth of its images."""
    run = Disturbed(folder, ACTORS, **options)
    try:
        run.committed(IMAGES // 5)
        yield run
    finally:
        run.close()


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[dict]:
    with disturbed(tmp_path_factory.mktemp("undisturbed")) as run:
        run.finish()
    found = scores(run.out)
    assert sorted(run.computed()) == sorted(found)
    yield found
    counts = ", ".join(f"{kind} {survived[kind]} of {tried[kind]}" for kind in tried)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        request.config.get_terminal_writer().line(f"\nfaults survived: {counts}")


def check(kind: str, run: Disturbed, undisturbed: dict[Any, Any], hit: list[Block]) -> None:
    """The same scores; computed again was no more than a block an actor besides what was hit."""
    assert_same(scores(run.out), undisturbed)
    computed = run.computed()
    assert set(computed) == set(undisturbed)
    assert len(computed) - len(undisturbed) <= len(hit) * run.block
    survived[kind] += 1


def test_actor_killed(undisturbed: dict, tmp_path: Path) -> None:
    """It costs the block that it was at; what others had finished is not computed again."""
    tried["actor killed"] += 1
    with disturbed(tmp_path) as run:
        hit = run.kill_actor()
        run.finish()
    (lost,) = read_trace(run.trace, "busy")
    assert lost == hit
    check("actor killed", run, undisturbed, [])


@pytest.mark.long
def test_node_removed(undisturbed: dict, tmp_path: Path) -> None:
    """It costs the block that its actor was at, and one that was not yet written."""
    tried["node removed"] += 1
    with disturbed(tmp_path, spare=1) as run:
        hit = run.remove_node()
        run.finish()
    assert hit in read_trace(run.trace, "busy")
    after = [b for b in read_trace(run.trace) if b.time > hit.time]
    assert hit.node not in {b.node for b in after}
    assert len({b.process for b in after}) >= ACTORS
    check("node removed", run, undisturbed, [hit])


@pytest.mark.long
def test_driver_killed(undisturbed: dict, tmp_path: Path) -> None:
    """The same command goes on; each actor's block is computed again, and one not yet written."""
    tried["driver killed"] += 1
    with disturbed(tmp_path) as run:
        hit = run.kill_driver()
        run.process = run.start()
        run.finish()
    check("driver killed", run, undisturbed, [hit] * ACTORS)


@pytest.mark.long
def test_node_added(undisturbed: dict, tmp_path: Path) -> None:
    """The pool grows onto it."""
    tried["node added"] += 1
    with disturbed(tmp_path, max_actors=ACTORS + 1) as run:
        run.hold.touch()
        node = run.add_node().node_id
        until(lambda: node in {b.node for b in run.busy()}, "no actor came up there")
        run.hold.unlink()
        run.finish()
    assert node in {b.node for b in read_trace(run.trace)}
    check("node added", run, undisturbed, [])


@pytest.mark.long
def test_small_object_store(tmp_path: Path) -> None:
    """More goes through the nodes' object stores than they hold: 1,000 errors of three kinds a pair."""
    tried["object store small"] += 1
    pairs, timesteps = 24_000, 1000
    options = {"actors": 2, "nodes": 2, "pairs": pairs, "texts": 50, "seconds": 0}
    figures = large(tmp_path / "out", **options, timesteps=timesteps, object_store=80)
    assert figures["pairs"] == pairs
    assert 150 < figures["object_store"] < 170
    assert pairs * timesteps * 12 / 2**20 > 1.5 * figures["object_store"]
    survived["object store small"] += 1


@pytest.mark.long
def test_actors_do_not_wait(tmp_path: Path) -> None:
    """Of 16 actors that sleep 50 ms a pair, at most 10% of the time, once they are all up."""
    figures = large(tmp_path / "out", actors=16, pairs=20_000)
    assert figures["actors"] == 16
    assert figures["waiting"] <= 0.1
    first = next(memory for done, memory in figures["curve"] if done >= 10_000)
    assert figures["curve"][-1][1] - first < 200


def large(out: Path, **options: float) -> dict[str, Any]:
    """The figures of tests.faults.large; it checks every pair and its score itself."""
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    call = [sys.executable, "-m", "tests.faults.large", *given, f"--out={out}"]
    env = pipeline.environment(PYTHONPATH=str(pipeline.ROOT))
    done = subprocess.run(
        call, capture_output=True, text=True, timeout=WAIT, cwd=pipeline.ROOT, env=env
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "figures.json").read_text())


def test_a_row_that_ends_its_process_ends_the_run(tmp_path: Path) -> None:
    """It is tried four times and named; what was done beside it stays."""
    out, trace = tmp_path / "out", tmp_path / "trace"
    out.mkdir()
    trace.mkdir()
    poison = "clevr/images/SHAPES_val_000030.png"
    call = [sys.executable, "-m", "tests.traced", str(out), str(trace), "2", f"--poison={poison}"]
    env = pipeline.environment(PYTHONPATH=str(pipeline.ROOT))
    done = subprocess.run(
        call, capture_output=True, text=True, timeout=WAIT, cwd=pipeline.ROOT, env=env
    )
    assert done.returncode
    lost = [block.pairs for block in read_trace(trace, "busy") if poison in dict(block.pairs)]
    assert len(lost) == 4
    images = dict(lost[0])
    text = f"of {len(images)} images from {next(iter(images))} on: ended its process 4 times"
    assert text in done.stderr
    assert poison not in pipeline.scores(out)["image"].to_pylist()
    assert len(pipeline.committed(out)) > 0
