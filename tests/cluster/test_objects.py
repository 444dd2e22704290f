"""The pipelines with everything in an S3-compatible bucket on loopback."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet
from ray.cluster_utils import Cluster

from diffitm.core import storage
from diffitm.models.embedded import SHAPES
from diffitm.shapes.layouts import write_world
from diffitm.shapes.masks import write_masks
from diffitm.shapes.training import write_training
from tests import pipeline
from tests.objects import Objects, reachable, serve
from tests.training_runs import losses, wait_for

pytestmark = pytest.mark.slow
SCENES = 10
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
ROWS = "coco_neg/train_neg_clip.tsv"
OPTIONS = ("--timesteps", 4, "--actors", 1, "--tasks", "clevr")
TUNING = (
    *("--steps", 12, "--batch-size", 2, "--effective-batch", 4, "--checkpoint-every", 3),
    *("--log-every", 1, "--validate-every", 6, "--validation-examples", 4),
)
DIVA = ("--steps", 4, "--batch-size", 2, "--effective-batch", 4, "--held-out", 4)
DIVA += ("--projection-steps", 1, "--recap", "random:0.3", "--lr", "0.03")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Objects]:
    """A bucket with the world, a training set, masks, a model and a CLIP."""
    cache = str(tmp_path_factory.mktemp("cache"))
    with (
        pytest.MonkeyPatch.context() as patch,
        serve(tmp_path_factory.mktemp("objects") / "served") as objects,
        reachable(objects),
    ):
        patch.setenv("DIFFITM_CACHE", cache)
        write_world(objects.uri("world"), SCENES)
        write_training(objects.uri("train"), 20)
        write_masks(objects.uri("masks"), SCENES)
        objects.upload(SHAPES / "diffusion", "models/diffusion")
        objects.upload(SHAPES / "clip", "models/clip")
        yield objects


def holding(secret: str, *folders: Path) -> list[Path]:
    """Files that hold the secret, and Parquet files in one of whose cells it stands."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    found = [path for path in files if secret.encode() in path.read_bytes()]
    tables = [path for path in files if path.suffix == ".parquet"]
    return found + [path for path in tables if secret in str(parquet.read_table(path).to_pydict())]


def test_gdbench(bucket: Objects, tmp_path: Path) -> None:
    """Model, data and results in the bucket, killed and gone on with, with the server in the URIs:
    the scores of a run on disk, each pair once, and the keys nowhere."""
    write_world(str(tmp_path / "world"), SCENES)
    pipeline.run(
        "--model", "shapes", "--data", tmp_path / "world", *OPTIONS, "--out", tmp_path / "out"
    )
    out, log = bucket.folder / "gdbench", tmp_path / "log"
    storage.write_text(bucket.uri("gdbench.yaml"), "timesteps: 4\ntasks: clevr\nactors: 1\n")

    def options(at: Callable[[str], str]) -> tuple[str, ...]:
        places = ("--data", at("world"), "--out", at("gdbench"))
        return ("--config", at("gdbench.yaml"), "--model", at("models/diffusion"), *places)

    process = pipeline.start(*options(bucket.uri), log=log)
    end = time.monotonic() + pipeline.TIMEOUT
    while not pipeline.committed(out):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    pipeline.kill(process)
    done = pipeline.committed(out)
    cut_in_two(bucket, out)

    with tempfile.TemporaryDirectory(prefix="objects") as ray:
        told = pipeline.run(*options(bucket.whole_uri), AWS_ENDPOINT_URL="", RAY_TMPDIR=ray)
        assert list(Path(ray).rglob("*.log")), "Ray's logs are looked into"
        assert holding(bucket.secret, Path(ray)) == []
    assert "going on where it stopped" in told.stderr
    label = bucket.uri("models/diffusion")
    found, expected = pipeline.scores(out, label), pipeline.scores(tmp_path / "out")
    assert done and pipeline.committed(out) == set()
    assert list(out.glob("scores/*/_manifest.json.lease")) == []
    for name in ("image", "text"):
        assert found[name] == expected[name]
    errors = [np.array(table["l2"].to_pylist()) for table in (found, expected)]
    np.testing.assert_allclose(*errors, rtol=1e-5)
    values = [{r["metric"]: r["value"] for r in pipeline.rows(o)} for o in (out, tmp_path / "out")]
    assert values[0] == values[1]

    again = pipeline.run(*options(bucket.uri))
    assert "0 forwards needed" in again.stderr
    pipeline.run("--report-only", "--out", bucket.whole_uri("gdbench"))
    assert label in (out / "report.html").read_text()
    printed = told.stdout + told.stderr + again.stdout + again.stderr + log.read_text()
    assert bucket.secret not in printed and bucket.key not in printed
    assert holding(bucket.secret, out) == holding(bucket.key, out) == []


