"""One's own images and texts as a user scores them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import diffitm
from tests import pipeline

pytestmark = pytest.mark.slow
MODEL = ("--model", "shapes", "--timesteps", 2, "--actors", 1)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """captions.csv beside its images, of which one is cut off."""
    root = tmp_path_factory.mktemp("world")
    captions = pipeline.captioned_world(root, 10, "1007.jpg")
    file = root / "flickr30k" / "images" / "captions.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["image", "caption", "from"])
        for image, texts in captions.items():
            writer.writerows(
                [image, text, "even" if int(image[3]) % 2 == 0 else "odd"] for text in texts
            )
    return file


def test_a_table(table: Path, tmp_path: Path) -> None:
    """Every pair has the score that load_scorer gives, a broken image costs its own; a second run scores
    only what is new."""
    out = tmp_path / "out"
    options = ("--source-column", "from", "--out", out)
    done = pipeline.run(*MODEL, "--data", table, *options, script="score", code=3)
    assert "5 of 50 pairs have no score" in done.stderr
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert [row["row"] for row in rows] == list(range(50))
    lost = [row for row in rows if row["failure"]]
    assert {row["image"] for row in lost} == {"1007.jpg"} and len(lost) == 5
    scorer = diffitm.load_scorer("shapes", timesteps=2)
    for row in rows[:10]:
        (expected,) = scorer(table.parent / row["image"], row["text"])[0]
        assert row["score"] == pytest.approx(expected, abs=2e-5)
        difference = row["unconditional_error"] - row["conditional_error"]
        assert row["score"] == pytest.approx(difference, abs=1e-5)
    summary = json.loads((out / "scores.json").read_text())
    assert {(s["source"], s["pairs"]) for s in summary["sources"]} == {("even", 25), ("odd", 25)}
    page = (out / "report.html").read_text()
    assert "<svg" in page and "data:image/jpeg" in page and "unreadable image" in page
    longer = table.with_name("longer.csv")
    longer.write_text(table.read_text() + "1001.jpg,a text that is new,odd\n")
    again = pipeline.run(*MODEL, "--data", longer, *options, script="score", code=3)
    assert "7 pairs of 2 images need" in again.stderr  # the new one, and what failed before
    found = pq.read_table(out / "pairs.parquet").to_pylist()
    np.testing.assert_allclose(
        [r["score"] for r in found[:50] if not r["failure"]],
        [r["score"] for r in rows if not r["failure"]],
    )
    assert len(found) == 51 and found[50]["text"] == "a text that is new"
    moved = tmp_path / "moved"
    shutil.copytree(table.parent, moved)
    moved_table = ("--data", moved / longer.name)
    third = pipeline.run(*MODEL, *moved_table, *options, script="score", code=3)
    assert "the scores of 9 of 9 images" in third.stderr
    assert "6 pairs of 1 images need" in third.stderr  # of the broken one alone
    kept = pq.read_table(out / "pairs.parquet").to_pylist()
    assert [row["score"] for row in kept] == [row["score"] for row in found]


def test_texts_for_all_and_the_best(table: Path, tmp_path: Path) -> None:
    """A folder, by a CLIP: each image against each text, the best two of each."""
    out = tmp_path / "out"
    texts = ("--text", "a red circle", "a blue square")
    options = ("--data", table.parent, *texts, "--top-k", 2, "--actors", 1, "--out", out)
    pipeline.run("--clip", "shapes", *options, script="score", code=3)
    rows = pq.read_table(out / "pairs.parquet").to_pylist()
    assert len(rows) == 20 and "conditional_error" not in rows[0]
    top = pq.read_table(out / "top.parquet").to_pylist()
    for text in texts[1:]:
        best = sorted((r for r in rows if r["text"] == text and r["score"] is not None),
                      key=lambda r: -r["score"])[:2]  # fmt: skip
        assert [t["image"] for t in top if t["text"] == text] == [r["image"] for r in best]


def test_bad_options_cost_nothing(table: Path, tmp_path: Path) -> None:
    """Each is said by name, before Ray is started."""
    for options, text in (
        ((), "give --data"),
        (("--clip", "shapes", "--data", table), "score takes one model"),
        (("--data", tmp_path / "none.csv"), "--data: there is no file"),
        (("--data", table, "--text-column", "captoin"), "did you mean 'caption'"),
        (("--data", table, "--images", tmp_path / "none"), "--images: there is no folder"),
        (("--data", table, "--text-file", tmp_path / "none.txt"), "--text-file"),
    ):
        done = pipeline.run(*MODEL, *options, "--out", tmp_path / "out", script="score", code=2)
        assert text in done.stderr
        assert "forwards" not in done.stderr
