"""What each way of tuning claims and what comes of it: chosen on some scenes, measured on others.

    python -m benchmarks.findings FOLDER [--seeds 1 2 3] [--only dpo sds-clip] [--page docs/findings.md]

Every arm is a tuning command of pipelines/ on the embedded models. Its settings, where it has several, are
tried with seed 0 and compared by the accuracy of the training's own validation, which also picks the update
that is kept of a diffusion model. The best one is trained anew with each seed and measured on scenes that
chose nothing. A training or a measurement that FOLDER holds is not repeated. --page puts the tables between
the marks of a page.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.objectives import Memo, cell, mean
from diffitm.commands import diva, finetune
from diffitm.core.config import make
from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.dpt_file import find_adapter
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import merge_file
from diffitm.scoring.clip import ClipScorer
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.protocols import plan_timesteps
from diffitm.scoring.scorer import RowScorer
from diffitm.scoring.specs import DptSpec
from diffitm.shapes.layouts import write_world
from diffitm.tasks.registry import find_task
from diffitm.training.diva.options import DivaConfig
from diffitm.training.lora.options import FinetuneConfig
from diffitm.training.validation import credits_by_metric

CHOICE_SEED, MEASURE_SEED = 31, 37  # of the scenes; others than the tasks' and the training's
CHOICE_SCENES = 150
TIMESTEPS = 4  # with more the model before it leaves little to gain
# What is measured, and how many of each task's metrics.
DIFFUSION = {
    "imagecode": 1,
    "winoground": 3,
    "mmvp_vlm": 1,
    "vg_relation": 1,
    "vg_attribution": 1,
    "coco_order": 1,
}
CLIP = {**DIFFUSION, "pets": 1}
Options = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A tuning: a pipeline's options, the settings that are tried, the scores that it is measured by ('error'
    or 'dpt' of a diffusion model, 'clip'), and the arm whose result of the same seed it goes on from."""

    options: Options
    settings: tuple[Options, ...] = ({},)
    scores: tuple[str, ...] = ("error",)
    after: str | None = None


OF_DIFFUSION: Options = {
    "model": "shapes",
    "data": "shapes",
    "scenes": 1000,
    "steps": 200,
    "batch_size": 16,
    "effective_batch": 32,
    "validate_every": 50,
    "validation_examples": 150,
    "checkpoint_every": 100,
}
# Errors at two timesteps alone choose: at more of them the model before it has most of them right.
LORA = OF_DIFFUSION | {"validation_timesteps": 2}
RATES: tuple[Options, ...] = ({"lr": 3e-4}, {"lr": 1e-3})
OF_CLIP: Options = {
    "clip": "shapes",
    "teacher": "shapes",
    "data": "shapes",
    "scenes": 1000,
    "optimizer": "adamw",
    "warmup_steps": 10,
    "validation_tasks": ["winoground", "vg_relation", "vg_attribution", "coco_order"],
    "validation_examples": 150,
    "checkpoint_every": 100,
}
SDS: Options = OF_CLIP | {
    "objective": "sds-clip",
    "steps": 300,
    "effective_batch": 64,
    "batch_size": 64,
    "validate_every": 300,
}
DPT = OF_DIFFUSION | {"objective": "dpt", "effective_batch": 16}
ARMS = {
    "no-neg": Arm(LORA | {"objective": "no-neg"}, RATES),
    "hard-neg": Arm(LORA | {"objective": "hard-neg"}, RATES),
    "soft-neg, guarded": Arm(LORA | {"objective": "soft-neg", "guard": "clip"}, RATES),
    "softrepa": Arm(
        LORA | {"objective": "softrepa", "batch_size": 4, "effective_batch": 16}, RATES
    ),
    "dpo": Arm(
        LORA | {"objective": "dpo"}, tuple({"lr": 3e-4, "beta": b} for b in (250.0, 2500.0))
    ),
    "dpt, probe": Arm(DPT | {"steps": 300, "lr": 3e-4, "feature_map": "mid"}, scores=("dpt",)),
    "dpt, tuned": Arm(
        DPT | {"stage": "tune", "steps": 100, "lr": 3e-4},
        scores=("dpt", "error"),
        after="dpt, probe",
    ),
    "sds-clip": Arm(
        SDS, tuple({"lr": 1e-3, "lambda_": v} for v in (1e-3, 1e-1, 10.0)), scores=("clip",)
    ),
    "sds-clip's control": Arm(SDS | {"lambda_": 0.0, "lr": 1e-3}, scores=("clip",)),
    "diva": Arm(
        OF_CLIP
        | {"recap": "random:0.3", "repeats": 1, "crop_scale": 1.0}
        | {"steps": 600, "projection_steps": 300, "projection_lr": 3e-3, "measure_every": 0}
        | {"effective_batch": 32, "batch_size": 32, "validate_every": 600},
        ({"lr": 3e-4},),
        scores=("clip",),
    ),
}