def cut_in_two(bucket: Objects, out: Path) -> None:
    """As if the kill had come between the copy and the deletion that commit a block."""
    (folder,) = out.glob("work/*/0000/checkpoint")
    name = next(p.name for p in folder.glob("*.parquet") if "pending" not in p.name)
    where = bucket.uri(folder.relative_to(bucket.folder).as_posix())
    content = storage.read_bytes(storage.join(where, name))
    pending = name.replace(".parquet", ".pending.parquet")
    storage.write_bytes(storage.join(where, pending), content)


@pytest.mark.long
def test_races(bucket: Objects) -> None:
    """In the bucket, and then in full: what the race left out, and nothing else."""
    options = ("--model", bucket.uri("models/diffusion"), "--data", bucket.uri("world"))
    options += ("--tasks", "winoground", "--actors", 1, "--timesteps", 12)
    out = bucket.uri("raced")
    pipeline.run(*options, "--racing", 0.2, "--out", out)
    (race,) = json.loads((bucket.folder / "raced" / "results.json").read_text())["races"]
    assert race["forwards"] < race["full"] == 6 * SCENES * 12
    done = pipeline.run(*options, "--out", out)
    total = json.loads((bucket.folder / "raced" / "summary.json").read_text())["total"]
    assert total["forwards"] == race["full"] - race["forwards"]
    assert f"{total['forwards']:,} forwards (12 timesteps)" in done.stderr


def test_sweeps(bucket: Objects, tmp_path: Path) -> None:
    """Over scores, then over trainings that Optuna proposes: results in the bucket, and keys of the
    environment neither there nor in Ray's logs, where Tune would have them written."""
    model, search = f"model={bucket.uri('models/diffusion')}", ("search=optuna", "samples=1")
    scores = ("timesteps", model, f"data={bucket.uri('world')}", "tasks=clevr", "timesteps=4",
              "number=1,4", "actors=1", f"out={bucket.uri('sweep')}")  # fmt: skip
    training = ("lambda", model, f"data={bucket.uri(f'train/{ROWS}')}", f"images={bucket.uri('train')}",
                f"validation_data={bucket.uri('train')}", "steps=2", "batch_size=2", "effective_batch=4",
                "validate_every=2", "validation_examples=4", *search, "lr=uniform(1e-5,1e-4)",
                "lambda=1", f"out={bucket.whole_uri('tried')}")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="objects") as ray:
        for words in (scores, training):
            told = pipeline.run(*words, script="sweep", RAY_TMPDIR=ray)
            assert bucket.secret not in told.stdout + told.stderr
        assert list(Path(ray).rglob("runtime_env_agent.log")), "Ray's logs are looked into"
        assert holding(bucket.secret, Path(ray)) == []
    for name, rows in (("sweep", 4), ("tried", 1)):
        out = bucket.folder / name
        assert parquet.read_table(out / "table.parquet").num_rows == rows
        assert "<svg" in (out / "report.html").read_text()
        assert holding(bucket.secret, out) == []
    (trial,) = (bucket.folder / "tried" / "trials").glob("*/pytorch_lora_weights.safetensors")
    assert trial.stat().st_size > 0


