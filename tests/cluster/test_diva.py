"""diva.py as a user runs it: workers, kills, resumes, shards, what comes out."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import tarfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModelWithProjection

from diffitm.models.clip import load_clip, resolve_clip
from diffitm.shapes.training import write_training
from diffitm.training.run_folder import WEIGHTS
from tests import pipeline
from tests.pipeline import kill
from tests.training_runs import (
    checkpoints,
    losses,
    norm,
    training_worker,
    wait_for,
    wait_until,
)

pytestmark = pytest.mark.slow
SMALL = (
    *("--clip", "shapes", "--teacher", "shapes", "--data", "shapes", "--scenes", 60),
    *("--steps", 50, "--batch-size", 2, "--effective-batch", 4, "--log-every", 1, "--lr", "0.03"),
    *("--checkpoint-every", 10, "--measure-every", 25, "--held-out", 8, "--recap", "random:0.3"),
    *("--projection-steps", 15),
)
run = functools.partial(pipeline.run, script="diva")
start = functools.partial(pipeline.start, script="diva")


def last_weights(out: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint: tower and projection."""
    return load_file(sorted(out.glob(f"train/*/checkpoint_*/{WEIGHTS}"))[-1])


def assert_same(out: Path, undisturbed: Path) -> None:
    """Losses to 1e-4 of each, weights to 1e-4 of their norm, and far less than training moved them."""
    assert losses(out) == pytest.approx(losses(undisturbed), rel=1e-4, abs=1e-6)
    found, expected = last_weights(out), last_weights(undisturbed)
    assert found.keys() == expected.keys()
    wrong = norm({k: found[k] - expected[k] for k in expected})
    assert wrong < 1e-4 * norm(expected)
    before = load_clip(resolve_clip("shapes")).model.visual.state_dict()
    moved = norm({k: expected[f"tower.{k}"] - v for k, v in before.items()})
    assert wrong < 1e-2 * moved


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("diva") / "out"
    done = run(*SMALL, "--out", out)
    assert f"compare diffitm gdbench --clip {out} shapes" in done.stdout
    return out


