"""finetune.py as a user runs it: workers, kills, resumes, bad numbers, changed settings."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from diffitm.models.folder import Folder
from diffitm.models.lora import merge_lora, read_lora
from diffitm.models.stable_diffusion import StableDiffusion
from tests import pipeline
from tests.pipeline import ROOT, kill
from tests.training_runs import checkpoints, losses, norm, wait_for, wait_until

pytestmark = pytest.mark.slow
SHAPES = ROOT / "diffitm" / "shapes" / "weights" / "diffusion"
SMALL = (
    *("--model", "shapes", "--data", "shapes", "--scenes", 30, "--steps", 50, "--batch-size", 2),
    *("--effective-batch", 4, "--log-every", 1, "--checkpoint-every", 10, "--lr", "1e-3"),
    *("--validate-every", 25, "--validation-examples", 10, "--validation-timesteps", 2),
)

run = functools.partial(pipeline.run, script="finetune")
start = functools.partial(pipeline.start, script="finetune")


def assert_same(out: Path, undisturbed: Path) -> None:
    """Losses to 1e-4 of each, weights to 1e-4 of their norm."""
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4, abs=1e-6)
    found, expected = (
        load_file(folder / "last" / "pytorch_lora_weights.safetensors")
        for folder in (out, undisturbed)
    )
    assert found.keys() == expected.keys()
    assert norm({k: found[k] - expected[k] for k in expected}) < 1e-4 * norm(expected)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finetune") / "out"
    done = run(*SMALL, "--out", out)
    assert "weights" in done.stdout
    return out


def test_what_a_run_leaves(undisturbed: Path) -> None:
    """A LoRA that fits and changes the model, a log of every update, TensorBoard's events."""
    assert len(losses(undisturbed)) == 50
    lines = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    checked = [line["step"] for line in lines if "accuracy/coco_neg_text" in line]
    assert checked == [0, 25, 50]
    assert all("accuracy/coco_neg_image" in line for line in lines if line["step"] == 0)
    assert list((undisturbed / "tensorboard").glob("events*"))
    assert json.loads((undisturbed / "failures.json").read_text()) == {}
    model = StableDiffusion(Folder(str(SHAPES)))
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    tensors, scale = read_lora(str(undisturbed / "last"))
    assert merge_lora(model.unet, tensors, scale) == len(tensors) == 112
    changed = [k for k, v in model.unet.state_dict().items() if not torch.equal(v, before[k])]
    assert len(changed) == 56


def test_repeat_and_changed_settings(undisturbed: Path) -> None:
    """A finished run is not trained again; other settings are refused by name."""
    again = run(*SMALL, "--out", undisturbed)
    assert "holds this run already" in again.stderr
    refused = run(*SMALL, "--out", undisturbed, "--lr", "2e-3", code=2)
    assert "lr was 0.001 and is 0.002" in refused.stderr


@pytest.mark.long
def test_two_workers_and_cached_latents(undisturbed: Path, tmp_path: Path) -> None:
    """The same micro-batches, shared out, of images encoded beforehand: the same training. Another
    objective does not encode again."""
    out = tmp_path / "out"
    more = ("--cache-latents", "--workers", 2, "--cpus-per-worker", 0.5)
    done = run(*SMALL, "--out", out, *more)
    assert "caching latents: 60 to do" in done.stderr
    assert_same(out, undisturbed)
    options = (*SMALL, "--cache-latents", "--objective", "soft-neg", "--steps", 2)
    again = run(*options, "--out", tmp_path / "other")
    assert "caching latents: all 60 are done already" in again.stderr


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "softrepa"])
def test_other_objectives_killed_and_on_two_workers(tmp_path: Path, objective: str) -> None:
    """Two workers, killed and gone on with by one: the weights of one that was not disturbed. gdbench's
    merge takes the result."""
    options = (*SMALL, "--objective", objective, "--steps", 20, "--checkpoint-every", 5)
    run(*options, "--out", tmp_path / "alone")
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(*options, "--workers", 2, "--cpus-per-worker", 0.5, "--out", out, log=log)
    wait_for(out, process)
    kill(process)
    run(*options, "--out", out)
    assert_same(out, tmp_path / "alone")
    tensors, scale = read_lora(str(out))
    assert (
        merge_lora(StableDiffusion(Folder(str(SHAPES))).unet, tensors, scale) == len(tensors) == 112
    )


