"""DPT as a user runs it: a probe, a tuning that begins with it, and both beside the error score."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests import pipeline
from tests.training_runs import losses

pytestmark = pytest.mark.slow
SMALL = (
    *("--objective", "dpt", "--model", "shapes", "--data", "shapes", "--scenes", 60),
    *("--grounding", "shapes"),
    *("--batch-size", 4, "--effective-batch", 8, "--log-every", 1, "--validation-examples", 10),
)
TASKS = ("coco_neg_text", "coco_neg_image")
finetune = functools.partial(pipeline.run, script="finetune")


def test_probe_then_tune_then_gdbench(tmp_path: Path) -> None:
    """Each leaves what the next one takes, boxes among it; the scores stand in one table, with what each
    costs."""
    probe, tuned, out = (tmp_path / name for name in ("probe", "tuned", "out"))
    done = finetune(
        *SMALL, "--steps", 12, "--lr", "1e-3", "--validate-every", 12, "--out", probe,
    )  # fmt: skip
    assert f"weights {probe}/dpt_adapter.safetensors" in done.stdout
    assert f"--dpt none {probe}/dpt_adapter.safetensors" in done.stdout
    assert not (probe / "pytorch_lora_weights.safetensors").exists()
    lines = [json.loads(line) for line in (probe / "log.jsonl").read_text().splitlines()]
    assert "accuracy/coco_neg_image" in lines[-1] and "error" not in lines[1]
    assert 0 < lines[-1]["boxes/iou"] < 1 and lines[1]["of_giou"] > 0
    assert len(losses(probe)) == 12
    options = (*SMALL, "--stage", "tune", "--adapter", probe, "--steps", 4, "--validate-every", 0)
    finetune(*options, "--out", tuned)
    last = json.loads((tuned / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "of_texts", "of_images", "right_texts", "right_images", "error"} <= set(last)
    assert {"of_classes", "of_l1", "of_giou", "of_alignment"} <= set(last)
    again = finetune(*options, "--out", tuned)
    assert "holds this run already" in again.stderr
    lora = tuned / "pytorch_lora_weights.safetensors"
    pipeline.run(
        "--model", "shapes", "--data", "shapes", "--scenes", 10, "--tasks", *TASKS,
        "--timesteps", 2, "--actors", 1, "--lora", "none", lora, "--dpt", "none", probe, tuned, "--out", out,
    )  # fmt: skip
    figures = {(row["model"], row["score"], row["timesteps"]) for row in pipeline.rows(out)}
    names = [f"shapes + DPT {folder}" for folder in (probe, tuned)]
    assert {(name, "matching", 0) for name in names} <= figures
    assert {model for model, score, _ in figures if score == "normalised"} == {
        "shapes",
        f"shapes + {lora}",
    }
    summary = json.loads((out / "summary.json").read_text())
    costs = {line["model"]: line for line in summary["models"]}
    for name in names:
        assert costs[name]["forwards"] == costs[name]["pairs"] > 0
    assert costs["shapes"]["forwards"] == 2 * costs["shapes"]["pairs"]
    page = (out / "report.html").read_text()
    assert all(name in page for name in names)


def test_rows_without_image_negatives(tmp_path: Path) -> None:
    """They are refused before anything is trained, as are a map that the U-Net has not and annotations that
    are not MDETR's."""
    (tmp_path / "rows.csv").write_text("image,caption,negative_captions\na.jpg,x,\"['z']\"\n")
    options = ("--objective", "dpt", "--model", "shapes", "--effective-batch", 1, "--batch-size", 1)
    options += ("--out", tmp_path / "out", "--validate-every", 0)
    done = finetune(*options, "--data", tmp_path / "rows.csv", code=2)
    assert "no row is usable with --objective dpt: 1 row: no negative image" in done.stderr
    done = finetune(*SMALL, "--feature-map", "up3", "--out", tmp_path / "out", code=2)
    assert "--feature-map up3: the maps of this U-Net are bottom0, bottom1, mid, up0, up1" in (
        done.stderr
    )
    (tmp_path / "boxes.json").write_text('{"images": [], "annotations": {}}')
    options = (*SMALL, "--grounding", tmp_path / "boxes.json", "--out", tmp_path / "out")
    done = finetune(*options, code=2)
    told = f"--grounding: {tmp_path}/boxes.json has no list 'annotations': MDETR's annotations have"
    assert told in done.stderr
