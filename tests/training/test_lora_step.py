"""The training core: rows, draws, the update step against plain code, LoRA files, validation."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
import time
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from pyarrow import parquet
from safetensors.torch import save, save_file
from torch import Tensor

from diffitm.core import images, storage
from diffitm.core.config import parse
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.schema import Example, PairRow
from diffitm.evaluation import evaluate
from diffitm.metrics.credit import Credit
from diffitm.models.folder import Folder
from diffitm.models.lora import lora_weights, merge_lora, read_lora, save_lora
from diffitm.models.noise_schedule import NoiseSchedule
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.encoded_items import CACHED, Cache
from diffitm.scoring.noise_plan import make_plan
from diffitm.shapes.layouts import write_world
from diffitm.shapes.training import write_training
from diffitm.store.pair_table import write_examples
from diffitm.store.score_store import open_store
from diffitm.tasks.registry import find_task
from diffitm.training.latent_cache import CachedLoader
from diffitm.training.lora.objectives import OBJECTIVES, Objective
from diffitm.training.lora.options import FinetuneConfig, find_problems
from diffitm.training.lora.step import Posterior, Tuner
from diffitm.training.rows import (
    NEGATIVES,
    TrainingRow,
    drop_equal,
    images_of,
    read_rows,
    summarise_dropped,
    texts_of,
    usable,
)
from diffitm.training.run_folder import check_complete, open_run, write_log, write_result
from diffitm.training.sampler import MIXED, BatchSampler, Item, draw_noise, seed_of
from diffitm.training.tracking import RunTracker, track_problems, write_events
from diffitm.training.validation import credits
from tests import tiny
from tests.tiny import write_scores

HEAD = "\ttitle\tfilepath\tneg_caption\tneg_image\n"
SHAPE, STEPS = (4, 8, 8), [10, 260, 510, 760]
TABLE = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.99, 0.01, 1000), "epsilon")


# Rows --------------------------------------------------------------------------------------------


def test_rows_of_the_negclip_layout(tmp_path: Path) -> None:
    """Images outside of the file are none; negatives that are the row's own are dropped and counted."""
    file = tmp_path / "train_neg_clip.tsv"
    file.write_text(
        f"{HEAD}0\ta cup\ta.jpg\t['a cup', 'a cap']\t[1, 0, 99]\n1\ta dog\tb.jpg\t[]\t[0]\n"
    )
    rows, _ = read_rows(str(file))
    assert rows == [
        TrainingRow("a.jpg", "a cup", ("a cup", "a cap"), ("b.jpg", "a.jpg")),
        TrainingRow("b.jpg", "a dog", (), ("a.jpg",)),
    ]
    kept = [TrainingRow("a.jpg", "a cup", ("a cap",), ("b.jpg",)), rows[1]]
    assert drop_equal(rows) == (kept, 2)


def test_rows_of_parquet(tmp_path: Path) -> None:
    """A row for each caption; what cannot be used is told, each with its place."""
    table = {"image": ["a", None, "b"], "caption": [["x", "", "w"], ["y"], ["v"]]}
    table["negative_captions"] = [["z"], None, []]
    parquet.write_table(pa.table(table), tmp_path / "r.parquet")
    rows, lost = read_rows(str(tmp_path / "r.parquet"))
    assert rows == [
        TrainingRow("a", "x", ("z",)),
        TrainingRow("a", "w", ("z",)),
        TrainingRow("b", "v"),
    ]
    assert lost == {
        "r.parquet, row 0: the row has no text": 1,
        "r.parquet, row 1: the row names no image": 1,
    }


def test_what_training_can_use() -> None:
    rows = [TrainingRow("a", "x", ("z",)), TrainingRow("", "y")]
    assert usable(rows, "random-text", "f") == ([0], Counter({"no image": 1}))
    with pytest.raises(
        InputError, match="f: no row is usable with --negatives mixed: 1 row: no im"
    ):
        usable(rows[1:], "mixed", "f")
    with pytest.raises(InputError, match="1 row: no negative image, 1 row: no image"):
        usable(rows, "mixed", "f")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.tsv", HEAD + "0\ta cup\ta.jpg\tnothing\t[]\n", "its negative captions are no list"),
        ("a.tsv", HEAD + "0\ta cup\n", "line 2: 2 fields where the first line names 5"),
        ("a.parquet", "no", "cannot be read"),
        ("missing.tsv", None, "there is no file"),
    ],
)
def test_malformed_rows(tmp_path: Path, name: str, content: str | None, told: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as caught:
        read_rows(str(tmp_path / name))
    assert told in str(caught.value)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("row", "kinds"),
    [
        (TrainingRow("a", "x", ("y",), ("b",)), set()),
        (TrainingRow("a", "x", ("y",)), {"hard-image", "mixed", "all"}),
        (TrainingRow("a", "x", (), ("b",)), {"hard-text", "mixed", "all"}),
        (TrainingRow("a", " ", ("y",), ("b",)), set(NEGATIVES)),
        (TrainingRow(" ", "x", ("y",), ("b",)), set(NEGATIVES)),
    ],
)  # fmt: skip
def test_what_a_row_is_too_poor_for(row: TrainingRow, kinds: set[str]) -> None:
    assert {kind for kind in NEGATIVES if row.lacks(kind) is not None} == kinds