def test_preempted_nodes(undisturbed: Path, tmp_path: Path) -> None:
    """Two workers on nodes of their own, one of which goes away without a word: the other's goes on
    alone. Then that goes, too, and the run waits until a node comes. None of it is a retry."""
    out, log = tmp_path / "out", tmp_path / "log"
    options = ("--workers", "1:2", "--retries", 0, "--checkpoint-every", 5, "--out", out)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        process = start(*SMALL, *options, "--ray", cluster.address, log=log)
        wait_for(out, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_until("goes on from its last checkpoint", log, process)
        wait_for(out, process, checkpoints(out))
        cluster.remove_node(nodes[1], allow_graceful=False)
        wait_until("wait for room", log, process)
        cluster.add_node(num_cpus=1)
        assert process.wait(timeout=400) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
        cluster.shutdown()
    assert_same(out, undisturbed)
    told = log.read_text()
    assert told.count("goes on from its last checkpoint after worker") == 2
    assert told.count("its node is gone: no retry") == 2


@pytest.mark.long
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    """It names the rows; the checkpoint before it is whole."""
    out = tmp_path / "out"
    options = (*SMALL[:-6], "--lr", "1e30", "--validate-every", 0, "--checkpoint-every", 1)
    done = run(*options, "--out", out, code=2)
    assert "the loss of row" in done.stderr
    assert "checkpoints of" in done.stderr
    assert not (out / "pytorch_lora_weights.safetensors").exists()
    assert list(out.glob("train/*/checkpoint_*/weights.safetensors"))


@pytest.mark.long
def test_unreadable_images_cost_their_own_examples(tmp_path: Path) -> None:
    """With cached latents; test_diva_slow.py has broken images that are read in training. Averaged
    weights are the result: they lag behind those that are trained."""
    out = tmp_path / "out"
    options = (*SMALL, "--out", out, "--validate-every", 0, "--steps", 16, "--cache-latents")
    options += ("--ema", 0.9)
    from diffitm.shapes.training import VERSION, write_training

    drawn = tmp_path / "work" / f"shapes-training-30-v{VERSION}"
    write_training(str(drawn), 30)
    for number in (3, 11):
        (drawn / "coco" / "train" / f"{number}.jpg").write_bytes(b"no image")
    done = run(*options, code=3)
    assert "could not be used; they are listed in" in done.stderr
    again = run(*options, code=3)
    assert "holds this run already" in again.stderr
    assert len(json.loads((out / "failures.json").read_text())) >= 1
    assert len(losses(out)) == 16
    names = ("pytorch_lora_weights.safetensors", "last/pytorch_lora_weights.safetensors")
    found, last = (load_file(out / name) for name in names)
    present = load_file(sorted(out.glob("train/*/checkpoint_*/weights.safetensors"))[-1])
    sizes = [sum(float(v.norm()) for k, v in w.items() if "lora_B" in k) for w in (found, present)]
    assert 0 < sizes[0] < sizes[1]
    assert all(torch.equal(found[key], last[key]) for key in found)


@pytest.mark.long
def test_a_wrong_folder_of_images_ends_the_run(tmp_path: Path) -> None:
    """Not one update is made of nothing."""
    from diffitm.shapes.training import write_training

    write_training(str(tmp_path / "data"), 30)
    file = tmp_path / "data" / "coco_neg" / "train_neg_clip.tsv"
    options = ("--model", "shapes", "--data", file, "--steps", 3, "--validate-every", 0)
    done = run(*options, "--out", tmp_path / "out", code=2)
    assert "step 1: none of its images could be read: coco/train/" in done.stderr
    assert not (tmp_path / "out" / "pytorch_lora_weights.safetensors").exists()


def test_validation_data_is_looked_at_first(tmp_path: Path) -> None:
    done = run(*SMALL, "--validation-data", tmp_path, "--out", tmp_path / "out", code=2)
    assert "has no coco_neg/valid_neg_clip.tsv" in done.stderr