def test_what_a_run_leaves(undisturbed: Path) -> None:
    """The same embeddings from all stock loaders, others than before; log, picture, settings."""
    assert len(losses(undisturbed)) == 50
    lines = [json.loads(line) for line in (undisturbed / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reconstruction" in line] == [0, 25, 50]
    assert json.loads((undisturbed / "failures.json").read_text()) == {}
    assert Image.open(undisturbed / "pictures.png").size[0] > 300
    tuned, before = (load_clip(resolve_clip(name)).model for name in (str(undisturbed), "shapes"))
    stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{undisturbed}")
    pixels = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected = tuned.encode_image(pixels)
        found = [
            stock.eval().encode_image(pixels),
            CLIPVisionModelWithProjection.from_pretrained(undisturbed / "transformers")(
                pixels
            ).image_embeds,
            CLIPModel.from_pretrained(undisturbed / "transformers")
            .get_image_features(pixels)
            .pooler_output,
        ]
        for other in found:
            torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(before.encode_image(pixels), expected, atol=1e-3)
    tower = {k[6:]: v for k, v in last_weights(undisturbed).items() if k.startswith("tower.")}
    assert all(torch.equal(v, tower[k]) for k, v in tuned.visual.state_dict().items())
    text = {k: v for k, v in before.state_dict().items() if not k.startswith("visual.")}
    assert all(torch.equal(v, tuned.state_dict()[k]) for k, v in text.items())


@pytest.mark.long
def test_gdbench_takes_the_result(undisturbed: Path, tmp_path: Path) -> None:
    """Before and after in one report, with paired tests and the training's curves."""
    options = ("--clip", "shapes", undisturbed, "--data", "shapes", "--scenes", 20)
    pipeline.run(*options, "--tasks", "mmvp_vlm", "pets", "--actors", 1, "--out", tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert {row["model"] for row in found["rows"]} == {"CLIP shapes", f"CLIP {undisturbed}"}
    compared = {c["task"] for c in found["comparisons"]}
    assert compared == {"mmvp_vlm", "pets"}
    assert "Reconstruction" in (tmp_path / "report.html").read_text()


def test_repeat_and_changed_settings(undisturbed: Path) -> None:
    again = run(*SMALL, "--out", undisturbed)
    assert "holds this run already" in again.stderr
    refused = run(*SMALL, "--out", undisturbed, "--recap", "all", code=2)
    assert "recap was 'random:0.3' and is 'all'" in refused.stderr


@pytest.mark.long
def test_killed_worker_killed_driver_and_interrupt(undisturbed: Path, tmp_path: Path) -> None:
    """One of two workers is replaced, and they go on from the checkpoint; the same command with a single
    one goes on after a SIGKILL; Ctrl-C says that nothing is lost and exits with a code of its own. In
    the end the same."""
    out, log = tmp_path / "out", tmp_path / "log"
    often = (*SMALL, "--checkpoint-every", 5)
    process = start(*often, "--workers", 2, "--cpus-per-worker", 0.5, "--out", out, log=log)
    wait_for(out, process)
    os.kill(training_worker(process.pid), signal.SIGKILL)
    wait_until("goes on from its last checkpoint after worker", log, process)
    assert "no retry" not in log.read_text()
    wait_for(out, process, checkpoints(out))
    kill(process)
    assert not (out / "open_clip_model.safetensors").exists()
    process = start(*often, "--out", out, log=log)
    wait_for(out, process, checkpoints(out))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130, log.read_text()
    assert "interrupted; the same command goes on where it stopped" in log.read_text()
    assert "Traceback" not in log.read_text()
    run(*often, "--out", out)
    assert_same(out, undisturbed)


@pytest.mark.long
def test_cached_latents(tmp_path: Path) -> None:
    """Encoded beforehand: the same training."""
    for name, cached in (("images", []), ("cached", ["--cache-latents"])):
        run(*SMALL, "--crop-scale", 1, "--steps", 20, *cached, "--out", tmp_path / name)
    assert_same(tmp_path / "cached", tmp_path / "images")


@pytest.mark.long
def test_shards_with_broken_members(tmp_path: Path) -> None:
    """Broken images and a shard that breaks off are counted, left out and listed; a validation is
    logged meanwhile."""
    write_training(str(tmp_path / "data"), 30)
    files = sorted((tmp_path / "data" / "coco" / "train").glob("*.jpg"))
    for number in range(2):
        with tarfile.open(tmp_path / f"{number:04d}.tar", "w") as archive:
            for k, file in enumerate(files[number::2]):
                data = b"broken" if (number, k) in ((0, 3), (0, 5)) else file.read_bytes()
                member = tarfile.TarInfo(f"{k}.jpg")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    cut = tmp_path / "0001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 2 // 3])
    options = (*SMALL[:4], "--data", tmp_path / "{0000..0001}.tar", *SMALL[8:])
    options += ("--validation-data", tmp_path / "data", "--validation-tasks", "coco_neg_image")
    options += ("--validate-every", 6, "--projection-steps", 3)
    done = run(*options, "--steps", 12, "--held-out", 2, "--out", tmp_path / "out", code=3)
    assert "could not be used" in done.stderr
    lost = json.loads((tmp_path / "out" / "failures.json").read_text())
    assert any("0001.tar: is no whole, uncompressed tar" in failure for failure in lost)
    assert sum("not an image" in failure for failure in lost) == 2
    assert len(losses(tmp_path / "out")) == 12
    lines = map(json.loads, (tmp_path / "out" / "log.jsonl").read_text().splitlines())
    curve = {
        x["step"]: x["accuracy/coco_neg_image"] for x in lines if "accuracy/coco_neg_image" in x
    }
    assert list(curve) == [0, 6, 12] and all(0 < value < 1 for value in curve.values())


def test_what_workers_find_wrong(tmp_path: Path) -> None:
    """A recap that keeps nothing of this CLIP ends the run at once, in words."""
    done = run(*SMALL, "--recap", "random:0.01", "--out", tmp_path / "out", code=2)
    assert "random:0.01: keeps none of this CLIP's 64 patch tokens" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "open_clip_model.safetensors").exists()


def test_an_output_folder_of_another_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    note = {"settings": {"pipeline": "finetune.py"}, "done": True, "key": "x"}
    (out / "training.json").write_text(json.dumps(note))
    done = run(*SMALL, "--out", out, code=2)
    assert "holds a run of finetune.py: give another --out" in done.stderr


SDS = (
    *("--objective", "sds-clip", "--clip", "shapes", "--teacher", "shapes", "--data", "shapes"),
    *("--scenes", 60, "--steps", 20, "--batch-size", 4, "--effective-batch", 8, "--lr", "0.01"),
    *("--optimizer", "adamw", "--lambda", "0.1", "--log-every", 1, "--checkpoint-every", 5),
    *("--validate-every", 10, "--validation-tasks", "winoground", "vg_relation"),
    *("--validation-examples", 30),
)


@pytest.fixture(scope="module")
def sds_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("sds") / "out"
    return out, run(*SDS, "--control", "--out", out).stdout


def test_sds_clip_and_its_control(sds_run: tuple[Path, str]) -> None:
    """Two CLIPs from one start, of which the control knows no denoising; the same embeddings from stock
    loaders; accuracies before and after of both in one table."""
    out, told = sds_run
    control = Path(f"{out}-control")
    assert f"--clip {out} {control} shapes --data shapes --tasks winoground vg_relation" in told
    lines = (out / "before-after.md").read_text().splitlines()
    assert lines[0] == "| accuracy in % on validation data | before | lambda 0.1 | lambda 0 |"
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["winoground", "vg_relation"]
    logs = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (out, control)
    ]
    for log in logs:
        assert [line["step"] for line in log if "accuracy/winoground" in line] == [0, 10, 20]
    assert logs[0][0] == logs[1][0]
    assert all("denoising" in line for line in logs[0] if "loss" in line)
    assert not any("denoising" in line for line in logs[1])
    pixels, embeddings = torch.randn(3, 3, 32, 32), []
    for folder in (out, control):
        tuned = load_clip(resolve_clip(str(folder))).model
        stock, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        theirs = CLIPModel.from_pretrained(folder / "transformers")
        with torch.no_grad():
            embeddings.append(tuned.encode_image(pixels))
            found = (stock.eval().encode_image(pixels), theirs.get_image_features(pixels))
            for other in (found[0], found[1].pooler_output):
                torch.testing.assert_close(other, embeddings[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*embeddings, atol=1e-4)
    again = run(*SDS, "--control", "--out", out)
    assert again.stderr.count("holds this run already") == 2


@pytest.mark.long
def test_sds_clip_killed_and_on_two_workers(sds_run: tuple[Path, str], tmp_path: Path) -> None:
    """Two workers, killed and gone on with by one: the weights of one that was not disturbed."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(*SDS, "--workers", 2, "--cpus-per-worker", 0.5, "--out", out, log=log)
    wait_for(out, process)
    kill(process)
    run(*SDS, "--out", out)
    assert losses(out) == pytest.approx(losses(sds_run[0]), rel=1e-4, abs=1e-6)
    found, expected = last_weights(out), last_weights(sds_run[0])
    assert found.keys() == expected.keys()
    assert norm({k: found[k] - expected[k] for k in expected}) < 1e-4 * norm(expected)