def is_clip(arm: Arm) -> bool:
    return arm.scores == ("clip",)


def out_of(name: str, seed: int, folder: Path) -> Path:
    """Where an arm's training with a seed is."""
    return folder / "arms" / f"{slug(name)}-seed{seed}"


def train(arm: Arm, setting: Options, seed: int, out: Path, steps: int | None) -> float:
    """Train once; the validation accuracy in % that it is chosen by."""
    folder = out.parents[1]
    values = arm.options | setting | {"seed": seed, "out": str(out)}
    if arm.after is not None:
        values["adapter"] = str(out_of(arm.after, seed, folder))
    if is_clip(arm):
        values["validation_data"] = str(folder / "choice")
    if steps is not None:  # a dry run
        values |= {"steps": steps, "validate_every": steps}
        values |= {"projection_steps": 1} if "projection_steps" in values else {}
    note = out / "training.json"
    known = json.loads(note.read_text()) if note.exists() else {"done": False}
    if known["done"]:
        told = [k for k in values if k in known["settings"] and known["settings"][k] != values[k]]
        if told:
            raise SystemExit(f"{out} was trained with another {', '.join(told)}: delete it")
    else:
        pipeline: Any = diva if is_clip(arm) else finetune
        pipeline.run(make(DivaConfig if is_clip(arm) else FinetuneConfig, values))
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    found = [[v for k, v in line.items() if k.startswith("accuracy/")] for line in lines]
    curve = [100 * float(np.mean(values)) for values in found if values]
    return curve[-1] if is_clip(arm) else max(curve[1:])


def choose(name: str, arm: Arm, folder: Path, steps: int | None) -> Options:
    """The arm's setting, tried with seed 0 where there are several."""
    if len(arm.settings) == 1:
        return arm.settings[0]
    tried = []
    for number, setting in enumerate(arm.settings):
        out = folder / "arms" / f"{slug(name)}-choice{number}"
        tried.append((train(arm, setting, 0, out, steps), setting))
        print(f"{name}: {setting} has {tried[-1][0]:.1f}% on the scenes that choose", flush=True)
    return max(tried, key=lambda pair: pair[0])[1]


def scorer_of(score: str, out: Path | None, world: Path) -> RowScorer:
    """Of a trained arm, or of the model before it."""
    if score == "clip":
        return ClipScorer(load_clip(resolve_clip(str(out) if out else "shapes")), str(world))
    if score == "dpt":
        return DptSpec(resolve("shapes"), find_adapter(str(out), "dpt"), str(world), 500).build(
            "cpu"
        )
    model = load_denoiser(resolve("shapes"))
    if out is not None:
        merge_file(model, str(out / "pytorch_lora_weights.safetensors"))
    plan = make_plan(plan_timesteps("diffusionitm", TIMESTEPS), model.latent_shape)
    return DiffusionScorer(model, plan, str(world))


