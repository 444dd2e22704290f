"""A cluster that starts without worker nodes grows by the actors' demand, and shrinks when idle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from diffitm.models.loading import resolve
from diffitm.scoring.specs import DiffusionSpec
from tests import pipeline
from tests.faults.disturb import assert_same, scores
from tests.tiny import read_images
from tests.traced import STEPS, read_trace

pytestmark = pytest.mark.slow
ALONE = ("unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child")
ACTORS = 2


@pytest.mark.long
def test_from_zero_workers_and_back(tmp_path: Path) -> None:
    """Nodes come up for the actors, every pair gets the score that it has without Ray, and the idle
    nodes go down."""
    out, trace, figures = tmp_path / "out", tmp_path / "trace", tmp_path / "figures.json"
    out.mkdir()
    trace.mkdir()
    with tempfile.TemporaryDirectory(prefix="ray") as temporary:  # sockets need a short path
        script = [sys.executable, "-m", "tests.faults.grow", out, trace, figures, ACTORS]
        call = [*ALONE, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *map(str, script)]
        env = pipeline.environment(
            PYTHONPATH=str(pipeline.ROOT), RAY_TMPDIR=temporary, RAY_AUTH_MODE="disabled"
        )
        done = subprocess.run(
            call, capture_output=True, text=True, timeout=590, cwd=pipeline.ROOT, env=env
        )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    assert found["code"] == 0, done.stderr
    assert found["before"] == 0
    assert found["most"] >= ACTORS
    assert "unless the cluster grows" in done.stderr
    assert len({block.node for block in read_trace(trace)}) == ACTORS
    assert_same(scores(out), _without_ray(out))


def _without_ray(out: Path) -> dict:
    (table,) = out.glob("work/*/*/work.parquet")
    spec = DiffusionSpec(resolve("shapes"), str(out / "world"), "diffusionitm", STEPS)
    rows = read_images(str(table))
    return {(s["image"], s["text"]): s["l2"] for s in spec.build("cpu").score(rows)}


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("unshare and ip are needed, for a place where no other Ray runs")
    tried = subprocess.run(
        [*ALONE, "ip", "link", "set", "lo", "up"], capture_output=True, text=True
    )
    if tried.returncode:
        pytest.skip(f"unshare is not permitted: {tried.stderr.strip()}")
