"""DIVA at several recap densities on the shapes world: what CLIP gains in detail and loses elsewhere.

    python -m benchmarks.densities FOLDER [--steps 600] [--seeds 0 1 2] [--only all] [--rate 3e-4]

Trains the embedded CLIP under the embedded teacher on drawn scenes, in one process without Ray: the
same schedule, draws, recap and update step as pipelines/diva.py with the same options. A run that FOLDER
holds is not repeated; table.md is written from all that it holds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler

from benchmarks.objectives import Latents, cell, mean
from diffitm.core import images
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.loading import load_denoiser, resolve
from diffitm.scoring.clip import ClipScorer
from diffitm.shapes.layouts import write_world
from diffitm.shapes.training import write_training
from diffitm.tasks.registry import find_task
from diffitm.training.diva.recap import parse_recap
from diffitm.training.diva.step import Diva
from diffitm.training.rows import TrainingRow, read_rows
from diffitm.training.sampler import BatchSampler, seed_of
from diffitm.training.validation import credits

SCENES, HELD_OUT, HELD_IMAGES = 2000, 500, 256
SIZE, WARMUP = 32, 10
PROJECTION_RATE = 3e-3
RECAPS = ("class-only", "random:0.15", "random:0.3", "random:0.6", "pool:6", "all")
CONTROL = "projection only"  # the tower stays as it is: what reconstruction learns without it
TASKS = ("mmvp_vlm", "pets", "winoground", "flickr30k", "flickr30k_text", "coco_neg_image")


class Pixels:
    """Images by path at CLIP's size, uint8 [B, 3, H, W], all in memory."""

    def __init__(self, root: str, paths: list[str], side: int) -> None:
        self.place = {path: i for i, path in enumerate(paths)}
        loaded = [images.to_pixels(images.load(root, path)[0], side, "squash") for path in paths]
        self.values = torch.from_numpy(np.stack(loaded)).permute(0, 3, 1, 2).contiguous()

    def __call__(self, paths: list[str]) -> torch.Tensor:
        return self.values[[self.place[path] for path in paths]]


def evaluate(diva: Diva, parts: Any, folder: Path, scenes: list[str]) -> dict[str, Any]:
    """Credits of each held-out example by task, and the reconstruction error of held-out images, with
    the tokens and without."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        for name in TASKS:
            root = str(folder / ("train" if name.startswith("coco_neg") else "tasks"))
            task = find_task(name)()
            examples = list(task.examples(root))
            found[name] = credits(task, examples, ClipScorer(parts, root))
        root = str(folder / "train")
        held = Pixels(root, scenes, diva.side), Latents(diva.teacher, root, scenes)
        seeds = [seed_of("held", i, k) for k in range(4) for i in range(len(scenes))]
        pixels, latents = held[0](scenes * 4), held[1](scenes * 4)
        errors = [diva.errors(pixels, latents, seeds, blind).mean() for blind in (False, True)]
    return {"credits": found, "errors": [float(e) for e in errors]}


def run(folder: Path, name: str | None, seed: int, steps: int, first: int, rate: float) -> None:
    """Train and evaluate one recap, None for the CLIP as it is; one JSON file. The `first` steps train
    the projection alone."""
    file = folder / (f"{name.replace(':', ' ')}, seed {seed}.json" if name else "base.json")
    shared = {"steps": steps, "first": first, "rate": rate}
    if file.exists():
        known = json.loads(file.read_text())
        if name and any(known[k] != v for k, v in shared.items()):
            raise SystemExit(f"{file}: has other settings; take another folder")
        return
    parts = load_clip(resolve_clip("shapes"))
    recap = parse_recap("random:0.3" if name in (None, CONTROL) else name)
    teacher = load_denoiser(resolve("shapes"))
    diva = Diva(parts.model, "shapes", teacher, recap, repeats=1, seed=seed)
    root, begin, history = str(folder / "train"), time.perf_counter(), []
    if name:
        tower, projection = diva.parts()
        first = steps if name == CONTROL else first
        paths = [row.image for row in read_rows(f"{root}/coco_neg/train_neg_clip.tsv")[0]]
        rows = [TrainingRow(path, "") for path in paths]
        pixels, latents = Pixels(root, paths, diva.side), Latents(diva.teacher, root, paths)
        plan = BatchSampler(rows, list(range(len(rows))), SIZE, 1, "none", False, seed)
        groups = [(tower, rate), (projection, PROJECTION_RATE)]
        optimizer = torch.optim.AdamW(
            [{"params": part, "lr": lr} for part, lr in groups], weight_decay=0
        )
        rates = get_scheduler(
            "cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=steps
        )
        for step in range(steps):
            (items,) = plan.batches(step)
            where, seeds = [item.image for item in items], [item.seed for item in items]
            optimizer.zero_grad()
            for parameter in tower:
                parameter.requires_grad_(step >= first)
            errors = []
            for loss, error in diva.losses(pixels(where), latents(where), seeds):
                loss.backward()
                errors.append(float(error))
            history.append(mean(errors))
            torch.nn.utils.clip_grad_norm_(diva.parameters, 1.0)
            optimizer.step()
            rates.step()
    trained = time.perf_counter() - begin
    valid = [row.image for row in read_rows(f"{root}/coco_neg/valid_neg_clip.tsv")[0]][:HELD_IMAGES]
    result = evaluate(diva, parts, folder, valid)
    result |= {**shared, "seconds": trained, "history": history}
    file.write_text(json.dumps(result, allow_nan=False))
    told = {k: f"{100 * mean(v):.1f}" for k, v in result["credits"].items()}
    total = time.perf_counter() - begin
    print(f"{file.stem}: {told} {result['errors']}; {trained:.0f} of {total:.0f} s", flush=True)


def table(folder: Path) -> str:
    """All runs of the folder in Markdown: accuracies in % as the mean over seeds and, in brackets, the
    95% interval of their difference from the base CLIP's; bold where it leaves out 0."""
    base = json.loads((folder / "base.json").read_text())
    head = ["recap", "seeds", *TASKS, "error", "without tokens"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    known = [f"{100 * mean(base['credits'][name]):.1f}" for name in TASKS]
    lines.append(["base", "", *known, "", f"{base['errors'][1]:.4f}"])
    for name in (*RECAPS, CONTROL):
        pattern = f"{name.replace(':', ' ')}, seed *.json"
        runs = [json.loads(p.read_text()) for p in sorted(folder.glob(pattern))]
        if runs:
            cells = [cell([run["credits"][t] for run in runs], base["credits"][t]) for t in TASKS]
            errors = np.mean([run["errors"] for run in runs], axis=0)
            lines.append([name, str(len(runs)), *cells, *map("{:.4f}".format, errors)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--projection-steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=[*RECAPS, CONTROL], default=list(RECAPS))
    args = parser.parse_args()
    write_training(str(args.folder / "train"), SCENES)
    write_world(str(args.folder / "tasks"), HELD_OUT)
    shared = (args.steps, args.projection_steps, args.rate)
    run(args.folder, None, 0, *shared)
    for seed in args.seeds:
        for name in args.only:
            run(args.folder, name, seed, *shared)
    (args.folder / "table.md").write_text(table(args.folder))
    print(f"table {args.folder / 'table.md'}")


if __name__ == "__main__":
    main()
