"""Every objective and every kind of negatives on the shapes world, by the accuracy of held-out scenes.

    python -m benchmarks.objectives FOLDER [--steps 300] [--seeds 0 1 2] [--only hard-neg]

Trains the embedded model's LoRA on drawn scenes, in one process without Ray: the same schedule,
draws, objectives and update step as pipelines/finetune.py. A run that FOLDER holds is not repeated;
table.md is written from all that it holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffitm.core import images
from diffitm.core.schema import PairRow
from diffitm.metrics.intervals import difference_interval
from diffitm.models.denoiser import Denoiser
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import lora_weights, save_lora
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.protocols import plan_timesteps
from diffitm.shapes.layouts import write_world
from diffitm.shapes.training import write_training
from diffitm.tasks.registry import find_task
from diffitm.training.lora.objectives import Objective
from diffitm.training.lora.step import Posterior, Tuner
from diffitm.training.rows import TrainingRow, read_rows
from diffitm.training.sampler import BatchSampler, Item
from diffitm.training.validation import credits

SCENES, HELD_OUT = 2000, 200
SIZE, MICRO = 16, 2
TASKS = (*("coco_neg_text", "coco_neg_image", "winoground", "vg_relation", "mmvp_vlm"),)


@dataclass(frozen=True)
class Setting:
    """An objective with the negatives that it sees."""

    objective: Objective
    negatives: str = "mixed"


SETTINGS = {
    "no-neg": Setting(Objective("no-neg")),
    "hard-neg": Setting(Objective("hard-neg")),
    "hard-neg, lambda 0.5": Setting(Objective("hard-neg", 0.5)),
    "hard-neg, lambda 2": Setting(Objective("hard-neg", 2.0)),
    "hard-neg, over micro-batches": Setting(Objective("hard-neg", clip_over="microbatch")),
    "hard-neg, hard-text": Setting(Objective("hard-neg"), "hard-text"),
    "hard-neg, random-text": Setting(Objective("hard-neg"), "random-text"),
    "hard-neg, hard-image": Setting(Objective("hard-neg"), "hard-image"),
    "hard-neg-unclipped": Setting(Objective("hard-neg-unclipped")),
    "relativistic": Setting(Objective("relativistic")),
    "soft-neg": Setting(Objective("soft-neg")),
    "soft-neg, guard clip": Setting(Objective("soft-neg", guard="clip")),
    "soft-neg, guard frozen": Setting(Objective("soft-neg", guard="frozen")),
}


class Latents:
    """Posteriors of images by path, all in memory."""

    def __init__(self, model: Denoiser, root: str, paths: list[str]) -> None:
        parts: list[list[torch.Tensor]] = []
        self.place = {path: i for i, path in enumerate(paths)}
        for start in range(0, len(paths), 64):
            pixels = [
                images.to_pixels(images.load(root, path)[0], model.resolution, "squash")
                for path in paths[start : start + 64]
            ]
            stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
            parts.append([part.clone() for part in model.encode_posterior(stacked)])
        self.mean, self.std = (torch.cat(part) for part in zip(*parts, strict=True))

    def __call__(self, paths: list[str]) -> Posterior:
        rows = torch.tensor([self.place[path] for path in paths])
        return Posterior(self.mean[rows], self.std[rows])


def train(
    tuner: Tuner,
    plan: BatchSampler,
    latents: Callable[[list[str]], Posterior],
    steps: int,
    rate: float,
) -> list[dict[str, float]]:
    """A plain loop over the updates; mean loss, E+, contrast and share held of each."""
    optimizer = torch.optim.AdamW(tuner.parameters, lr=rate, weight_decay=1e-2)
    history = []
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        sums = torch.zeros(4)
        for items in plan.batches(step):
            losses = tuner.losses(items, *_posteriors(items, latents))
            (losses.loss / plan.micro).backward()
            found = (losses.loss.detach(), losses.right, losses.contrast, losses.clipped_share)
            sums += torch.stack(found) / plan.micro
        torch.nn.utils.clip_grad_norm_(tuner.parameters, 1.0)
        optimizer.step()
        history.append(dict(zip(("loss", "right", "contrast", "held"), sums.tolist(), strict=True)))
    return history


def _posteriors(
    items: list[Item], latents: Callable[[list[str]], Posterior]
) -> tuple[Posterior, Posterior | None]:
    right, wrong = [i.image for i in items], [i.negative_image for i in items]
    return latents(right), latents(wrong) if wrong != right else None


class Memo:
    """A scorer that scores every pair once, whichever tasks it belongs to."""

    def __init__(self, scorer: DiffusionScorer) -> None:
        self.scorer, self.known = scorer, {}

    def score(self, rows: Sequence[PairRow]) -> list[dict[str, Any]]:
        left = [
            row._replace(texts=[t for t in row.texts if (row.image, t) not in self.known])
            for row in rows
        ]
        new = [row for row in left if row.texts]
        for line in self.scorer.score(new) if new else ():
            self.known[line["image"], line["text"]] = line
        return [self.known[row.image, text] for row in rows for text in row.texts]


def evaluate(tuner: Tuner, folder: Path, timesteps: int) -> dict[str, Any]:
    """Credits of each held-out example by task, and errors of right, wrong and empty texts, each the
    mean square of a latent's element."""
    tuner.unet.eval()
    plan = make_plan(plan_timesteps("diffusionitm", timesteps), tuner.denoiser.latent_shape)
    parts = {name: str(folder / name) for name in ("train", "tasks")}
    scorers = {k: Memo(DiffusionScorer(tuner.denoiser, plan, root)) for k, root in parts.items()}
    found: dict[str, Any] = {}
    for name in TASKS:
        part = "train" if name.startswith("coco_neg") else "tasks"
        task = find_task(name)()
        found[name] = credits(task, list(task.examples(parts[part])), scorers[part])
    rows, _ = read_rows(f"{parts['train']}/coco_neg/valid_neg_clip.tsv")
    texts = [(row.caption, row.negative_captions[0], "") for row in rows]
    work = [PairRow(i, row.image, list(texts[i])) for i, row in enumerate(rows)]
    lines = scorers["train"].score(work)
    errors = np.array([(line["l2"] ** 2 / line["elements"]).mean() for line in lines])
    return {"credits": found, "errors": errors.reshape(-1, 3).tolist()}


