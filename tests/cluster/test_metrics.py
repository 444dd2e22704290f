"""What scoring actors export on their node's metrics port."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from diffitm.commands.gdbench import GdbenchConfig, run
from diffitm.core.errors import Incomplete
from diffitm.shapes.layouts import write_world
from tests import pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A Ray of this process alone whose metrics are served on the port, often."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = int(free.getsockname()[1])
    # Ray would else switch tokens on in this process, and so for clusters of other tests.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    often = {"metrics_report_interval_ms": 500}
    quiet = {"include_dashboard": False, "log_to_driver": False}
    ray.init("local", num_cpus=4, **quiet, _metrics_export_port=number, _system_config=often)
    yield number
    ray.shutdown()


def read(port: int) -> dict[tuple[str, str], list[float]]:
    """Values by name and model, one an actor."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found: dict[tuple[str, str], list[float]] = {}
    for name, tags, value in re.findall(r"^(ray_diffitm_\w+)\{(.*)\} (\S+)$", text, re.M):
        model = re.search(r'model="([^"]*)"', tags)
        assert model, tags
        found.setdefault((name, model[1]), []).append(float(value))
    return found


def test_metrics_of_a_run(port: int, tmp_path: Path) -> None:
    """Pairs, forwards and failures as the summary has them; a run that is incomplete says so last."""
    data = tmp_path / "data"
    write_world(str(data), 10)
    broken = next((data / "clevr" / "images").iterdir())
    broken.write_bytes(b"no image")
    out = tmp_path / "out"
    config = GdbenchConfig(
        model=["shapes"],
        data=str(data),
        tasks=["clevr"],
        timesteps=[3],
        batch_size=16,
        out=str(out),
    )
    with pytest.raises(Incomplete, match="14 examples could not be scored"):
        run(config)
    assert (out / "report.html").exists()
    table = pipeline.scores(out)
    pairs, failed = len(table), table["l2"].null_count
    assert failed > 0
    end = time.monotonic() + 120
    while sum((found := read(port)).get(("ray_diffitm_pairs_total", "shapes"), [])) < pairs:
        assert time.monotonic() < end, found
        time.sleep(1)
    names = ("pairs_total", "forwards_total", "failures_total")
    sums = [sum(found[f"ray_diffitm_{name}", "shapes"]) for name in names]
    assert sums == [pairs, 3 * (pairs - failed), failed]
    assert set(found["ray_diffitm_batch_size", "shapes"]) == {16}
    assert set(found["ray_diffitm_gpu_memory_bytes", "shapes"]) == {0}
    total = json.loads((out / "summary.json").read_text())["total"]
    assert [total[name] for name in ("pairs", "forwards", "failures")] == sums
    assert (total["retries"], total["batch_size"], total["gpu_memory_bytes"]) == (0, 16, 0)
    assert 0 < total["unet_share"] < 1
    assert 0 <= total["waiting_share"] < 1
