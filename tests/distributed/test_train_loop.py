"""Updates do not depend on how many workers share them out, nor on a change of that number."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffitm.commands import diva, finetune
from diffitm.commands.workers.diva import DivaModule
from diffitm.commands.workers.lora import LoraModule
from diffitm.commands.workers.sds import SdsModule
from diffitm.distributed import train_loop
from diffitm.distributed.trainer import hand_over
from diffitm.models.clip import resolve_clip
from diffitm.models.loading import resolve
from diffitm.shapes.training import write_training
from diffitm.training.diva.options import DivaConfig
from diffitm.training.image_pool import Paths, read_images
from diffitm.training.job import DivaJob, LoraJob, SdsJob
from diffitm.training.lora.objectives import Objective
from diffitm.training.lora.options import FinetuneConfig
from diffitm.training.module import Worker
from diffitm.training.rows import read_rows
from tests.ranks import Ranks
from tests.training_runs import norm

STEPS, SIZE, MICRO = 3, 2, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn scenes, of which the images of a whole micro-batch of the first update cannot be read."""
    root = tmp_path_factory.mktemp("ranks") / "data"
    write_training(str(root), 30)
    batches = lora_job(root).sampler().batches(0)
    for item in batches[1]:
        (root / item.image).write_bytes(b"no image")
    return root


def lora_job(root: Path, **more: Any) -> LoraJob:
    config = FinetuneConfig(
        batch_size=SIZE, effective_batch=SIZE * MICRO, steps=STEPS, lr=1e-2, checkpoint_every=100,
        log_every=1, objective="hard-neg", clip_over="microbatch",
    )  # fmt: skip
    rows, _ = read_rows(str(root / "coco_neg" / "train_neg_clip.tsv"))
    file = hand_over(str(root.parent / "out"), rows, range(len(rows)))
    model = resolve("shapes")
    job = finetune._job(config, model, "hard-text", file, str(root), None, 0)
    return replace(job, **more)


def diva_job(root: Path, **more: Any) -> DivaJob:
    config = DivaConfig(
        batch_size=SIZE, effective_batch=SIZE * MICRO, steps=STEPS, lr=0.03, checkpoint_every=100,
        log_every=1, recap="random:0.3", projection_steps=1, measure_every=0, held_out=0,
    )  # fmt: skip
    images = root / "coco" / "train"
    paths, _ = read_images(str(images))
    file = hand_over(str(root.parent / "out"), Paths(paths), range(len(paths)))
    teacher, clip = resolve("shapes"), resolve_clip("shapes")
    job = diva._job(config, teacher, clip, str(images), file, [], None, 0)
    return replace(job, **more)


def sds_job(root: Path, **more: Any) -> SdsJob:
    shared = lora_job(root)
    kept = {
        field.name: getattr(shared, field.name)
        for field in fields(SdsJob)
        if hasattr(shared, field.name)
    }
    job = SdsJob(**kept, clip=resolve_clip("shapes"), projection_lr=0.1, weight=0.5, jacobian=True)
    return replace(job, negatives="none", optimizer="sgd", lr=0.1, **more)


def assert_same(found: Ranks, expected: Ranks) -> None:
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-4)
    theirs, ours = expected.weights(), found.weights()
    assert norm({k: ours[k] - theirs[k] for k in theirs}) < 1e-4 * norm(theirs)
    assert found.monitor.lost == expected.monitor.lost