def test_negatives_that_say_the_same_are_dropped() -> None:
    """Empty ones, and the row's own words or image, whatever spaces are around them."""
    row = TrainingRow("a", "a cup", (" a cup ", " ", "", "a cap", "A cup"), ("a", "", "b"))
    assert drop_equal([row]) == ([TrainingRow("a", "a cup", ("a cap", "A cup"), ("b",))], 5)
    assert summarise_dropped(Counter({"no image": 1234, "no caption": 1})) == (
        "1,234 rows: no image, 1 row: no caption"
    )


def test_training_world(tmp_path: Path) -> None:
    """Two rows a scene with all negatives; each twin is the other's negative image."""
    write_training(str(tmp_path), 12)
    rows, lost = read_rows(str(tmp_path / "coco_neg/train_neg_clip.tsv"))
    assert len(rows) == 24 and not lost
    assert usable(rows, "mixed", "f") == (list(range(24)), Counter())
    assert all(rows[i ^ 1].image in row.negative_images for i, row in enumerate(rows))
    assert all((tmp_path / row.image).is_file() for row in rows)
    assert len(list(find_task("coco_neg_text")().examples(str(tmp_path)))) == 100


def shard(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def test_rows_of_webdataset_shards(tmp_path: Path) -> None:
    """Over two shards; the images are read from where they lie in them."""
    known = {"caption": "unused", "negative_captions": ["a blue one"], "negative_images": ["x/b"]}
    first = {
        "x/a.png": png("red"),
        "x/a.txt": b"a red one\n",
        "x/a.json": json.dumps(known).encode(),
    }
    shard(tmp_path / "s-00.tar", first)
    shard(tmp_path / "s-01.tar", {"x/b.PNG": png("blue"), "x/b.json": b'{"caption": "a blue one"}'})
    for given in ("s-{00..01}.tar", "s-*.tar"):
        rows, _ = read_rows(str(tmp_path / given))
        assert [row.caption for row in rows] == ["a red one", "a blue one"]
        assert rows[0].negative_captions == ("a blue one",)
        assert rows[0].negative_images == (rows[1].image,)
        pixels = [images.load(str(tmp_path), row.image)[0].getpixel((0, 0)) for row in rows]
        assert pixels == [(255, 0, 0), (0, 0, 255)]


def test_what_training_can_see() -> None:
    """Every image and text of the rows once, whatever their order; the empty text always."""
    rows = [
        TrainingRow("c", "x", ("y",), ("b",)),
        TrainingRow("b", "y", ("w",), ("c", "d")),
        TrainingRow("", "y"),
    ]
    for order in (rows, rows[::-1]):
        assert images_of(order) == ["b", "c", "d"]
        assert texts_of(order) == ["", "w", "x", "y"]


def test_cache_reads_by_name_within_its_limit(tmp_path: Path) -> None:
    """Every item as it was written, whatever is thrown out; failures have no value."""
    values = [torch.full((2, 3), float(i)) for i in range(10)]
    lines = [
        {
            "row": 0,
            "position": i,
            "name": f"n{i}",
            "failure": "broken" if i == 4 else None,
            "value": None if i == 4 else save({"mean": value}),
        }
        for i, value in enumerate(values)
    ]
    for part, some in (("a", lines[:7]), ("b", lines[7:])):
        table = pa.Table.from_pylist(some, CACHED)
        parquet.write_table(table, tmp_path / f"{part}.parquet", row_group_size=2)
    cache = Cache(str(tmp_path), limit=60)
    assert cache.failures == {"n4": "broken"}
    for names in (["n9", "n0", "n5"], ["n0", "n1"], ["n9"]):
        found = cache(names)["mean"]
        assert torch.equal(found, torch.stack([values[int(name[1])] for name in names]))
        assert cache.used <= 60


def test_cached_latents_of_a_micro_batch(tmp_path: Path) -> None:
    """Mean and deviation by path, and why an image has none; this worker's from this update on."""
    names = [f"{i}{end}.jpg" for i in range(4) for end in ("", "-x")]
    lines = []
    for position, name in enumerate(names):
        value = {"mean": torch.full(SHAPE, position), "deviation": torch.full(SHAPE, -position)}
        broken = "cut off" if name == "2-x.jpg" else None
        data = None if broken else save({k: v.float() for k, v in value.items()})
        lines.append(
            {"row": 0, "position": position, "name": name, "failure": broken, "value": data}
        )
    parquet.write_table(pa.Table.from_pylist(lines, CACHED), tmp_path / "a.parquet")
    rows = [TrainingRow(f"{i}.jpg", "c", (), (f"{i}-x.jpg",)) for i in range(4)]
    plan = BatchSampler(rows, range(4), 1, 2, "hard-image", False, 0)
    job: Any = SimpleNamespace(sampler=lambda: plan, steps=4)
    loader = CachedLoader(job, str(tmp_path), 1, 2)
    steps = list(loader.steps(1))
    assert len(steps) == 3 and loader.waited > 0
    for step, own in enumerate(steps, 1):
        ((items, latents, failures),) = own
        assert items == plan.batches(step)[1]
        lost = ["2-x.jpg: cut off"] if items[0].image == "2.jpg" else []
        assert failures == lost
        paths = {items[0].image, items[0].negative_image} - {"2-x.jpg"}
        assert latents.keys() == paths
        for path in paths:
            mean, deviation = latents[path]
            assert mean.shape == SHAPE and mean[0, 0, 0] == names.index(path)
            assert torch.equal(deviation, -mean)
    assert CachedLoader(job, str(tmp_path), 0, 1)._latents(
        [Item(0, "2-x.jpg", "c", "2-x.jpg", "c", 0)]
    ) == ({}, ["2-x.jpg: cut off"])


def test_trackers_get_every_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's events are there while the run goes on; W&B and MLflow get values and steps."""
    told: list[tuple[object, ...]] = []
    run = SimpleNamespace(
        log=lambda values, step: told.append(("wandb", values, step)),
        finish=lambda: told.append(("wandb ends",)),
    )
    wandb = SimpleNamespace(init=lambda **options: told.append(("init", options["id"])) or run)
    mlflow = SimpleNamespace(
        set_experiment=lambda name: None,
        search_runs=lambda **options: [],
        start_run=lambda **options: SimpleNamespace(info=SimpleNamespace(run_id="r")),
        log_params=lambda settings: told.append(("params", settings)),
        log_metrics=lambda values, step, run_id: told.append(("mlflow", values, step, run_id)),
        end_run=lambda: told.append(("mlflow ends",)),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    curves = RunTracker(["wandb", "mlflow"], str(tmp_path), "key", {"lr": 1})
    curves.add({"step": 5, "loss": 0.5})
    (written,) = (tmp_path / "tensorboard").iterdir()
    end = time.monotonic() + 20
    while b"loss" not in written.read_bytes():  # a thread writes
        assert time.monotonic() < end
        time.sleep(0.1)
    curves.close()
    assert told[:2] == [("init", "key"), ("params", {"lr": 1})]
    assert told[2:4] == [("wandb", {"loss": 0.5}, 5), ("mlflow", {"loss": 0.5}, 5, "r")]
    assert told[4:] == [("wandb ends",), ("mlflow ends",)]
    write_events([{"step": 5, "loss": 0.5}, {"step": 6, "loss": 0.4}], str(tmp_path))
    (whole,) = (tmp_path / "tensorboard").iterdir()
    assert whole.read_bytes().count(b"loss") == 2


def test_a_tracker_that_fails_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[int] = []

    def log(values: dict[str, float], step: int) -> None:
        shown.append(step)
        raise OSError("no network")

    run = SimpleNamespace(log=log, finish=lambda: shown.append(-1))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    curves = RunTracker(["wandb"], str(tmp_path), "key", {})
    for step in range(3):
        curves.add({"step": step, "loss": 0.5})
    curves.close()
    assert shown == [0]
    assert "--track wandb: gets no more lines: OSError: no network" in caplog.text


def test_a_run_keeps_its_name_and_its_settings(tmp_path: Path) -> None:
    known = open_run(str(tmp_path), {"lr": 1})
    assert known == open_run(str(tmp_path), {"lr": 1})
    assert known.key != open_run(str(tmp_path / "other"), {"lr": 1}).key
    with pytest.raises(InputError, match="lr was 1 and is 2"):
        open_run(str(tmp_path), {"lr": 2})


@pytest.mark.parametrize("files", [{"w": 1.0}, {"w": 1.0, "a": 2.0}, {"w": 1.0, "b": 3.0}])
@pytest.mark.parametrize("averaged", [False, True])
def test_what_a_run_leaves(tmp_path: Path, files: dict[str, float], averaged: bool) -> None:
    """The weights that the validation chose, else the averaged ones, else the last; log, failures,
    provenance, and a note that it is done."""
    out, checkpoint = str(tmp_path / "out"), tmp_path / "checkpoint"
    checkpoint.mkdir()
    if averaged:
        files = files | {"a": 2.0}
    names = {"w": "weights", "a": "averaged", "b": "best"}
    for key, value in files.items():
        tensors = {"unet.x.lora_A.weight": torch.full((2, 2), value)}
        save_file(tensors, checkpoint / f"{names[key]}.safetensors")
    history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    progress = {"history": history, "best_step": 1, "best": 0.5}
    (checkpoint / "history.json").write_text(json.dumps(progress))
    state, lost = open_run(out, {"lr": 1}), {"a.jpg: s3://k:secret@b/a": 2}
    assert not state.done
    save = partial(save_lora, rank=2)
    assert write_result(checkpoint, save, {"lr": 1}, state, {"commit": "c"}, lost, out) == progress
    last = files.get("a", files["w"])
    for folder, value in ((out, files.get("b", last)), (f"{out}/last", last)):
        tensors, scale = read_lora(folder)
        assert scale == 1 and float(tensors["unet.x.lora_A.weight"][0, 0]) == value
    text = (tmp_path / "out" / "log.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == history
    note = json.loads((tmp_path / "out" / "training.json").read_text())
    assert note == {"settings": {"lr": 1}, "done": True, "key": state.key, "best_step": 1}
    assert open_run(out, {"lr": 1}).done
    assert json.loads((tmp_path / "out" / "provenance.json").read_text()) == {"commit": "c"}
    failures = (tmp_path / "out" / "failures.json").read_text()
    assert list(json.loads(failures).values()) == [2] and "secret" not in failures
    with pytest.raises(Incomplete, match="1 images, texts or shards could not be used"):
        check_complete(out)
    write_log(checkpoint, {}, {}, out)
    check_complete(out)


def test_settings_that_are_gone_or_new(tmp_path: Path) -> None:
    """Are told like those that have another value."""
    open_run(str(tmp_path), {"pipeline": "p", "a": 1, "b": 2})
    with pytest.raises(InputError, match=r"\(b was 2 and is None, c was None and is 3\)"):
        open_run(str(tmp_path), {"pipeline": "p", "a": 1, "c": 3})


def test_stamp_changes_with_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    before = storage.stamp(str(tmp_path), ["a", "missing"])
    assert before == storage.stamp(str(tmp_path), ["a", "missing"])
    (tmp_path / "a").write_bytes(b"22")
    assert storage.stamp(str(tmp_path), ["a", "missing"]) != before
    assert storage.stamp("memory://x", ["a"]) is None


def test_trackers_that_are_not_there() -> None:
    told = track_problems(["wandbb", "mlflow" if not find_spec("mlflow") else "wandb"])
    assert told[0].startswith("--track wandbb: must be one of wandb, mlflow; did you mean 'wandb'")
    assert len(told) == 1 or "is not installed; pip install" in told[1]


# Draws -------------------------------------------------------------------------------------------


def a_schedule(**more: Any) -> BatchSampler:
    rows = [
        TrainingRow(f"{i}.jpg", f"c{i}", (f"n{i}", f"m{i}"), (f"{i}-x.jpg",)) for i in range(40)
    ]
    options = {"size": 4, "micro": 2, "negatives": "mixed", "per_example": False, "seed": 0}
    return BatchSampler(rows, list(range(37)), **{**options, **more})


def test_an_epoch_sees_every_row_once() -> None:
    schedule = a_schedule()
    assert schedule.steps_per_epoch == 4
    seen = [
        [i.position for step in range(e, e + 4) for b in schedule.batches(step) for i in b]
        for e in (0, 4)
    ]
    assert all(len(set(epoch)) == 32 for epoch in seen)
    assert seen[0] != seen[1]
    assert a_schedule().batches(6) == schedule.batches(6)  # whatever was asked before
    assert a_schedule(seed=1).batches(0) != schedule.batches(0)


def test_workers_share_the_micro_batches_of_a_step_out() -> None:
    """Each once, whatever the number of workers; one without a micro-batch has none."""
    whole = a_schedule(size=2, micro=4).batches(3)
    for world in (1, 2, 3, 5):
        shares = [a_schedule(size=2, micro=4).batches(3, rank, world) for rank in range(world)]
        dealt = [shares[number % world][number // world] for number in range(4)]
        assert dealt == whole
        assert sum(map(len, shares)) == 4


def test_kinds_of_negatives() -> None:
    """One kind a micro-batch in the published shares, or one an example."""

    def kind(item: Item) -> str:
        own = int(item.image.split(".")[0])
        if item.negative_image != item.image:
            assert item.negative_image == f"{own}-x.jpg" and item.negative_caption == item.caption
            return "hard-image"
        if item.negative_caption in (f"n{own}", f"m{own}"):
            return "hard-text"
        assert item.negative_caption.startswith("c") and item.negative_caption != item.caption
        return "random-text"

    batches = [b for step in range(400) for b in a_schedule().batches(step)]
    kinds = [{kind(item) for item in batch} for batch in batches]
    assert all(len(found) == 1 for found in kinds)
    shares = Counter(next(iter(found)) for found in kinds)
    for name, share in MIXED.items():
        assert shares[name] / len(kinds) == pytest.approx(share, abs=0.05)
    mixed = [
        {kind(i) for i in b} for s in range(50) for b in a_schedule(per_example=True).batches(s)
    ]
    assert max(map(len, mixed)) == 3
    for name in MIXED:
        items = [i for s in range(4) for b in a_schedule(negatives=name).batches(s) for i in b]
        assert {kind(item) for item in items} == {name}


def plain_seed(*parts: object) -> int:
    text = "\n".join(str(part) for part in parts)
    return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) // 2


def test_draws_are_those_of_plain_code() -> None:
    """Which a run with the same seed draws again years later: order, examples, kinds, noise."""
    schedule = a_schedule(seed=5)
    shares = [0.5, 0.25, 0.25]
    for step in (0, 5):
        epoch = step // 4
        order = np.random.default_rng(plain_seed(5, "epoch", epoch)).permutation(np.arange(37))
        for number, batch in enumerate(schedule.batches(step)):
            first = step % 4 * 8 + number * 4
            assert [item.position for item in batch] == order[first : first + 4].tolist()
            seeds = [plain_seed(5, "example", epoch, item.position) for item in batch]
            assert [item.seed for item in batch] == seeds
            rng = np.random.default_rng(plain_seed(5, "kind", step, number))
            kind = rng.choice(["hard-image", "hard-text", "random-text"], p=shares)
            assert all((i.negative_image != i.image) == (kind == "hard-image") for i in batch)
    generator = torch.Generator().manual_seed(9)
    at = torch.randint(1000, (1,), generator=generator)
    noise, posterior = torch.randn(2, 1, *SHAPE, generator=generator)
    found = draw_noise([9], SHAPE, TABLE)
    assert torch.equal(found.timesteps, at)
    assert torch.equal(found.noise, noise) and torch.equal(found.posterior, posterior)


def test_an_example_has_other_noise_in_each_epoch() -> None:
    schedule = a_schedule()
    items = [i for step in range(12) for batch in schedule.batches(step) for i in batch]
    assert len({item.seed for item in items}) == len(items) == 3 * 32


def test_a_random_text_is_of_another_image() -> None:
    """And not the row's own words; of the usable rows alone."""
    rows = [
        *(TrainingRow("a.jpg", "a cup"), TrainingRow("a.jpg", "my cup")),
        *(TrainingRow("b.jpg", "a cup"), TrainingRow("c.jpg", "a dog"), TrainingRow("d.jpg", "x")),
    ]
    schedule = BatchSampler(rows, range(4), 4, 1, "random-text", False, 0)
    drawn: dict[int, set[str]] = {}
    for step in range(40):
        for item in schedule.batches(step)[0]:
            drawn.setdefault(item.position, set()).add(item.negative_caption)
    assert drawn[0] == {"a dog"} and drawn[1] == {"a cup", "a dog"}
    assert drawn[2] == {"my cup", "a dog"} and drawn[3] == {"a cup", "my cup"}
    with pytest.raises(InputError, match="no other caption was found for 'a cup'"):
        BatchSampler(rows, range(2), 1, 1, "random-text", False, 0).batches(0)


def test_noise_is_an_examples_own() -> None:
    """Whatever batch it is in; timesteps are uniform."""
    seeds = [seed_of("x", i) for i in range(500)]
    whole, one = draw_noise(seeds, SHAPE, TABLE), draw_noise(seeds[7:8], SHAPE, TABLE)
    assert torch.equal(whole.noise[7:8], one.noise)
    assert torch.equal(whole.posterior[7:8], one.posterior)
    assert whole.timesteps[7] == one.timesteps[0]
    assert not torch.equal(whole.noise, whole.posterior)
    assert abs(float(whole.timesteps.float().mean()) - 499.5) < 50
    assert whole.timesteps.min() >= 0 and whole.timesteps.max() < 1000


# The update step ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return tiny.write_sd(tmp_path_factory.mktemp("sd"), request.param)


def items() -> list[Item]:
    captions = ["a red circle", "a blue square", "a green cross"]
    return [
        Item(i, f"{i}", captions[i], f"{i}-", captions[(i + 1) % 3], seed_of("t", i))
        for i in range(3)
    ]


def posteriors() -> tuple[Posterior, Posterior]:
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(3, *SHAPE, generator=generator) for _ in range(4)]
    return Posterior(draw[0], 0.1 * draw[1].abs()), Posterior(draw[2], 0.1 * draw[3].abs())


def plain_error(model: StableDiffusion, p: Posterior, item: Item, i: int, text: str) -> Tensor:
    """One pair at a time, from diffusers' own parts."""
    from diffusers import DDPMScheduler

    folder = model.unet.config._name_or_path.removesuffix("/unet")
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    drawn = draw_noise([item.seed], SHAPE, model.schedule)
    z0 = p.mean[i : i + 1] + p.std[i : i + 1] * drawn.posterior
    noised = scheduler.add_noise(z0, drawn.noise, drawn.timesteps)
    hidden = model.encode_texts([text])["hidden"].clone()
    predicted = model.unet(noised, drawn.timesteps, hidden).sample
    target = drawn.noise
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(z0, drawn.noise, drawn.timesteps)
    return torch.stack([((predicted - target) ** 2).mean(), *predicted.flatten()])


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("name", ["no-neg", "hard-neg", "relativistic", "soft-neg"])
def test_losses_equal_plain_code(folder: Path, name: str, images: bool) -> None:
    """Right and wrong in one batch as one pair after the other, loss and gradients."""
    tuner = Tuner(StableDiffusion(Folder(str(folder))), Objective(name), rank=2)
    disturb(tuner)
    right, wrong = posteriors()
    found = tuner.losses(items(), right, wrong if images else None)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in tuner.parameters]
    tuner.network.zero_grad()
    total, rights, contrasts = torch.zeros(()), list[Tensor](), list[Tensor]()
    for i, item in enumerate(items()):
        one = plain_error(tuner.denoiser, right, item, i, item.caption)
        other = wrong if images and name != "soft-neg" else right
        text = "" if name == "soft-neg" else item.negative_caption
        two = plain_error(tuner.denoiser, other, item, i, text)
        contrast = ((two[1:] - one[1:]) ** 2).mean() if name == "relativistic" else two[0]
        loss = {
            "no-neg": one[0],
            "soft-neg": one[0] - contrast,
        }.get(name, one[0] - torch.minimum(contrast, one[0].detach()))
        total = total + loss / 3
        rights.append(one[0].detach())
        contrasts.append(contrast.detach())
    total.backward()
    assert not found.right.requires_grad and not found.contrast.requires_grad
    torch.testing.assert_close(found.right, torch.stack(rights).mean(), rtol=1e-4, atol=1e-5)
    logged = torch.zeros(()) if name == "no-neg" else torch.stack(contrasts).mean()
    torch.testing.assert_close(found.contrast, logged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.loss, total, atol=1e-5, rtol=1e-4)
    for parameter, gradient in zip(tuner.parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("images", [False, True])
def test_dpo_equals_plain_code(folder: Path, images: bool) -> None:
    """The reference is the same network without its LoRA, one pair after the other."""
    model, base = StableDiffusion(Folder(str(folder))), StableDiffusion(Folder(str(folder)))
    tuner = Tuner(model, Objective("dpo", beta=4.0), rank=2)
    right, wrong = posteriors()
    start = tuner.losses(items(), right, wrong if images else None)
    assert start.loss.item() == pytest.approx(np.log(2), rel=1e-6)
    disturb(tuner)
    found = tuner.losses(items(), right, wrong if images else None)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in tuner.parameters]
    tuner.network.zero_grad()
    total = torch.zeros(())
    for i, item in enumerate(items()):
        other, texts = wrong if images else right, (item.caption, item.negative_caption)
        m = [
            plain_error(model, p, item, i, t)[0] for p, t in zip((right, other), texts, strict=True)
        ]
        with torch.no_grad():
            r = [
                plain_error(base, p, item, i, t)[0]
                for p, t in zip((right, other), texts, strict=True)
            ]
        u = (r[0] - r[1]) - (m[0] - m[1])
        total = total + torch.log1p(torch.exp(-4.0 * u)) / 3
    total.backward()
    torch.testing.assert_close(found.loss, total, atol=1e-5, rtol=1e-4)
    for parameter, gradient in zip(tuner.parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
    assert sum(float(g.norm()) for g in gradients) > 1e-3


def test_softrepa_equals_plain_code(folder: Path) -> None:
    """Every image with every text, at the first example's timestep and noise."""
    model = StableDiffusion(Folder(str(folder)))
    tuner = Tuner(model, Objective("softrepa", temperature=2.0, diagonal=3.0), rank=2)
    disturb(tuner)
    right, _ = posteriors()
    found = tuner.losses(items(), right, None)
    found.loss.backward()
    gradients = [parameter.grad.clone() for parameter in tuner.parameters]
    tuner.network.zero_grad()
    own = [draw_noise([item.seed], SHAPE, model.schedule) for item in items()]
    rows = []
    for i in range(3):
        z0 = right.mean[i : i + 1] + right.std[i : i + 1] * own[i].posterior
        noised = model.schedule.add_noise(z0, own[0].noise, own[0].timesteps)
        target = model.schedule.target(z0, own[0].noise, own[0].timesteps)
        line = []
        for item in items():
            hidden = model.encode_texts([item.caption])["hidden"].clone()
            predicted = model.unet(noised, own[0].timesteps, hidden).sample
            line.append(((predicted - target) ** 2).mean())
        rows.append(line)
    total, logit = torch.zeros(()), [[4 * torch.exp(-e / 2.0) for e in line] for line in rows]
    for i in range(3):
        texts = torch.log(sum(torch.exp(logit[i][j]) for j in range(3)))
        images = torch.log(sum(torch.exp(logit[j][i]) for j in range(3)))
        total = total + ((texts + images) / 2 - logit[i][i] + 3.0 * rows[i][i]) / 3
    total.backward()
    torch.testing.assert_close(found.loss, total, atol=1e-5, rtol=1e-4)
    for parameter, gradient in zip(tuner.parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
    others = torch.stack([rows[i][j].detach() for i in range(3) for j in range(3) if i != j])
    torch.testing.assert_close(found.contrast, others.mean(), rtol=1e-4, atol=1e-5)
    one = Posterior(right.mean[:1], right.std[:1])
    alone = tuner.losses(items()[:1], one, None)  # the others' images could not be read
    assert float(alone.contrast) == 0
    torch.testing.assert_close(alone.loss, 3.0 * alone.right)


def disturb(tuner: Tuner) -> None:
    """Weights as those of a LoRA in training: B starts at zero, where half of the gradients vanish."""
    for parameter in tuner.parameters:
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(3))


def test_only_the_lora_learns(folder: Path) -> None:
    """A new LoRA changes nothing; an update changes it alone; frozen guards take the base model."""
    model = StableDiffusion(Folder(str(folder)))
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    right, _ = posteriors()
    base = Tuner(StableDiffusion(Folder(str(folder))), Objective("soft-neg", guard="frozen"))
    tuner = Tuner(model, Objective("soft-neg"))
    for seed in (0, 1):
        other = Tuner(StableDiffusion(Folder(str(folder))), Objective("no-neg"), seed=seed)
        same = all(map(torch.equal, tuner.parameters, other.parameters))
        assert same == (seed == 0)
    contrast = base.losses(items(), right, None).contrast
    torch.testing.assert_close(tuner.losses(items(), right, None).contrast, contrast)
    optimizer = torch.optim.SGD(tuner.parameters, lr=1.0)
    first = tuner.losses(items(), right, None)
    first.loss.backward()
    optimizer.step()
    after = {k.replace(".base_layer", ""): v for k, v in model.unet.state_dict().items()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert tuner.losses(items(), right, None).loss < first.loss
    for mine, theirs in zip(base.parameters, tuner.parameters, strict=True):
        mine.data.copy_(theirs.data)
    moved = base.losses(items(), right, None)
    torch.testing.assert_close(moved.contrast, first.contrast)
    torch.testing.assert_close(moved.right, tuner.losses(items(), right, None).right)
    assert not torch.allclose(moved.right, first.right)


def test_lora_file_is_read_by_diffusers_and_by_us(folder: Path, tmp_path: Path) -> None:
    """A stock pipeline with the file predicts what the tuner does; so does gdbench's merge."""
    tuner = Tuner(StableDiffusion(Folder(str(folder))), Objective("no-neg"), rank=2)
    for parameter in tuner.parameters:
        torch.nn.init.normal_(parameter, std=0.2)
    save_lora(lora_weights(tuner.network), str(tmp_path), 2)
    generator = torch.Generator().manual_seed(1)
    z, hidden = (
        torch.randn(2, *SHAPE, generator=generator),
        torch.randn(2, 16, 32, generator=generator),
    )
    at = torch.tensor([3, 700])
    with torch.no_grad():
        expected = tuner.network(z, at, hidden).sample
        pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(
            pipeline.unet(z, at, hidden).sample, expected, atol=1e-5, rtol=1e-4
        )
        merged = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        tensors, scale = read_lora(str(tmp_path))
        assert merge_lora(merged, tensors, scale) == len(tensors)
        torch.testing.assert_close(merged(z, at, hidden).sample, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["coco_neg_text", "coco_neg_image"])
def test_validation_equals_gdbench(tmp_path: Path, name: str) -> None:
    """The same scores and credits as those of a store that gdbench evaluates."""
    write_world(str(tmp_path), 20)
    model = StableDiffusion(Folder(str(tiny.write_sd(tmp_path / "sd"))))
    scorer = DiffusionScorer(model, make_plan(STEPS, SHAPE), str(tmp_path))
    task = find_task(name)()
    examples = list(task.examples(str(tmp_path)))
    found = credits(task, examples, scorer)
    uri, count = write_examples(name, examples, str(tmp_path / "e"), None)
    assert count == len(found) == 10
    store = open_store(
        str(tmp_path),
        "m",
        {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10, 260, 510, 760]},
    )
    pairs: dict[str, set[str]] = {}
    for example in examples:
        for image in example.images:
            pairs.setdefault(image, set()).update([*example.texts, ""])
    work = [PairRow(i, image, sorted(texts)) for i, (image, texts) in enumerate(pairs.items())]
    write_scores(store, scorer.score(work))
    rows = evaluate.evaluate({name: uri}, [store]).rows
    last = [row for row in rows if row.group == "all"][-1]
    assert np.mean([value for value in found if value is not None]) == pytest.approx(last.value)


def test_an_unreadable_image_costs_a_validation_its_own_examples(tmp_path: Path) -> None:
    """A scorer gives the lines of failures first."""
    write_world(str(tmp_path), 20)
    model = StableDiffusion(Folder(str(tiny.write_sd(tmp_path / "sd"))))
    scorer = DiffusionScorer(model, make_plan(STEPS, SHAPE), str(tmp_path))
    task = find_task("coco_neg_text")()
    examples = list(task.examples(str(tmp_path)))
    whole = credits(task, examples, scorer)
    broken = examples[3].images[0]
    (tmp_path / broken).write_bytes(b"no image")
    lost = [broken in example.images for example in examples]
    found = credits(task, examples, scorer)
    assert found == [None if out else credit for out, credit in zip(lost, whole, strict=True)]


@pytest.mark.parametrize("kind", ["l2", "similarity"])
def test_credits_by_hand(kind: str) -> None:
    """In the first metric: errors less the empty text's where images are compared, else errors alone;
    cosines; none of what cannot be scored."""
    values = {
        ("a", "x"): [1.0, 3.0], ("a", "y"): [4.0, 6.0], ("a", ""): [0.0, 1.0],
        ("b", "x"): [7.0, 7.0], ("b", "y"): [0.5, 1.5], ("b", ""): [5.0, 6.0],
    }  # fmt: skip
    asked: list[PairRow] = []

    class Scorer:
        def score(self, rows: list[PairRow]) -> list[dict[str, Any]]:
            asked.extend(rows)
            return [
                {"image": row.image, "text": text, "l2": None, "similarity": None, "failure": None}
                | {kind: values.get((row.image, text), [8.0, 8.0])}
                | ({kind: values.get((row.image, text), [8.0])[0]} if kind != "l2" else {})
                | ({"failure": "unreadable"} if row.image == "broken" else {})
                for row in rows
                for text in row.texts
            ]

    def first(example: Example, scores: np.ndarray) -> dict[str, Credit]:
        assert scores.shape == (len(example.images), len(example.texts))
        return {"text": Credit(float(scores[-1, 0])), "image": Credit(99.0)}

    examples = [
        Example("0", ("a",), ("x", "y"), "text"),
        Example("1", ("a", "b"), ("x", "y"), "both"),
        Example("2", ("broken", "a"), ("x",), "image"),
        Example("3", ("a",), ("x", "z"), "text", failure="empty"),
    ]
    task: Any = SimpleNamespace(credits=first)
    scorer: Any = Scorer()
    expected = [-2.0, -(7.0 - 5.5)] if kind == "l2" else [1.0, 7.0]
    assert credits(task, examples, scorer) == [*expected, None, None]
    texts = {row.image: set(row.texts) for row in asked}
    assert texts == {"a": {"x", "y", ""}, "b": {"x", "y", ""}, "broken": {"x", ""}}
    assert [row.row for row in asked] == [0, 1, 2]
    assert credits(task, examples[3:], scorer) == [None]


# Options -----------------------------------------------------------------------------------------


def test_preset_and_lambda() -> None:
    """A preset's values are defaults; --lambda is a field although it is a keyword."""
    config = parse(
        FinetuneConfig, ["--preset", "diffusionitm", "--batch-size", "8", "--lambda", "0.5"]
    )
    assert (config.effective_batch, config.clip_over, config.epochs) == (112, "microbatch", 8)
    assert (config.batch_size, config.lambda_) == (8, 0.5)
    soft = parse(FinetuneConfig, ["--preset", "softneg-sd15", "--data", "x"])
    assert (soft.objective, soft.model[-4:]) == ("soft-neg", "v1-5")
    with pytest.raises(InputError, match="--preset nothing: must be one of diffusionitm"):
        parse(FinetuneConfig, ["--preset", "nothing"])


def test_objectives_without_wrong_pairs_need_no_negatives() -> None:
    """Rows of captions alone are usable, and a batch holds nothing but them."""
    assert [Objective(n).has_wrong_pairs for n in OBJECTIVES] == [
        *(False, True, True, True, False, True, False)
    ]
    schedule = a_schedule(negatives="none")
    items = [item for batch in schedule.batches(0) for item in batch]
    assert all((i.negative_image, i.negative_caption) == (i.image, i.caption) for i in items)
    rows = [TrainingRow("a.jpg", "x")]
    assert usable(rows, "none", "f") == ([0], Counter())


def test_problems_are_told_together() -> None:
    config = FinetuneConfig(
        lambda_=-1, lr=0, workers="3:2", ema=2, steps=0, objective="hardneg", effective_batch=30
    )
    told = "\n".join(find_problems(config))
    for part in (
        "give --model",
        "give --data",
        "--objective 'hardneg' is unknown",
        "--lr 0: must be above 0",
        "--effective-batch 30: must be a multiple of --batch-size 8",
        "--workers 3:2: must be a number of processes, or MIN:MAX",
        "--ema 2: must lie between 0 and 1",
        "--steps 0: must be at least 1",
    ):
        assert part in told
    assert "--lambda -1: must be 0 or more" in find_problems(FinetuneConfig(lambda_=-1))[-1]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["softrepa", "--batch-size", "1"], "--batch-size 1: softrepa contrasts a micro-batch's"),
        (["dpo", "--scale", "2"], "--scale 2.0: only softrepa takes one, not dpo"),
        (["no-neg", "--beta", "2"], "--beta 2.0: only dpo takes one, not no-neg"),
        (["dpo", "--guard", "clip"], "--guard clip: only soft-neg takes one, not dpo"),
        (["softrepa", "--lambda", "2"], "--lambda 2: softrepa has no bound"),
        (["no-neg", "--lambda", "2"], "--lambda 2: no-neg has no bound"),
        (["soft-neg", "--lambda", "2"], "--lambda 2: soft-neg has no bound"),
        (["dpt", "--beta", "2"], "--beta 2.0: dpt has no use for it"),
    ],
)
def test_settings_of_other_objectives(options: list[str], problem: str) -> None:
    given = ["--model", "shapes", "--data", "shapes", "--objective", *options]
    (found,) = find_problems(parse(FinetuneConfig, given))
    assert problem in found


def test_the_bound_of_a_guard_and_the_control_of_a_preset() -> None:
    shared = ["--model", "shapes", "--data", "shapes", "--objective"]
    for more in (
        ["soft-neg", "--guard", "clip", "--lambda", "2"],
        ["no-neg", "--preset", "diffusionitm"],
    ):
        assert find_problems(parse(FinetuneConfig, [*shared, *more])) == []
