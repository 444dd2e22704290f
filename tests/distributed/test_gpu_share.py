"""Stages with GPU shares, on a Ray whose GPUs are numbers: what Ray refuses is seen here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from diffitm.core.errors import InputError
from diffitm.distributed import devices
from diffitm.distributed.item_stage import ItemStage, run_items
from diffitm.distributed.session import choose_pool, connect
from diffitm.distributed.stages import whole_files
from tests.processors import WITHOUT_CUDA

SCHEMA = pa.schema([("row", pa.int64()), ("position", pa.int64()), ("gpus", pa.list_(pa.string()))])


class Told:
    """Says which GPUs it was given."""

    def __init__(self, device: str, counter: Any) -> None:
        assert device == "cpu"

    def __call__(self, table: pa.Table) -> pa.Table:
        gpus = [str(number) for number in ray.get_gpu_ids()]
        lines = [
            {"row": group["row"], "position": group["start"] + i, "gpus": gpus}
            for group in table.to_pylist()
            for i in range(len(group["names"]))
        ]
        return pa.Table.from_pylist(lines, SCHEMA)


@pytest.fixture
def gpus() -> Iterator[None]:
    options = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, "log_to_driver": False}
    ray.init("local", **options, runtime_env=WITHOUT_CUDA)
    connect(None)
    yield
    ray.shutdown()


def test_a_stage_on_gpus(gpus: None, tmp_path: Path) -> None:
    """An actor a GPU by default; a block is one call, so that nothing is cut or joined."""
    pool = choose_pool(None, None, None, None)
    assert (pool.min_actors, pool.gpus, pool.device) == (2, 1.0, "cuda")
    names = [f"name {number}" for number in range(100)]
    stage = ItemStage("telling", str(tmp_path / "made" / "rows"), SCHEMA, Told, (), 4, 3)
    folder = run_items(stage, names, pool)
    rows = whole_files(folder, SCHEMA).to_table().to_pylist()
    assert sorted(row["position"] for row in rows) == list(range(100))
    assert {tuple(row["gpus"]) for row in rows} <= {("0",), ("1",)}


def test_no_gpu_to_be_seen() -> None:
    """The real choice asks torch, and says what is wrong where it sees none."""
    assert devices.actor_device(0) == "cpu"
    with pytest.raises(InputError, match=r"Ray gave this actor 1 GPUs, but torch .* sees none"):
        devices.actor_device(1.0)
