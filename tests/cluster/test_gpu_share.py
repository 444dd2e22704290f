"""Every pipeline of Ray Data with GPU shares, on a Ray whose GPUs are numbers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from diffitm.commands import candidates, gdbench, negatives
from diffitm.commands.stages.encode import Encoder, encode
from diffitm.core.config import make
from diffitm.distributed.session import ActorPool
from diffitm.models.loading import resolve
from tests import pipeline, tiny_language
from tests.processors import WITHOUT_CUDA

pytestmark = pytest.mark.slow
POOL = {"actors": 1, "gpus_per_actor": 0.5}


@pytest.fixture(scope="module", autouse=True)
def _gpus() -> Iterator[None]:
    options = {"num_cpus": 4, "num_gpus": 1, "include_dashboard": False, "log_to_driver": False}
    ray.init("local", **options, runtime_env=WITHOUT_CUDA)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pipeline.captioned_world(folder, 10, "1000.jpg")
    return folder


def test_gdbench(tmp_path: Path) -> None:
    """Diffusion in half precision, as on a GPU, CLIP, and generated images."""
    out = tmp_path / "out"
    options = {"model": ["shapes"], "clip": ["shapes"], "tasks": ["winoground"], "out": str(out)}
    options |= {"scenes": 10, "timesteps": [2], "prompts": ["a red cube"], "samples": 1}
    gdbench.run(make(gdbench.GdbenchConfig, {**options, **POOL, "sampling_steps": 2}))
    assert {row["task"] for row in pipeline.rows(out)} == {"winoground"}
    assert not [row for row in pipeline.rows(out) if row["failures"]]
    note = pipeline.store_folder(out) / "_config.json"
    assert json.loads(note.read_text())["dtype"] == "fp16"
    assert len(list(out.glob("samples/*/images/*.parquet"))) == 1
    options |= {"timesteps": [12], "racing": 0.2, "clip": [], "prompts": []}
    gdbench.run(make(gdbench.GdbenchConfig, {**options, **POOL}))
    (race,) = json.loads((out / "results.json").read_text())["races"]
    assert race["contests"] == 40 and race["forwards"] < race["full"]
    assert not json.loads((out / "failures.json").read_text())["failures"]


def test_candidates_and_negatives(world: Path, tmp_path: Path) -> None:
    """Embeddings, searches and a language model's answers."""
    out, images = tmp_path / "data" / "lists" / "val.json", str(world / "flickr30k" / "images")
    (world / "flickr30k" / "images" / "1000.jpg").write_bytes(
        (world / "flickr30k" / "images" / "1001.jpg").read_bytes()
    )
    given = {"clip": "shapes", "images": images, "captions": str(world / "captions.json")}
    candidates.run(
        make(candidates.CandidatesConfig, {**given, **POOL, "top_k": 3, "out": str(out)})
    )
    assert len(next(iter(json.loads(out.read_text()).values()))) == 3
    llm = tiny_language.write_llama(tmp_path / "llm", ["a red cube"])
    made = tmp_path / "negatives.parquet"
    given |= {"kinds": ["llm", "images"], "llm": str(llm), "out": str(made), "max_new_tokens": 3}
    negatives.run(make(negatives.NegativesConfig, {**given, **POOL, "near": 1}))
    assert all(len(line) == 1 for line in pq.read_table(made)["negative_images"].to_pylist())


def test_cached_latents(world: Path, tmp_path: Path) -> None:
    encoder = Encoder(
        resolve("shapes"), None, "fp32", str(world / "flickr30k" / "images"), "squash"
    )
    pool = ActorPool(1, 1, 1.0, 0.5)
    for kind, names in (("image", ["1000.jpg", "1001.jpg"]), ("text", ["", "a red cube"])):
        folder = encode(str(tmp_path / "out"), kind, names, encoder, pool)
        table = pq.read_table(folder)
        assert table["failure"].null_count == len(names) == len(table)