def measure(file: Path, score: str, out: Path | None, world: Path) -> None:
    """Credits of each example, by task and metric, as the file keeps them."""
    if file.exists():
        return
    scorer: Any = Memo(scorer_of(score, out, world))
    tasks = CLIP if score == "clip" else DIFFUSION
    begin, found = time.perf_counter(), {}
    for name, count in tasks.items():
        task = find_task(name)()
        lines = credits_by_metric(task, list(task.examples(str(world))), scorer)
        if any(line is None for line in lines):
            raise SystemExit(f"{name}: some of its examples could not be scored")
        good = [line for line in lines if line is not None]
        for metric in list(good[0])[:count]:
            label = f"{name} {metric}" if count > 1 else name
            found[label] = [line[metric] for line in good]
    seconds = time.perf_counter() - begin
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"credits": found, "seconds": seconds}))
    told = ", ".join(f"{key} {100 * mean(values):.1f}" for key, values in found.items())
    print(f"{file.stem}: {told}; {seconds:.0f} s", flush=True)


def table(folder: Path, clip: bool, seeds: Sequence[int]) -> str:
    """All that is measured, in Markdown: accuracies in % as the mean over seeds and, in brackets, the 95%
    interval of their difference from the model before it; bold where that leaves out 0."""
    done = folder / "measured"
    base = credits_of(done / f"before-{'clip' if clip else 'error'}.json")
    head = ["", "seeds", *base]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines.append(["before", "", *(f"{100 * mean(values):.1f}" for values in base.values())])
    for name, arm in ARMS.items():
        for score in arm.scores if is_clip(arm) == clip else ():
            files = [done / f"{slug(name)}-seed{seed}-{score}.json" for seed in seeds]
            runs = [credits_of(file) for file in files if file.exists()]
            if runs:
                cells = [cell([run[key] for run in runs], base[key]) for key in base]
                label = f"{name}, its own score" if score == "dpt" else name
                lines.append([label, str(len(runs)), *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def stay_with_models(folder: Path) -> None:
    """What a folder holds is of the embedded models that it began with."""
    note = folder / "models.json"
    models = {"diffusion": resolve("shapes").digest, "clip": resolve_clip("shapes").digest}
    known = json.loads(note.read_text()) if note.exists() else None
    if (folder / "measured").exists() and known != models:
        raise SystemExit(f"{folder} is of other embedded models: give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(models))


def credits_of(file: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = json.loads(file.read_text())["credits"]
    return found


def write_tables(folder: Path, seeds: Sequence[int], page: Path | None) -> None:
    """FOLDER/tables.md, and the page if one is given."""
    tables = {
        "diffusion models": table(folder, False, seeds),
        "CLIPs": table(folder, True, seeds),
    }
    (folder / "tables.md").write_text("\n".join(tables.values()))
    if page is not None:
        put(page, tables)


def put(page: Path, tables: dict[str, str]) -> None:
    """The tables between the marks of a page."""
    text = page.read_text()
    for name, found in tables.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise SystemExit(f"{page}: has no {begin} and {end}")
        before, after = text.partition(begin)[0], text.partition(end)[2]
        text = f"{before}{begin}\n\n{found}\n{end}{after}"
    page.write_text(text)


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name.replace("'s", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--scenes", type=int, default=300, help="that are measured on")
    parser.add_argument("--steps", type=int, help="updates of every training, for a dry run")
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    folder = args.folder.absolute()
    stay_with_models(folder)
    world = folder / "measure"
    write_world(str(world), args.scenes, seed=MEASURE_SEED)
    write_world(str(folder / "choice"), CHOICE_SCENES, seed=CHOICE_SEED)
    for score in ("error", "clip"):
        measure(folder / "measured" / f"before-{score}.json", score, None, world)
    for name in args.only:
        arm = ARMS[name]
        setting = choose(name, arm, folder, args.steps)
        for seed in args.seeds:
            out = out_of(name, seed, folder)
            train(arm, setting, seed, out, args.steps)
            for score in arm.scores:
                measure(folder / "measured" / f"{out.name}-{score}.json", score, out, world)
        write_tables(folder, args.seeds, args.page)  # of as much as there is
    print(f"tables {folder / 'tables.md'}")


if __name__ == "__main__":
    main()
