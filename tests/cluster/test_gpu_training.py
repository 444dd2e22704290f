"""Training with GPU shares, on a Ray whose GPUs are numbers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.train
from ray.util.placement_group import placement_group, remove_placement_group

from diffitm.commands import finetune, sweep
from diffitm.core.config import make
from diffitm.core.errors import InputError
from diffitm.distributed.capacity import Capacity
from diffitm.sweep.options import read_sweep
from diffitm.training.lora.options import FinetuneConfig
from tests import pipeline

pytestmark = pytest.mark.slow
GPUS = 2
SMALL = {
    "model": "shapes",
    "data": "shapes",
    "scenes": 20,
    "steps": 3,
    "batch_size": 4,
    "log_every": 1,
    "effective_batch": 8,
    "validate_every": 0,
    "dtype": "fp32",
    "workers": GPUS,
}
FLAG = "DIFFITM_TEST_ON_PROCESSORS"


def processors_for_gpus() -> None:
    """In a worker: whatever Ray gave it, it trains on the processor while the file named by FLAG is there.
    What it was given is told beside that file."""
    from diffitm.distributed import devices

    choose = devices.worker_device

    def choose_processor() -> object:
        import torch

        flag = Path(os.environ[FLAG])
        rank = ray.train.get_context().get_world_rank()
        (flag.parent / f"worker-{rank}").write_text(str(ray.get_gpu_ids()))
        return torch.device("cpu") if flag.exists() else choose()

    devices.worker_device = choose_processor  # type: ignore[assignment]


@pytest.fixture(scope="module")
def flag(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray with GPUS, and the file that keeps workers on processors."""
    file = tmp_path_factory.mktemp("gpus") / "flag"
    file.touch()
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=GPUS,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={
            "env_vars": {"PYTHONPATH": str(pipeline.ROOT), FLAG: str(file)},
            "worker_process_setup_hook": f"{__name__}.processors_for_gpus",
        },
    )
    yield file
    ray.shutdown()


def test_each_worker_takes_a_gpu(flag: Path, tmp_path: Path) -> None:
    """Without a word, where the cluster has any: one of its own."""
    finetune.run(make(FinetuneConfig, {**SMALL, "out": str(tmp_path / "out")}))
    lines = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    given = sorted((flag.parent / f"worker-{rank}").read_text() for rank in range(GPUS))
    assert given == ["[0]", "[1]"]


def test_a_trial_of_a_sweep_takes_a_gpu(flag: Path, tmp_path: Path) -> None:
    """Its workers do; Tune's own share holds none, or a cluster of one GPU would wait for ever."""
    report = flag.parent / "worker-0"
    report.unlink(missing_ok=True)
    options = {**SMALL, "workers": 1, "steps": 1, "validate_every": 1, "validation_examples": 2}
    words = [f"{key}={value}" for key, value in options.items()]
    words += ["lambda=1.0", "parallel=2", f"out={tmp_path / 'out'}"]
    sweep.run(read_sweep(sweep.KINDS, ["lambda", *words]))
    assert report.read_text() in {"[0]", "[1]"}
    (row,) = pq.read_table(tmp_path / "out" / "table.parquet").to_pylist()
    assert row["state"] == "done"


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_room_for_workers(flag: Path) -> None:
    """As many as there is room for, beside what other work holds; that there is more is seen once it is
    free, and what waits for it goes when no more is asked for."""
    others = placement_group([{"GPU": 1}])
    ray.get(others.ready())
    places = Capacity({"CPU": 0.5, "GPU": 1.0}, 1, GPUS)
    assert places.take() == 1
    assert "1 workers of 0.5 processors and 1 GPUs each have it" in places.standing()
    worker = placement_group([{"CPU": 0.5, "GPU": 1}])
    ray.get(worker.ready())
    assert not places.has_more()
    remove_placement_group(others)
    until(places.has_more)
    assert places.take() == 1  # the worker is still there
    remove_placement_group(worker)
    until(lambda: ray.available_resources().get("GPU", 0) == GPUS)
    assert places.take() == GPUS
    assert not places.has_more()
    places.close()
    until(lambda: ray.available_resources().get("GPU", 0) == GPUS)


def test_a_gpu_that_torch_does_not_see(flag: Path, tmp_path: Path) -> None:
    """The run ends at once, and says where and what is right."""
    flag.unlink()
    options = {**SMALL, "workers": 1, "gpus_per_worker": 0.5, "out": str(tmp_path / "out")}
    told = r"Ray gave this worker a GPU, but torch .* sees none.* --gpus-per-worker 0 .*\(on node .*GPU"
    with pytest.raises(InputError, match=told):
        finetune.run(make(FinetuneConfig, options))


def test_more_gpus_than_there_are(flag: Path, tmp_path: Path) -> None:
    options = {**SMALL, "workers": 3, "gpus_per_worker": 1.0, "out": str(tmp_path / "out")}
    with pytest.raises(InputError, match="--workers 3 with 1 GPUs each: the cluster has 2"):
        finetune.run(make(FinetuneConfig, options))
