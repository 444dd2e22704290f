"""Killed runs go on where they stopped, and a score does not depend on how the work was split."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from diffitm.models.embedded import SHAPES
from diffitm.store.compaction import tidy
from diffitm.store.score_store import read_store
from diffitm.tasks.flickr30k import Flickr30kImage, Flickr30kText
from tests import pipeline
from tests.faults.disturb import largest_block
from tests.plain import Plain, list_pairs, published_timesteps
from tests.traced import read_trace

pytestmark = pytest.mark.slow
SCENES = 30
TASKS = ("winoground", "clevr", "flickr30k", "flickr30k_text")
OPTIONS = ("--model", "shapes", "--data", "shapes", "--scenes", SCENES, "--timesteps", 10)
OPTIONS += ("--tasks", *TASKS)
ACTORS = 2


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = pipeline.run(*OPTIONS, "--out", out, "--actors", ACTORS)
    needed = re.search(r"need ([\d,]+) forwards", done.stderr)
    made = re.search(r"([\d,]+) forwards done", done.stderr)
    assert needed and made, done.stderr
    assert needed[1] == made[1]
    return out


def errors(out: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    table = pipeline.scores(out)
    keys = list(zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True))
    return keys, np.array(table["l2"].to_pylist())


@pytest.mark.parametrize(("batch", "actors"), [(1, 1), (17, 2)])
def test_split_does_not_matter(undisturbed: Path, tmp_path: Path, batch: int, actors: int) -> None:
    """Batch sizes and actors change no error by more than 1e-5 of itself."""
    out = tmp_path / "out"
    only = ("--tasks", "winoground", "--limit", 6) if batch == 1 else ()
    pipeline.run(*OPTIONS, *only, "--out", out, "--batch-size", batch, "--actors", actors)
    keys, found = errors(out)
    all_keys, wanted = errors(undisturbed)
    place = {key: i for i, key in enumerate(all_keys)}
    np.testing.assert_allclose(found, wanted[[place[key] for key in keys]], rtol=1e-5)
    if batch != 1:
        assert keys == all_keys


def test_equals_the_published_algorithm(undisturbed: Path) -> None:
    """Through work table, actors, store and evaluation: the errors and the accuracy of the
    published algorithm written plainly, with its timesteps, resize and the standard noise."""
    (root,) = undisturbed.glob("shapes-*")
    plain = Plain(str(SHAPES / "diffusion"), published_timesteps(10))
    keys, found = errors(undisturbed)
    stored = dict(zip(keys, found, strict=True))
    for task, image_retrieval in ((Flickr30kText(), False), (Flickr30kImage(), True)):
        examples = list(task.examples(str(root)))[:6]
        files = [[str(root / image) for image in e.images] for e in examples]
        decisions = [list_pairs(f, e.texts) for f, e in zip(files, examples, strict=True)]
        published = plain.score(decisions, image_retrieval)
        ours = [[stored[i, t] for i in e.images for t in e.texts] for e in examples]
        np.testing.assert_allclose(ours, published.conditional.numpy(), rtol=1e-4)
        if published.unconditional is not None:
            empty = [[stored[i, ""] for i in e.images] for e in examples]
            np.testing.assert_allclose(empty, published.unconditional.numpy(), rtol=1e-4)
    everything = list(Flickr30kImage().examples(str(root)))
    right = 0
    for example in everything:
        d = [stored[i, example.texts[0]].mean() - stored[i, ""].mean() for i in example.images]
        right += int(np.argmin(d) == 0)
    (row,) = (
        r
        for r in pipeline.rows(undisturbed)
        if (r["task"], r["metric"], r["score"]) == ("flickr30k", "R@1", "normalised")
    )
    assert row["value"] == pytest.approx(right / len(everything))


def test_three_kills(undisturbed: Path, tmp_path: Path) -> None:
    """Three SIGKILLs between 20% and 80% of the rows: nothing twice, nothing missing, and what was
    committed stays: each file byte for byte, and its errors when the end joins the files."""
    out, log = tmp_path / "out", tmp_path / "log"
    keys, wanted = errors(undisturbed)
    total = len({image for image, _ in keys})
    chosen = random.Random(5)
    points = sorted(chosen.uniform(0.2, 0.8) for _ in range(3))
    kept: dict[str, str] = {}
    for point in points:
        process = pipeline.start(*OPTIONS, "--out", out, "--actors", ACTORS, log=log)
        deadline = time.monotonic() + pipeline.TIMEOUT
        while pipeline.images_done(out) < point * total:
            assert process.poll() is None, f"ended before the kill\n{log.read_text()}"
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        pipeline.kill(process)
        assert pipeline.images_done(out) < total
        for name, digest in kept.items():
            assert _digest(pipeline.store_folder(out) / name) == digest
        kept |= {p.name: _digest(p) for p in _committed_files(out)}
    committed = {
        (row["image"], row["text"]): row["l2"]
        for name in kept
        for row in parquet.read_table(pipeline.store_folder(out) / name).to_pylist()
    }
    last = pipeline.run(*OPTIONS, "--out", out, "--actors", ACTORS)
    assert "going on where it stopped" in last.stderr
    (joined,) = pipeline.store_folder(out).glob("*.parquet")
    assert joined.name.startswith("compact-") and not list(out.glob("work/*/*/checkpoint"))
    left = re.search(r"([\d,]+) pairs of [\d,]+ images need", last.stderr)
    made = re.search(r"([\d,]+) pairs, [\d,]+ forwards done", last.stderr)
    assert left and made
    assert left[1] == made[1]
    found_keys, found = errors(out)
    joined = dict(zip(found_keys, found.tolist(), strict=True))
    assert committed and all(joined[key] == value for key, value in committed.items())
    assert found_keys == keys
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_figures_do_not_depend_on_files(undisturbed: Path, tmp_path: Path) -> None:
    """A store as it was before there were manifests, compacted: the same report to the last byte."""
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    folder = pipeline.store_folder(out)
    whole = read_store(str(folder)).dataset().to_table()
    for path in folder.glob("*.parquet"):
        path.unlink()
    (folder / "_manifest.json").unlink(missing_ok=True)
    for start in range(0, len(whole), 50):
        parquet.write_table(
            whole.slice(start, 50), folder / f"{start * 7 % 1000:04d}-{start}.parquet"
        )
    reports = []
    for _ in range(2):
        pipeline.run("--report-only", "--out", out)
        names = ("results.json", "table.md", "table.tex", "failures.json")
        reports.append([(out / name).read_bytes() for name in names])
        tidy(read_store(str(folder)))
        assert len(list(folder.glob("*.parquet"))) == 1
    assert reports[0] == reports[1]


def _committed_files(out: Path) -> list[Path]:
    """Data files whose checkpoint is committed: they share the start of its name."""
    names = [p.name.removesuffix(".parquet") for p in out.glob("work/*/*/checkpoint/*.parquet")]
    whole = [name for name in names if not name.endswith(".pending")]
    files = pipeline.store_folder(out).glob("*.parquet")
    return [p for p in files if any(p.name.startswith(name) for name in whole)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.long
def test_a_kill_costs_an_actor_one_block(tmp_path: Path) -> None:
    """Of what was finished before a SIGKILL, at most a block an actor is computed again."""
    out, trace = tmp_path / "out", tmp_path / "trace"
    out.mkdir()
    trace.mkdir()
    call = [sys.executable, "-m", "tests.traced", str(out), str(trace), str(ACTORS)]
    where = {"cwd": pipeline.ROOT, "env": pipeline.environment(PYTHONPATH=str(pipeline.ROOT))}
    with (tmp_path / "log").open("ab") as log:
        process = subprocess.Popen(call, stdout=log, stderr=log, start_new_session=True, **where)
    deadline = time.monotonic() + pipeline.TIMEOUT
    while pipeline.images_done(out) < 20:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    pipeline.kill(process)
    subprocess.run(call, check=True, capture_output=True, timeout=pipeline.TIMEOUT, **where)
    computed = [pair for block in read_trace(trace) for pair in block.pairs]
    assert set(computed) == set(errors(out)[0])
    assert len(computed) - len(set(computed)) <= ACTORS * largest_block(out)


@pytest.mark.long
def test_repeat_scores_nothing_and_settings_do_not_mix(undisturbed: Path) -> None:
    """The same command needs no forward; another setting that matters starts another store."""
    before = pipeline.rows(undisturbed)
    again = pipeline.run(*OPTIONS, "--out", undisturbed, "--actors", 1)
    assert "0 forwards needed" in again.stderr
    assert pipeline.rows(undisturbed) == before
    report = pipeline.run("--report-only", "--out", undisturbed)
    assert "results" in report.stdout
    assert pipeline.rows(undisturbed) == before
    small = ("--out", undisturbed, "--seed", 1, "--tasks", "winoground", "--actors", 1)
    other = pipeline.run(*OPTIONS, *small, "--limit", 3)
    assert "18 pairs of 6 images" in other.stderr
    assert len(list((undisturbed / "scores").iterdir())) == 2
    more = pipeline.run(*OPTIONS, *small, "--limit", 6)
    assert "18 pairs of 6 images" in more.stderr  # the other three of six examples


@pytest.mark.long
def test_other_tasks_in_between(tmp_path: Path) -> None:
    """A run killed, another set of tasks run to its end, then the first again: no pair twice."""
    out, log = tmp_path / "out", tmp_path / "log"
    first = ("--model", "shapes", "--data", "shapes", "--scenes", 20, "--out", out)
    first += ("--timesteps", 4, "--actors", 1, "--tasks", "clevr")
    process = pipeline.start(*first, log=log)
    deadline = time.monotonic() + pipeline.TIMEOUT
    while not pipeline.committed(out):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    pipeline.kill(process)
    both = (*first, "winoground")
    pipeline.run(*both)
    again = pipeline.run(*first)
    assert "0 forwards needed" in again.stderr
    table = pipeline.scores(out)
    pairs = list(zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert not [row for row in pipeline.rows(out) if row["failures"]]
