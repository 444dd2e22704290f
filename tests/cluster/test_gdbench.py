"""The pipeline as a user runs it: the table, failures that cost only their own, a full disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import diffitm
from diffitm.models.embedded import SHAPES
from diffitm.shapes.layouts import write_world
from diffitm.tasks.registry import GDBENCH
from tests import pipeline
from tests.scoring.test_custom import CODE

pytestmark = pytest.mark.slow
OWN_TASK = """
from diffitm.tasks.clevr import Clevr

class Mine(Clevr):
    name = "mine"
    version = 7
"""


def test_texts_in_a_stage(tmp_path: Path) -> None:
    """The scores are those of resident encoders; what a killed stage left whole is not encoded again."""
    given = ("--model", "shapes", "--data", "shapes", "--scenes", 10, "--tasks", "winoground")
    given += ("--timesteps", 1, "--actors", 1, "--text-encoders")
    staged, resident = tmp_path / "staged", tmp_path / "resident"
    for where, out in (("resident", resident), ("stage", staged)):
        pipeline.run(*given, where, "--out", out)
    shutil.rmtree(staged / "scores")
    (file,) = staged.glob("work/texts-*/0000/encoded/*.parquet")
    count = pq.read_metadata(file).num_rows
    file.write_bytes(file.read_bytes()[:-20])
    done = pipeline.run(*given, "stage", "--out", staged)
    assert f"encoding texts: {count} to do" in done.stderr
    assert len(list(staged.glob("work/texts-*/0001/encoded/*.parquet"))) == 1
    found, expected = pipeline.scores(staged), pipeline.scores(resident)
    for column in ("image", "text", "failure", "digest"):
        assert found[column].equals(expected[column])
    # Rates say how large blocks are, and so what is in a batch.
    pairs = zip(found["l2"].to_pylist(), expected["l2"].to_pylist(), strict=True)
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs)


def test_whole_run(tmp_path: Path) -> None:
    """Model and CLIP on all tasks: table, results, provenance, speed, a report."""
    out = tmp_path / "out"
    done = pipeline.run(
        "--model", "shapes", "--clip", "shapes", "--data", "shapes", "--scenes", 10,
        "--timesteps", 4, "--actors", 1, "--out", out,
    )  # fmt: skip
    for word in ("diffusion naive", "diffusion normalised", "CLIP", "chance", *GDBENCH):
        assert word in done.stdout
    rows = pipeline.rows(out)
    assert {row["task"] for row in rows} == set(GDBENCH)
    assert {row["score"] for row in rows} == {"conditional", "normalised", "cosine"}
    scored = [row for row in rows if row["value"] is not None]
    assert len(scored) > 100
    bounded = [row for row in scored if row["low"] is not None]  # groups of five images have none
    assert all(row["low"] <= row["value"] + 1e-9 <= row["high"] + 2e-9 for row in bounded)
    shares = [row for row in scored if row["unit"] == "share"]
    assert all(row["low"] >= 0 and row["high"] <= 1 for row in shares)
    assert all(row["timesteps"] == 4 for row in rows if row["score"] != "cosine")
    found = json.loads((out / "results.json").read_text())
    assert [speed["model"] for speed in found["speeds"]] == ["shapes", "CLIP shapes"]
    assert all(speed["seconds_per_pair"] > 0 for speed in found["speeds"])
    assert "winoground" in (out / "table.md").read_text()
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["config"]["scenes"] == 10
    page = (out / "report.html").read_text()
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|url\(["']?http|@import""", page)
    moved = out.rename(tmp_path / "moved")
    again = pipeline.run("--report-only", "--out", moved)
    assert "published" not in again.stdout  # drawn scenes, wherever they are now
    assert (moved / "report.html").read_text().count("data:image/jpeg") == page.count(
        "data:image/jpeg"
    )


