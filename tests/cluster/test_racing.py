"""Races through the pipeline, on Ray: kills, another split of the work, a full run afterwards."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import pipeline

pytestmark = pytest.mark.slow
OPTIONS = ("--model", "shapes", "--data", "shapes", "--scenes", 10, "--timesteps", 30)
OPTIONS += ("--tasks", "flickr30k", "flickr30k_text", "winoground", "flickr30k_variance")
RACING = ("--racing", 0.1, "--racing-audit", 0.2)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raced") / "out"
    done = pipeline.run(*OPTIONS, *RACING, "--actors", 2, "--out", out)
    assert "pairs race (doubt 0.1)" in done.stderr
    assert re.search(r"as in full, % of audited", done.stdout)
    return out


def results(out: Path) -> dict[str, Any]:
    """What must not depend on how the work was done."""
    found = json.loads(
        (out / "results.json").read_text(), parse_float=lambda text: round(float(text), 4)
    )
    return {name: found[name] for name in ("rows", "races", "comparisons", "counts")}


def forwards(out: Path) -> int:
    total: int = json.loads((out / "summary.json").read_text())["total"]["forwards"]
    return total


def test_what_a_race_tells(raced: Path) -> None:
    """The rows, the table and the report say so; less was done than in full; the variance is in full."""
    found = results(raced)
    assert {row["racing"] for row in found["rows"] if row["task"] != "flickr30k_variance"} == {
        "doubt 0.1"
    }
    assert {row["racing"] for row in found["rows"] if row["task"] == "flickr30k_variance"} == {None}
    assert all(race["forwards"] < race["full"] for race in found["races"])
    assert sum(race["audited"] for race in found["races"]) > 0
    for name in ("table.md", "table.tex", "report.html"):
        assert "Raced (doubt 0.1) with" in (raced / name).read_text()
    assert '<h2 id="races">' in (raced / "report.html").read_text()


@pytest.mark.long
def test_another_split_of_the_work(raced: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline.run(*OPTIONS, *RACING, "--actors", 1, "--batch-size", 17, "--out", out)
    assert results(out) == results(raced)


def test_a_killed_race_goes_on(raced: Path, tmp_path: Path) -> None:
    """Killed while it races: the same results, and what was committed is not done again."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = pipeline.start(*OPTIONS, *RACING, "--actors", 2, "--out", out, log=log)
    deadline = time.monotonic() + pipeline.TIMEOUT
    while not (races := list(out.glob("work/*/0001/checkpoint/*.parquet"))):
        assert process.poll() is None, f"ended before the kill\n{log.read_text()}"
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    assert races
    pipeline.kill(process)
    before = pipeline.scores(out).num_rows
    done = pipeline.run(*OPTIONS, *RACING, "--actors", 2, "--out", out)
    assert "every pair is scored already" in done.stderr  # the audited part
    assert results(out) == results(raced)
    assert forwards(out) < forwards(raced)
    assert pipeline.scores(out).num_rows > before


def test_a_full_run_afterwards(raced: Path, tmp_path: Path) -> None:
    """It makes the forwards that the race left out, and no others; --report-only shows the race again."""
    again = pipeline.run("--report-only", "--out", raced)
    assert "Races" in again.stdout
    stored = {
        (line["image"], line["text"]): set(line["positions"] or range(30))
        for line in pipeline.scores(raced).sort_by("row").to_pylist()
    }
    for line in pipeline.scores(raced).to_pylist():
        stored[line["image"], line["text"]] |= set(line["positions"] or range(30))
    before = results(raced)
    done = pipeline.run(*OPTIONS, "--actors", 2, "--out", raced)
    missing = sum(30 - len(places) for places in stored.values())
    assert forwards(raced) == missing > 0
    assert f"{missing:,} forwards (30 timesteps)" in done.stderr
    full = results(raced)
    assert not full["races"] and {row["racing"] for row in full["rows"]} == {None}
    third = pipeline.run(*OPTIONS, *RACING, "--actors", 2, "--out", raced)
    assert "every contest is decided already, 0 forwards needed" in third.stderr
    assert results(raced)["rows"] == before["rows"]
    sharper = pipeline.run("--report-only", "--racing", 0.001, "--out", raced)
    assert "doubt 0.001" in sharper.stdout  # all errors are there by now


@pytest.mark.long
def test_the_published_rounds(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = (
        "--model",
        "shapes",
        "--data",
        "shapes",
        "--scenes",
        10,
        "--tasks",
        "pets",
        "--actors",
        1,
    )
    options += ("--protocol", "diffusion-classifier", "--n-samples", 4, 16, "--to-keep", 3, 1)
    pipeline.run(*options, "--limit", 6, "--out", out)
    (race,) = results(out)["races"]
    assert race["rules"] == "rounds of 4, 16 keeping 3, 1"
    classes = race["full"] // 16 // 6
    assert race["forwards"] == forwards(out) == 6 * (classes * 4 + 3 * 12)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--racing", 1.0), "--racing 1.0: must be at least 0 and below 1"),
        (("--racing", -0.1), "--racing"),
        (("--racing-audit", 0.1), "--racing-audit measures races"),
        (("--n-samples", 4, 16), "--to-keep []: give one for each of [4, 16]"),
        (("--n-samples", 4, 16, "--to-keep", 3, 1), "--n-samples is of diffusion-classifier"),
        (("--n-samples", 16, 4, "--to-keep", 3, 1), "--n-samples [16, 4]: each must be more"),
    ],
)
def test_what_racing_refuses(options: tuple[Any, ...], told: str, tmp_path: Path) -> None:
    done = pipeline.run("--model", "shapes", *options, "--out", tmp_path, code=2)
    assert told in done.stderr


def test_the_best_of_ones_own_images(tmp_path: Path) -> None:
    """Of each text: a broken image loses and costs nothing else."""
    captions = pipeline.captioned_world(tmp_path, 10, "1007.jpg")
    images = tmp_path / "flickr30k" / "images"
    assert "1007.jpg" in captions
    options = (
        "--model",
        "shapes",
        "--timesteps",
        30,
        "--actors",
        1,
        "--data",
        images,
        "--top-k",
        2,
    )
    options += ("--text", "a red circle", "a large blue square", "--out", tmp_path / "out")
    raced = pipeline.run(*options, "--racing", 0.01, script="score", code=3)
    assert "Raced (doubt 0.01) with" in raced.stdout
    top = pq.read_table(tmp_path / "out" / "top.parquet").to_pylist()
    assert [(line["text"], line["rank"]) for line in top] == [
        ("a large blue square", 1), ("a large blue square", 2), ("a red circle", 1), ("a red circle", 2),
    ]  # fmt: skip
    pairs = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    lost = {pair["image"] for pair in pairs if pair["failure"]}
    measured = {pair["measured"] for pair in pairs}
    assert lost == {"1007.jpg"} and measured > {0, 30}, "some dropped out on the way"


def test_a_race_of_own_pairs_needs_something_to_find(tmp_path: Path) -> None:
    options = ("--data", tmp_path, "--racing", 0.1, "--out", tmp_path / "out")
    done = pipeline.run("--model", "shapes", *options, script="score", code=2)
    assert "give --top-k" in done.stderr
    done = pipeline.run("--clip", "shapes", *options, "--top-k", 1, script="score", code=2)
    assert "give a --model" in done.stderr
