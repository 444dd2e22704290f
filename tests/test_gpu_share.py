"""Every pipeline with GPU shares, on a Ray whose GPUs are numbers: what Ray refuses is seen here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from diffitm.config import make
from diffitm.distributed import actors, gdbench
from diffitm.errors import InputError
from tests import pipeline
from tests.processors import WITHOUT_CUDA

GPUS = 2
WORLD = {"model": ["shapes"], "data": "shapes", "scenes": 10, "timesteps": [2], "dtype": "fp32"}


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    ray.init(
        num_cpus=4,
        num_gpus=GPUS,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=WITHOUT_CUDA,
    )
    yield
    ray.shutdown()


def test_scoring(gpus: None, tmp_path: Path) -> None:
    """Diffusion, CLIP and generated images, an actor a GPU, in fp16 where nothing is said."""
    out = tmp_path / "out"
    options = {**WORLD, "clip": ["shapes"], "tasks": ["winoground"], "out": str(out)}
    options |= {"prompts": ["a red cube"], "samples": 1, "sampling_steps": 2}
    gdbench.run(make(gdbench.Config, options))
    assert {row["task"] for row in pipeline.rows(out)} == {"winoground"}
    assert not [row for row in pipeline.rows(out) if row["failures"]]


def test_no_gpu_to_be_seen() -> None:
    """The real choice asks torch, and says what is wrong where it sees none."""
    assert actors.choose_device(0) == "cpu"
    with pytest.raises(InputError, match=r"Ray gave this process 1 GPUs, but torch .* sees none"):
        actors.choose_device(1.0)