def test_a_scorer_of_ones_own_and_the_same_from_python(tmp_path: Path) -> None:
    """In one table and one set of tests with ours; diffitm.evaluate has the figures of each."""
    own = tmp_path / "mine.py"
    own.write_text(CODE)
    write_world(str(tmp_path / "world"), 10)
    options = (
        "--clip",
        "shapes",
        "--scorer",
        f"{own}:Red",
        "--tasks",
        "winoground",
        "--timesteps",
        2,
    )
    options += ("--data", tmp_path / "world", "--actors", 1, "--out", tmp_path / "out")
    done = pipeline.run("--model", "shapes", *options)
    assert f"{own}:Red" in done.stdout and "redness" in done.stdout
    rows = pipeline.rows(tmp_path / "out")
    assert {row["score"] for row in rows} == {"conditional", "normalised", "cosine", "redness"}
    compared = json.loads((tmp_path / "out" / "results.json").read_text())["comparisons"]
    assert {"redness"} < {c["first_score"] for c in compared} | {
        c["second_score"] for c in compared
    }
    for name, label in (("shapes", "shapes"), ("clip:shapes", "CLIP shapes"), (f"{own}:Red",) * 2):
        scorer = diffitm.load_scorer(name, timesteps=2)
        table = diffitm.evaluate(scorer, ["winoground"], str(tmp_path / "world"))
        found = {
            (r["group"], r["metric"], r["score"]): r["value"] for r in table.to_dict("records")
        }
        expected = {
            (r["group"], r["metric"], r["score"]): r["value"] for r in rows if r["model"] == label
        }
        assert found == pytest.approx(expected)