def run(
    folder: Path, name: str | None, seed: int, steps: int, timesteps: int, rank: int, rate: float
) -> None:
    """Train and evaluate one setting, None for the base model; one JSON file and the weights."""
    file = folder / (f"{name}, seed {seed}.json" if name else "base.json")
    shared = {"steps": steps, "rank": rank, "rate": rate, "timesteps": timesteps}
    if file.exists():
        known = json.loads(file.read_text())
        differ = [k for k, v in shared.items() if known[k] != v and (name or k == "timesteps")]
        if differ:
            raise SystemExit(f"{file}: has another {', '.join(differ)}; take another folder")
        return
    setting = SETTINGS[name] if name else Setting(Objective("no-neg"))
    tuner = Tuner(load_denoiser(resolve("shapes")), setting.objective, rank, seed)
    begin, history = time.perf_counter(), []
    if name:
        root = str(folder / "train")
        rows, _ = read_rows(f"{root}/coco_neg/train_neg_clip.tsv")
        latents = Latents(tuner.denoiser, root, paths(rows))
        plan = BatchSampler(
            rows, list(range(len(rows))), SIZE, MICRO, setting.negatives, False, seed
        )
        history = train(tuner, plan, latents, steps, rate)
        save_lora(lora_weights(tuner.unet), str(folder / file.stem), rank)
    trained = time.perf_counter() - begin
    result = evaluate(tuner, folder, timesteps)
    result |= {**shared, "seconds": trained, "history": history}
    file.write_text(json.dumps(result, allow_nan=False))
    told = {
        k: f"{100 * np.mean([c for c in v if c is not None]):.1f}"
        for k, v in result["credits"].items()
    }
    errors = np.mean(result["errors"], axis=0).round(4).tolist()
    total = time.perf_counter() - begin
    print(f"{file.stem}: {told} errors {errors}; {trained:.0f} of {total:.0f} s", flush=True)


def table(folder: Path) -> str:
    """All runs of the folder in Markdown: accuracies in % as the mean over seeds and, in brackets, the
    95% interval of their difference from the base model's; bold where it leaves out 0."""
    base = json.loads((folder / "base.json").read_text())
    head = ["objective", "seeds", *TASKS, "E+", "E-", "E empty"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    known = {name: 100 * mean(base["credits"][name]) for name in TASKS}
    errors = np.mean(base["errors"], axis=0)
    lines.append(["base", "", *(f"{known[n]:.1f}" for n in TASKS), *map("{:.3f}".format, errors)])
    for name in SETTINGS:
        runs = [json.loads(p.read_text()) for p in sorted(folder.glob(f"{name}, seed *.json"))]
        if runs:
            cells = [cell([run["credits"][t] for run in runs], base["credits"][t]) for t in TASKS]
            errors = np.mean([run["errors"] for run in runs], axis=(0, 1))
            lines.append([name, str(len(runs)), *cells, *map("{:.3f}".format, errors)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def mean(credits: list[float | None]) -> float:
    return float(np.mean([c for c in credits if c is not None]))


def cell(tuned: list[list[float | None]], base: list[float | None]) -> str:
    """Examples are the units of the interval, each with its mean credit over seeds."""
    values, before = np.mean(np.array(tuned, float), axis=0), np.array(base, float)
    low, high = difference_interval(values, before, np.arange(len(values)))
    text = f"{100 * values.mean():.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def paths(rows: list[TrainingRow]) -> list[str]:
    """Every image of the rows once."""
    return list(dict.fromkeys(p for row in rows for p in (row.image, *row.negative_images)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--timesteps", type=int, default=10)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    args = parser.parse_args()
    write_training(str(args.folder / "train"), SCENES)
    write_world(str(args.folder / "tasks"), HELD_OUT)
    shared = (args.steps, args.timesteps, args.rank, args.rate)
    run(args.folder, None, 0, *shared)
    for seed in args.seeds:
        for name in args.only:
            run(args.folder, name, seed, *shared)
    (args.folder / "table.md").write_text(table(args.folder))
    print(f"table {args.folder / 'table.md'}")


if __name__ == "__main__":
    main()
