"""What actors beside the driver collect, and what scoring actors export."""

from __future__ import annotations

from typing import Any

import pytest

from diffitm.distributed import prometheus
from diffitm.distributed.monitor import Monitor
from diffitm.store.run_summary import Done


def test_what_workers_tell() -> None:
    """Lines once, images by how often, the first reason to stop, the newest checkpoint of all groups."""
    monitor = Monitor()
    monitor.begin(1, "n", "node n")
    monitor.add({"step": 1})
    monitor.add({"step": 2})
    assert monitor.read() == [{"step": 1}, {"step": 2}] and monitor.read() == []
    for failure in ("a", "b", "a"):
        monitor.lose(failure)
    monitor.restore({"a": 1, "b": 4, "c": 5})  # what it has seen itself is not counted twice
    assert monitor.save(7) == {"a": 2, "b": 4, "c": 5}
    assert monitor.save(3) == monitor.lost
    assert monitor.group() == ({1: ("n", "node n")}, 7)
    assert monitor.end() == (monitor.lost, None)
    monitor.stop("first")
    monitor.stop("second")
    assert monitor.end()[1] == "first"
    monitor.grow()
    assert monitor.should_end()
    monitor.open()
    assert not monitor.should_end() and monitor.group() == ({}, 7)


def test_exported_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """By model; of nothing to add, no counter is told."""
    values: dict[str, list[float]] = {}

    class Metric:
        def __init__(self, name: str, text: str, tags: Any) -> None:
            self.told = values.setdefault(name, [])
            self.inc = self.set = self.told.append
            assert tags == ("model",)

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"model": "m"}

    monkeypatch.setattr(prometheus, "Counter", Metric)
    monkeypatch.setattr(prometheus, "Gauge", Metric)
    exported = prometheus.Metrics("m")
    exported.add(Done(pairs=3, forwards=12, failures=0, memory=99, batch_size=8))
    exported.add(Done(pairs=2, forwards=0, failures=2, memory=50))
    assert values == {
        "diffitm_pairs": [3, 2],
        "diffitm_forwards": [12],
        "diffitm_failures": [2],
        "diffitm_gpu_memory_bytes": [99, 50],
        "diffitm_batch_size": [8],
    }
    assert prometheus.gpu_memory("cpu") == 0


def test_a_models_name_in_any_letters() -> None:
    """Such as a path's; Ray's own counters take ASCII alone."""
    exported = prometheus.Metrics("/modèles/小")
    exported.add(Done(pairs=3, forwards=12, failures=1, memory=99, batch_size=8))
