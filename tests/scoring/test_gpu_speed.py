"""benchmarks/gpu_speed.py with small models on the processor: every rate is measured, and time ends it."""

from __future__ import annotations

import time

import pytest

from benchmarks import gpu_speed
from benchmarks.gpu_speed import CASES, Case, Report
from tests.scoring.test_compiled import stand_in


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    monkeypatch.setattr(gpu_speed, "ROUNDS", 1)
    return [gpu_speed.tiny(case) for case in CASES]


def test_every_rate(cases: list[Case], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both models in turn, through a folder as diffitm reads one."""
    sizes = stand_in(monkeypatch)
    kept: list[int] = []

    def keep(report: Report) -> None:
        kept.append(len(report["lines"]))

    report = gpu_speed.measure(cases, ["bf16"], "cpu", time.monotonic() + 9999, keep)
    assert kept == list(range(1, 15)) and report["left out"] == []
    whats = [line["what"] for line in report["lines"]]
    assert whats[0] == "VAE, encode, in bf16" and whats[7] == "VAE, encode, in fp32"
    assert set(whats[1:7]) == set(whats[8:]) and sum("forwards" in what for what in whats) == 8
    assert sizes == [4] * 8  # two batches, at first and in a round, of each model
    assert all(line["rate"] > 0 and line["share"] > 0 for line in report["lines"])
    assert gpu_speed.show(report).count("\n| SDXL-base | bf16 |") == 7


def test_no_time(cases: list[Case]) -> None:
    report = gpu_speed.measure(cases[:1], ["fp32"], "cpu", time.monotonic(), lambda report: None)
    assert report["lines"] == [] and len(report["left out"]) == 7
    assert "No time was left for: SD 2.1-base, fp32: VAE; " in gpu_speed.show(report)