@pytest.mark.long
def test_models_beside_each_other(tmp_path: Path) -> None:
    """Base against LoRA and 4 against 2 timesteps, one command; a later one for a part of it, which a
    task of the user's own joins, makes no forward for what is stored."""
    folder, out = tmp_path / "lora", tmp_path / "out"
    unet = UNet2DConditionModel.from_pretrained(SHAPES / "diffusion", subfolder="unet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    file = folder / "pytorch_lora_weights.safetensors"
    options = ("--model", "shapes", "--data", "shapes", "--scenes", 10, "--actors", 1, "--out", out)
    options += ("--lora", "none", file)
    pipeline.run(*options, "--timesteps", 4, 2, "--tasks", "winoground")
    names = ("shapes", f"shapes + {file}")
    wanted = {f"{name}, {steps} timesteps" for name in names for steps in (4, 2)}
    assert {row["model"] for row in pipeline.rows(out)} == wanted
    tests = json.loads((out / "results.json").read_text())["comparisons"]
    assert len({(t["first"], t["second"]) for t in tests if t["first"] != t["second"]}) == 6
    own = tmp_path / "mine.py"
    own.write_text(OWN_TASK)
    done = pipeline.run(*options, "--timesteps", 2, "--tasks", "winoground", f"{own}:Mine")
    assert "mine" in done.stdout
    assert {row["model"] for row in pipeline.rows(out)} == set(names)
    needed = re.findall(r"(\d+) pairs of \d+ images need", done.stderr)
    assert needed == ["230", "230"]  # clevr's alone: winoground's are stored
    assert {row["task"] for row in pipeline.rows(out)} == {"winoground", "mine"}
    report = pipeline.run("--report-only", "--tasks", f"{own}:Mine", "--out", out)
    assert "winoground" not in report.stdout


def test_bad_images_cost_their_own_examples(tmp_path: Path) -> None:
    """A truncated, a missing and an empty image and an empty caption are counted and listed; once
    mended, the same command scores them and nothing else."""
    data, out = tmp_path / "data", tmp_path / "out"
    write_world(str(data), 10)
    images = data / "clevr" / "images"
    whole = {p.name: p.read_bytes() for p in sorted(images.iterdir())[:3]}
    first, second, third = whole
    (images / first).write_bytes(whole[first][: len(whole[first]) // 2])
    (images / second).unlink()
    (images / third).write_bytes(b"")
    lists = data / "flickr30k" / "val_top10_RN50x64_text.json"
    entries = json.loads(lists.read_text())
    entries[next(iter(entries))][3] = "  "
    lists.write_text(json.dumps(entries))
    options = ("--model", "shapes", "--data", data, "--tasks", "clevr", "flickr30k_text")
    options += ("--timesteps", 2, "--actors", 1, "--out", out)
    done = pipeline.run(*options, code=3)
    assert re.search(r"incomplete: \d+ examples could not be scored", done.stderr)
    report = pipeline.run("--report-only", "--out", out, code=3)
    assert "failures.json" in report.stderr
    found = {row["task"]: row for row in pipeline.rows(out) if row["group"] == "all"}
    assert (found["clevr"]["n"], found["clevr"]["failures"]) == (7 * 14, 3 * 14)
    listed = json.loads((out / "failures.json").read_text())["failures"]
    told = " ".join(line["failure"] for line in listed)
    for text in ("truncated", "there is no such file", "the file is empty", "caption 3 is empty"):
        assert text in told
    for name, data_ in whole.items():
        (images / name).write_bytes(data_)
    again = pipeline.run(*options, code=3)  # the empty caption is still there
    assert re.search(r"need [\d,]+ forwards", again.stderr)
    assert "of 3 images" in again.stderr
    found = {row["task"]: row for row in pipeline.rows(out) if row["group"] == "all"}
    assert (found["clevr"]["n"], found["clevr"]["failures"]) == (10 * 14, 0)


def test_unreadable_weights(tmp_path: Path) -> None:
    """A cut-off weights file is a message that names it, before an actor starts, not a traceback."""
    source = pipeline.ROOT / "diffitm" / "shapes" / "weights" / "diffusion"
    model = shutil.copytree(source, tmp_path / "model")
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = pipeline.run(
        "--model", model, "--data", "shapes", "--scenes", 10, "--out", tmp_path / "out", code=2
    )
    assert f"error: --model '{model}': {weights} is no whole safetensors file" in done.stderr
    assert " forwards (" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_actors_that_would_starve_the_readers(tmp_path: Path) -> None:
    done = pipeline.run(
        "--model", "shapes", "--data", "shapes", "--scenes", 10, "--out", tmp_path / "out",
        "--actors", (os.cpu_count() or 1) + 1, code=2,
    )  # fmt: skip
    assert "leaves none for the readers" in done.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; needs the right to mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here (needs root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_no_space_left(small_disk: Path, tmp_path: Path) -> None:
    """A full disk ends the run with a message; with room again, the same command finishes."""
    data = tmp_path / "data"
    write_world(str(data), 30)
    out = small_disk / "out"
    options = ("--model", "shapes", "--data", data, "--tasks", "clevr", "--out", out)
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"0" * (2 * 2**20 - 140 * 1024))
    done = pipeline.run(*options, code=2)
    assert "no space left" in done.stderr
    ballast.unlink()
    pipeline.run(*options)
    table = pipeline.scores(out)
    pairs = list(zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(pairs) == len(set(pairs)) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_says_how_to_go_on(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and what schedulers send exit with 130 and one line; what was done stays."""
    log, out = tmp_path / "log", tmp_path / "out"
    options = ("--model", "shapes", "--data", "shapes", "--scenes", 20, "--out", out, "--actors", 1)
    options += ("--tasks", "clevr", "winoground", "--timesteps", 4)
    process = pipeline.start(*options, log=log)
    deadline = time.monotonic() + pipeline.TIMEOUT
    while not pipeline.committed(out):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(120) == 130
    told = log.read_text()
    assert "interrupted; the same command goes on where it stopped" in told
    assert "Traceback" not in told
    before = pipeline.committed(out)
    assert before
    if number == signal.SIGTERM:
        return
    again = pipeline.run(*options)
    assert "going on where it stopped" in again.stderr
    assert not list(out.glob("work/*/*/checkpoint"))
    table = pipeline.scores(out)
    pairs = list(zip(table["image"].to_pylist(), table["text"].to_pylist(), strict=True))
    assert len(pairs) == len(set(pairs))