@pytest.fixture(scope="module")
def tuned(bucket: Objects, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The local path of a LoRA tuned with all in the bucket; the run was killed and went on."""
    options = ("--model", bucket.uri("models/diffusion"))
    options += ("--data", bucket.uri(f"train/{ROWS}"), "--images", bucket.uri("train"))
    options += ("--validation-data", bucket.uri("train"), *TUNING, "--out", bucket.uri("tuned"))
    out, log = bucket.folder / "tuned", tmp_path_factory.mktemp("tuned") / "log"
    process = pipeline.start(*options, log=log, script="finetune")
    wait_for(out, process)
    pipeline.kill(process)
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    done = pipeline.run(*options, script="finetune")
    assert f"weights {bucket.uri('tuned')}/pytorch_lora_weights.safetensors" in done.stdout
    return out


def teach(bucket: Objects, data: str, out: str) -> str:
    """What diva prints."""
    models = ("--teacher", bucket.uri("models/diffusion"), "--clip", bucket.uri("models/clip"))
    return pipeline.run(*models, "--data", data, *DIVA, "--out", out, script="diva").stdout


@pytest.fixture(scope="module")
def taught(bucket: Objects) -> Path:
    """The local path of a CLIP taught with the images of a folder in the bucket."""
    printed = teach(bucket, bucket.uri("train/coco/train"), bucket.uri("diva/folder"))
    assert "clip s3://bucket/diva/folder" in printed
    return bucket.folder / "diva" / "folder"


def test_finetune(bucket: Objects, tuned: Path, tmp_path: Path) -> None:
    """Rows, images, checkpoints and weights in the bucket: the training that a run on disk makes."""
    write_training(str(tmp_path / "train"), 20)
    local = ("--data", tmp_path / "train" / ROWS, "--images", tmp_path / "train")
    local += ("--validation-data", tmp_path / "train", *TUNING, "--out", tmp_path / "out")
    pipeline.run("--model", "shapes", *local, script="finetune")
    assert losses(tuned) == pytest.approx(losses(tmp_path / "out"), rel=1e-4, abs=1e-6)
    assert list((tuned / "tensorboard").glob("events*"))
    assert holding(bucket.secret, tuned) == []


@pytest.mark.long
def test_diva(bucket: Objects, taught: Path) -> None:
    """Images of a folder and of shards in the bucket, as teacher and CLIP."""
    files = sorted((bucket.folder / "train" / "coco" / "train").glob("*.jpg"))
    for number in range(2):
        tar = io.BytesIO()
        with tarfile.open(fileobj=tar, mode="w") as archive:
            for file in files[number::2]:
                archive.add(file, file.name)
        storage.write_bytes(bucket.uri(f"pool/{number:04d}.tar"), tar.getvalue())
    out = bucket.whole_uri("diva/shards")
    printed = teach(bucket, bucket.whole_uri("pool/{0000..0001}.tar"), out)
    assert "clip s3://bucket/diva/shards" in printed
    for folder in (taught, bucket.folder / "diva" / "shards"):
        left = {path.name for path in folder.iterdir()}
        assert {"open_clip_config.json", "open_clip_model.safetensors", "transformers"} <= left
        assert json.loads((folder / "failures.json").read_text()) == {}
        assert len(losses(folder)) == 1
    assert holding(bucket.secret, bucket.folder / "diva") == []


@pytest.mark.long
@pytest.mark.usefixtures("tuned", "taught")
def test_a_cluster_that_knows_keys_alone(bucket: Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its nodes learn from the driver where the bucket is; what the tunings left is scored and shown."""
    for name in set(bucket.environment) - set(KEYS):
        monkeypatch.delenv(name)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4})
    try:
        done = pipeline.run(
            *("--ray", cluster.address, "--model", bucket.uri("models/diffusion")),
            *("--lora", bucket.uri("tuned/last"), "--clip", bucket.uri("diva/folder"), "shapes"),
            *("--segmentation", bucket.uri("masks"), "--prompts", "a red circle"),
            *("--samples", 1, "--sampling-steps", 2, "--data", bucket.uri("world")),
            *(*OPTIONS, "--limit", 6, "--out", bucket.uri("compared")),
            **bucket.environment,
        )
    finally:
        cluster.shutdown()
    rows = pipeline.rows(bucket.folder / "compared")
    assert {row["model"] for row in rows} == {
        f"{bucket.uri('models/diffusion')} + {bucket.uri('tuned/last')}",
        f"CLIP {bucket.uri('diva/folder')}",
        "CLIP shapes",
    }
    assert not [row for row in rows if row["failures"]]
    assert {row["task"] for row in rows} == {"clevr", "segmentation"}
    report = (bucket.folder / "compared" / "report.html").read_text()
    assert "Training" in report and "Generated images" in report
    assert bucket.secret not in done.stdout + done.stderr + report


MADE = {
    "candidates": ("lists/top.json", "lists/top_text.json"),
    "negatives": ("mined/rows.tsv",),
}


@pytest.mark.parametrize(
    "script", ["negatives", pytest.param("candidates", marks=pytest.mark.long)]
)
def test_lists_and_negatives(bucket: Objects, tmp_path: Path, script: str) -> None:
    """Captions, images, lists and their work in the bucket; the same files as on disk."""
    pipeline.captioned_world(tmp_path, 20, "1007.jpg")
    bucket.upload(tmp_path, script)
    more = ("--top-k", 5) if script == "candidates" else ("--kinds", "rules", "images")
    for base in (f"{tmp_path}", bucket.uri(script)):
        places = ("--captions", f"{base}/captions.json", "--images", f"{base}/flickr30k/images")
        options = (*places, "--out", f"{base}/{MADE[script][0]}", *more)
        # an image is unreadable
        pipeline.run("--clip", "shapes", "--actors", 1, *options, script=script, code=3)
    made = bucket.folder / script
    for name in MADE[script]:
        assert (made / name).read_bytes() == (tmp_path / name).read_bytes()
    assert holding(bucket.secret, made) == []
    refused = pipeline.run("pets", "--data", bucket.uri("fetched"), script="prepare", code=2)
    assert "must be a folder, local or shared" in refused.stderr
