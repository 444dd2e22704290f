"""Models by their Hub id on a cluster: the driver fetches them once, nodes that cannot ask the Hub work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from diffitm.models.embedded import SHAPES
from diffitm.shapes.layouts import write_world
from diffitm.shapes.training import write_training
from tests import pipeline
from tests.hub import REPO, Hub, serving

pytestmark = pytest.mark.slow
SMALL = ("--steps", 2, "--effective-batch", 4, "--batch-size", 4, "--validate-every", 0)


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serving(SHAPES / "diffusion") as hub:
        yield hub


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two nodes whose processes have HF_HUB_OFFLINE, and a cache without the model."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    cluster.add_node(num_cpus=2)
    yield cluster
    cluster.shutdown()


def run(script: str, hub: Hub, cluster: Cluster, folder: Path, *options: object) -> Any:
    where: dict[str, str] = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "cache")}
    joined = (*options, "--ray", cluster.address)
    return pipeline.run(*joined, script=script, HF_HUB_OFFLINE="0", **where)


def fetched(hub: Hub) -> int:
    """How often the weights of the U-Net were, since the last call."""
    count = sum(
        a.startswith("GET") and a.endswith("/unet/diffusion_pytorch_model.safetensors")
        for a in hub.asked
    )
    hub.asked.clear()
    return count


def test_gdbench(hub: Hub, cluster: Cluster, tmp_path: Path) -> None:
    """As with the same files in a folder."""
    write_world(str(tmp_path / "world"), 10)
    options = ("--data", tmp_path / "world", "--tasks", "winoground", "--timesteps", 2)
    model = ("--model", REPO, "--actors", 2)
    run("gdbench", hub, cluster, tmp_path, *model, *options, "--out", tmp_path / "out")
    assert fetched(hub) == 1
    alone = tmp_path / "alone"
    pipeline.run("--model", SHAPES / "diffusion", *options, "--out", alone)
    values = [[row["value"] for row in pipeline.rows(out)] for out in (tmp_path / "out", alone)]
    assert values[0] == pytest.approx(values[1])


def test_tunings(hub: Hub, cluster: Cluster, tmp_path: Path) -> None:
    """Of a model, and with one as a teacher, by workers on both nodes."""
    write_training(str(tmp_path / "data"), 20)
    data = tmp_path / "data"
    shared = (*SMALL, "--workers", 2, "--effective-batch", 8)
    options = ("--model", REPO, "--data", data, *shared, "--out", tmp_path / "lora")
    run("finetune", hub, cluster, tmp_path, *options)
    assert fetched(hub) == 1
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").exists()
    options = ("--clip", "shapes", "--teacher", REPO, "--data", data / "coco" / "train", *shared)
    options += ("--held-out", 4, "--projection-steps", 1)
    run("diva", hub, cluster, tmp_path / "second", *options, "--out", tmp_path / "clip")
    assert fetched(hub) == 1
    assert (tmp_path / "clip" / "open_clip_model.safetensors").exists()
