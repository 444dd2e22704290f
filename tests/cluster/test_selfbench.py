"""Self-Bench of one's own as a user runs it, on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffitm.models.loading import load_denoiser, resolve
from diffitm.tasks import selfbench
from tests import families, pipeline

pytestmark = pytest.mark.slow
TAGS = ("single_object", "position")


def test_each_model_on_each_ones_pictures(tmp_path: Path) -> None:
    """The layout, a picture by its seed, both matrices; what is there is neither made nor scored again."""
    other, out = families.write("SD3", tmp_path / "sd3"), tmp_path / "out"
    words = (
        "--model", "shapes", other, "--clip", "shapes", "--tags", *TAGS, "--limit", 2,
        "--samples", 2, "--sampling-steps", 3, "--guidance", 4, 7, "--timesteps", 2,
        "--actors", 1, "--out", out,
    )  # fmt: skip
    done = pipeline.run(*words, script="selfbench")
    made = sorted(path.relative_to(out).as_posix() for path in out.glob("outputs/**/*.png"))
    folders, places = ("outputs/4/shapes", "outputs/7/sd3"), ("00000", "00002", "00054", "00066")
    assert made == [
        f"{folder}/{place}/samples/0000{n}.png"
        for folder in folders for place in places for n in (0, 1)
    ]  # fmt: skip
    line = json.loads((out / folders[0] / "00054" / "metadata.jsonl").read_text())
    assert line["tag"] == "position" and len(line["include"]) == 2
    model = load_denoiser(resolve("shapes"))
    seed = selfbench.picture_seed(0, 54, 1)
    (expected,) = model.generate(line["prompt"], [seed], 3, 4.0)
    found = Image.open(out / folders[0] / "00054" / "samples" / "00001.png")
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    rows = {(r["task"], r["model"]): r for r in pipeline.rows(out) if r["group"] == "all"}
    names = ("shapes", str(other), "CLIP shapes")
    assert set(rows) == {(task, name) for task in ("by_shapes", "by_sd3") for name in names}
    assert {(row["metric"], row["n"], row["failures"]) for row in rows.values()} == {
        ("accuracy", 8, 0)
    }
    assert "Self-Bench" in done.stdout and "by shapes" in (out / "table.md").read_text()
    page = (out / "report.html").read_text()
    assert 'id="self-bench"' in page and "by shapes, seed 1" in page
    labels = tmp_path / "labels.csv"
    labels.write_text("\n".join(["image,correct", *(f"{p},{p.endswith('0.png')}" for p in made)]))
    (out / made[3]).write_bytes(b"cut off")
    before = {path: (out / path).stat().st_mtime_ns for path in made}
    again = pipeline.run(*words, "--labels", labels, script="selfbench")
    after = {path: (out / path).stat().st_mtime_ns for path in made}
    assert [path for path in made if before[path] != after[path]] == [made[3]]
    assert "pictures: 1 to do" in again.stderr and "0 forwards needed" in again.stderr
    assert again.stderr.count("labelled, 4 of them correct") == 2
    assert " forwards (" not in again.stderr
    correct = {r["n"] for r in pipeline.rows(out) if r["task"] == "by_sd3-correct"}
    assert correct == {4, 2}
    report = pipeline.run("--out", out, "--report-only")
    assert "(n=4)*" in report.stdout
    wrong = pipeline.run(*words, "--picture-seed", 1, script="selfbench", code=2)
    assert "holds pictures of picture_seed 0, or did, not 1" in wrong.stderr
