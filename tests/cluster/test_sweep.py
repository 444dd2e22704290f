"""Sweeps on Ray: killed and resumed, read by the other pipelines, two at once in one cluster."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from ray.cluster_utils import Cluster

from diffitm.core.config import parse
from diffitm.shapes.layouts import write_world
from diffitm.shapes.training import write_training
from diffitm.training.diva.options import DivaConfig
from diffitm.training.lora.options import FinetuneConfig
from tests import pipeline

pytestmark = pytest.mark.slow
run = partial(pipeline.run, script="sweep")
start = partial(pipeline.start, script="sweep")
SCORES = (
    *("timesteps", "model=shapes", "data=shapes", "scenes=10", "tasks=clevr,winoground"),
    *("timesteps=8", "number=1,2,4,8", "actors=1"),
)
TRAINING = ("data=shapes", "scenes=40", "steps=6", "validate_every=2", "validation_examples=20",
            "effective_batch=8", "batch_size=8", "checkpoint_every=2")  # fmt: skip


def table(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "table.parquet").to_pylist()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sweep") / "scores"
    done = run(*SCORES, f"out={out}")
    forwards = re.search(r"([\d,]+) forwards were needed", done.stderr)
    assert forwards and int(forwards[1].replace(",", "")) == 8 * len(pipeline.scores(out))
    return out


def test_a_sweep_over_timesteps_reads_what_is_stored(scored: Path, tmp_path: Path) -> None:
    """Other settings on the same store need no forward, and the same ones give the same table."""
    other = tmp_path / "other"
    done = run(*SCORES, "range=0-1000,0-500", f"store={scored}", f"out={other}")
    assert " 0 forwards were needed" in done.stderr
    kept = json.loads((scored / "summary.json").read_text())["total"]
    assert kept["forwards"] == 8 * len(pipeline.scores(scored))  # not overwritten by the reader's
    known = {(row["number"], row["weighting"]): row["measured"] for row in table(scored)}
    found = {
        (row["number"], row["weighting"]): row["measured"]
        for row in table(other)
        if row["range"] == "0-1000"
    }
    assert len(known) == 8
    assert found == known
    report = (other / "report.html").read_text()
    assert report.count("<svg") == 3  # mean, clevr, winoground
    assert "timestep_list" in report


@pytest.mark.long
def test_a_mended_image_counts_again(tmp_path: Path) -> None:
    """One that cannot be read costs its examples: exit 3, and they are listed. Mended, the same command
    scores them, and no setting keeps the figures of before."""
    world, out = tmp_path / "world", tmp_path / "out"
    write_world(str(world), 10)
    words = ("timesteps", "model=shapes", f"data={world}", "tasks=clevr", "timesteps=2", "number=1,2",
             "weighting=uniform", "actors=1", f"out={out}")  # fmt: skip
    images = [p for p in sorted(world.rglob("clevr/**/*")) if p.suffix in (".png", ".jpg")][:3]
    contents = [image.read_bytes() for image in images]
    for image in images:
        image.write_bytes(b"broken")
    done = run(*words, code=3)
    lost = json.loads((out / "failures.json").read_text())["failures"]
    assert lost and all(line["task"] == "clevr" for line in lost)
    assert f"{len(lost)} examples have no score; they are listed in" in done.stderr
    counted = [json.loads(row["tasks"])["clevr"]["n"] for row in table(out)]
    for image, content in zip(images, contents, strict=True):
        image.write_bytes(content)
    run(*words)
    assert json.loads((out / "failures.json").read_text()) == {"failures": []}
    again = [json.loads(row["tasks"])["clevr"]["n"] for row in table(out)]
    assert len(counted) == len(again) == 2
    assert sum(again) > sum(counted)


@pytest.mark.long
def test_gdbench_takes_the_best_setting(scored: Path, tmp_path: Path) -> None:
    """The file as it is; with all weight on the first timestep as if there were no other."""
    best = yaml.safe_load((scored / "best.yaml").read_text())
    file, out, alone = ("--config", scored / "best.yaml"), tmp_path / "out", tmp_path / "alone"
    steps = [*best["timestep_list"], 900]
    weights = [1, *[0] * (len(steps) - 1)]
    pipeline.run(*file, "--timestep-list", *steps, "--timestep-weights", *weights, "--out", out)
    config = json.loads((pipeline.store_folder(out) / "_config.json").read_text())
    assert config["timesteps"] == steps
    pipeline.run(*file, "--timestep-list", steps[0], "--timestep-weights", 1, "--out", alone)
    found, wanted = ([row["value"] for row in pipeline.rows(o)] for o in (out, alone))
    assert found == pytest.approx(wanted)


def test_a_killed_sweep_goes_on(tmp_path: Path) -> None:
    """Trainings that were complete are not begun again, one that was not goes on; one that fails
    costs itself alone."""
    out, log = tmp_path / "out", tmp_path / "log"
    words = ("lambda", "model=shapes", *TRAINING, "lambda=2", "lr=1e-4,3e-4,1e30", "search=random",
             "samples=9", "parallel=1", f"out={out}", "early_stopping=false")  # fmt: skip
    process = start(*words, log=log)
    deadline = time.monotonic() + pipeline.TIMEOUT
    while "(1 of 3 done" not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    pipeline.kill(process)
    assert not (out / "best.yaml").exists()
    written = {
        p: p.stat().st_mtime_ns for p in out.glob("trials/*/pytorch_lora_weights.safetensors")
    }
    done = run(*words, code=3)
    assert f"going on with the sweep in {out}" in done.stderr
    assert "1 of 3 settings failed" in done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    good, bad = table(out)[:2], table(out)[2:]
    assert sorted(row["lr"] for row in good) == [1e-4, 3e-4]
    assert {(row["state"], len(row["curve"])) for row in good} == {("done", 4)}
    assert {(row["lr"], row["state"], row["accuracy"]) for row in bad} == {(1e30, "failed", None)}
    assert all("finite" in row["failure"] or "nan" in row["failure"] for row in bad)
    assert good[0]["accuracy"] == max(row["accuracy"] for row in good)
    best = parse(FinetuneConfig, ["--config", str(out / "best.yaml")])
    assert (best.lambda_, best.lr, best.steps) == (2.0, good[0]["lr"], 6)
    assert "<svg" in (out / "report.html").read_text()


@pytest.mark.long
def test_a_training_that_is_stopped_gives_its_share_back(tmp_path: Path) -> None:
    """The second one's accuracy falls at once; ASHA ends it, and Ray Train frees its workers. The data
    are given by a relative path."""
    out = tmp_path / "out"
    write_training(str(tmp_path / "data"), 60)
    data = os.path.relpath(tmp_path / "data", pipeline.ROOT)
    words = ("lambda", "model=shapes", f"data={data}", "steps=12", "effective_batch=16",
             "validate_every=4", "validation_examples=50", "lr=1e-4,1e-1", "lambda=0.5",
             "parallel=1", f"out={out}")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.sweeping", *words],
        capture_output=True, text=True, timeout=pipeline.TIMEOUT, cwd=pipeline.ROOT,
        env=pipeline.environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["state"] for row in table(out)] == ["done", "stopped early"]
    free = re.search(r"(\S+) of (\S+) processors are free", done.stdout)
    assert free and free[1] == free[2]


@pytest.mark.long
def test_optuna_turns_the_density(tmp_path: Path) -> None:
    """Two settings that Optuna proposes."""
    out = tmp_path / "out"
    words = ("recap-density", "clip=shapes", "teacher=shapes", *TRAINING, "repeats=1", "held_out=4")
    run(*words, "search=optuna", "samples=2", "density=uniform(0.05,1)", f"out={out}")
    rows = table(out)
    assert len({row["density"] for row in rows}) == 2
    assert all(0.05 <= row["density"] <= 1 for row in rows)
    best = parse(DivaConfig, ["--config", str(out / "best.yaml")])
    assert best.recap == f"random:{rows[0]['density']}"


@pytest.mark.long
def test_two_sweeps_at_once_in_one_cluster(scored: Path, tmp_path: Path) -> None:
    """Each has the store that it has alone, and its own table."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 6})
    protocols = {"first": "diffusionitm", "second": "diffusion-classifier,paper"}
    try:
        processes = {
            name: start(
                *(*SCORES, f"protocol={protocol}", f"out={tmp_path / name}"),
                f"ray={cluster.address}",
                log=tmp_path / f"{name}.log",
            )
            for name, protocol in protocols.items()
        }
        for name, process in processes.items():
            code = process.wait(pipeline.TIMEOUT)
            assert code == 0, (tmp_path / f"{name}.log").read_text()
    finally:
        cluster.shutdown()
    alone, together = pipeline.scores(scored), pipeline.scores(tmp_path / "first")
    for column in ("image", "text", "timesteps"):
        assert together[column].equals(alone[column])
    errors = (np.stack(store["l2"].to_numpy()) for store in (together, alone))
    np.testing.assert_allclose(*errors, rtol=1e-5)
    wanted = {(row["number"], row["weighting"]): row["measured"] for row in table(scored)}
    for row in table(tmp_path / "first"):
        assert row["measured"] == pytest.approx(wanted[row["number"], row["weighting"]])
    stores = {
        json.loads((folder / "_config.json").read_text())["protocol"]: pq.read_table(folder)
        for folder in (tmp_path / "second" / "scores").iterdir()
    }
    assert stores.keys() == {"diffusion-classifier", "paper"}
    assert all(len(store) == len(alone) for store in stores.values())
    summary = json.loads((tmp_path / "second" / "summary.json").read_text())
    names = [line["model"] for line in summary["models"]]
    assert ["diffusion-classifier" in name for name in names] == [True, False]
    assert ["paper" in name for name in names] == [False, True]
    assert summary["total"]["forwards"] == 2 * 8 * len(alone)


def test_bad_settings_cost_nothing(tmp_path: Path) -> None:
    """All problems at once, before Ray is started; exit 2."""
    words = ("lambda", "model=shapes", "data=shapes", "lambda=-1,0.5", "lr=0,1e-4", "steps=4")
    done = run(*words, f"out={tmp_path / 'out'}", code=2)
    assert "lambda" in done.stderr and "--lr 0: must be above 0" in done.stderr
    assert not (tmp_path / "out" / "trials").exists()