def test_lora_on_any_number_of_workers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one loses all its images, and where one has no micro-batch at all."""
    runs = {}
    for workers in (1, 5):
        (tmp_path / str(workers)).mkdir()
        runs[workers] = Ranks(tmp_path / str(workers), monkeypatch)
        assert runs[workers].train(LoraModule, lora_job(world), workers) == [STEPS] * workers
        assert len(runs[workers].losses()) == STEPS
        assert_same(runs[workers], runs[1])
    assert len(runs[1].monitor.lost) == SIZE
    assert norm(runs[1].weights()) > 0


def test_diva_while_the_number_of_workers_changes(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group that is to make room for a larger one ends with a checkpoint after its update; the
    tower joins in at the second update, each of several losses an image."""
    monkeypatch.setattr(train_loop, "ASK_EVERY", 0.0)
    alone, changing = (Ranks(tmp_path, monkeypatch), Ranks(tmp_path / "b", monkeypatch))
    changing.folder.mkdir()
    for ranks, groups in ((alone, [(1, STEPS)]), (changing, [(2, 1), (3, STEPS)])):
        for name in ("get_context", "get_checkpoint", "report"):
            monkeypatch.setattr("ray.train." + name, getattr(ranks, name))
        monkeypatch.setattr(torch.distributed, "all_reduce", ranks.all_reduce)
        for workers, steps in groups:
            ranks.monitor.open()
            if steps < STEPS:
                ranks.monitor.grow()
            assert ranks.train(DivaModule, diva_job(world), workers) == [steps] * workers
    assert_same(changing, alone)
    assert len(changing.checkpoints) == 2


@pytest.mark.parametrize("name", ["dpo", "softrepa"])
def test_other_objectives_of_a_lora(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Two workers, and two groups of which the second goes on from the first one's checkpoint."""
    negatives = "hard-text" if name == "dpo" else "none"
    job = lora_job(world, objective=Objective(name), negatives=negatives, checkpoint_every=1)
    runs = {}
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        runs[workers] = Ranks(tmp_path / str(workers), monkeypatch)
        if workers == 2:
            assert runs[2].train(LoraModule, replace(job, steps=1), 1) == [1]
        assert runs[workers].train(LoraModule, job, workers) == [STEPS] * workers
    assert_same(runs[2], runs[1])
    assert norm(runs[1].weights()) > 0


def test_sds_on_any_number_of_workers(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contrast is over all workers' examples, also where one has none; a second group goes on from the
    first one's checkpoint."""
    job, runs = sds_job(world, checkpoint_every=1), {}
    for workers in (1, 5):
        (tmp_path / str(workers)).mkdir()
        runs[workers] = Ranks(tmp_path / str(workers), monkeypatch)
        if workers == 5:
            assert runs[5].train(SdsModule, replace(job, steps=1), 1) == [1]
        assert runs[workers].train(SdsModule, job, workers) == [STEPS] * workers
        assert len(runs[workers].losses()) == STEPS
        assert_same(runs[workers], runs[1])
    assert len(runs[1].monitor.lost) == SIZE
    before = SdsModule(job, Worker(0, 1, torch.device("cpu"), 1.0, None)).weights()
    moved = norm({k: v - before[k] for k, v in runs[1].weights().items()})
    found = norm({k: v - runs[5].weights()[k] for k, v in runs[1].weights().items()})
    assert found < 1e-2 * moved


def test_a_loss_that_is_not_finite_stops_all_workers_alike(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the update after the one that spoiled the weights; the checkpoint before stays."""
    ranks = Ranks(tmp_path, monkeypatch)
    job = lora_job(world, lr=1e30, max_grad_norm=1e30, checkpoint_every=1)
    assert len(set(ranks.train(LoraModule, job, 2))) == 1
    assert ranks.monitor.stopped is not None
    assert "the loss of row" in ranks.monitor.stopped or "gradient" in ranks.monitor.stopped
    assert all(torch.isfinite(v).all() for v in ranks.weights().values())


def test_an_update_of_no_image_stops_all_workers_alike(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = Ranks(tmp_path, monkeypatch)
    job = replace(lora_job(world), root=str(tmp_path / "elsewhere"))
    assert ranks.train(LoraModule, job, 2) == [0, 0]
    assert "step 1: none of its images could be read: coco/train/" in str(ranks.monitor.stopped)
    assert ranks.checkpoints == []
