"""What does a step of tuning cost beside a plain loop, and what do cached latents save? On the CPU.

plain    one process, latents and encoded texts in memory: U-Net, loss, backward, AdamW, nothing else
cached   pipelines/finetune.py --cache-latents, one worker of one thread
images   pipelines/finetune.py, which decodes and encodes images on the way

    python -m benchmarks.tuning [--rounds 5] [--steps 200] [--out FILE]

The three take turns; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.objectives import Latents, paths
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import load_denoiser, resolve
from diffitm.shapes.training import write_training
from diffitm.training.lora.objectives import Objective
from diffitm.training.lora.step import Tuner
from diffitm.training.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
SCENES, BATCH, WARM = 500, 16, 20
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def plain(root: str, steps: int) -> float:
    """Seconds a step of hard-neg on hard captions, from diffusers' and peft's own parts."""
    folder = SHAPES / "diffusion"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PROJECTIONS))
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    rows, _ = read_rows(f"{root}/coco_neg/train_neg_clip.tsv")
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tuner = Tuner(load_denoiser(resolve("shapes")), Objective("no-neg"))
    latents = Latents(tuner.denoiser, root, paths(rows))
    hidden = encoded([r.caption for r in rows]), encoded([r.negative_captions[0] for r in rows])
    assert scheduler.config.prediction_type == "epsilon"
    for step in range(steps):
        if step == WARM:
            begin = time.perf_counter()
        chosen = torch.randint(len(rows), (BATCH,))
        posterior = latents([rows[i].image for i in chosen.tolist()])
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        noise, at = torch.randn_like(z), torch.randint(1000, (BATCH,))
        noised, texts = scheduler.add_noise(z, noise, at), [part[chosen] for part in hidden]
        found = unet(noised.repeat(2, 1, 1, 1), at.repeat(2), torch.cat(texts)).sample
        right, wrong = ((found - noise.repeat(2, 1, 1, 1)) ** 2).flatten(1).mean(1).chunk(2)
        loss = (right - torch.minimum(wrong, right.detach())).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return (time.perf_counter() - begin) / (steps - WARM)


@torch.inference_mode()
def encoded(texts: list[str]) -> torch.Tensor:
    folder = SHAPES / "diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").eval()
    ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([encoder(part).last_hidden_state for part in ids.split(64)]).clone()


def ours(root: str, out: Path, steps: int, *options: str) -> float:
    """Seconds a step as the log of finetune.py has them, its first ones left out."""
    command = ["--model", "shapes", "--data", root, "--out", str(out), "--steps", str(steps)]
    command += ["--batch-size", str(BATCH), "--effective-batch", str(BATCH), "--lr", "1e-3"]
    command += ["--negatives", "hard-text", "--validate-every", "0"]
    return logged("finetune", [*command, *options], out, steps)


def logged(script: str, options: list[str], out: Path, steps: int) -> float:
    """Run a pipeline; the mean seconds of an update in its log, the first ones left out."""
    command = [sys.executable, str(ROOT / "pipelines" / f"{script}.py"), *options]
    command += ["--log-every", str(WARM), "--checkpoint-every", str(steps)]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    found = [line["seconds_per_update"] for line in lines if "seconds_per_update" in line]
    return statistics.mean(found[1:])


def compare(about: str, steps: int, ways: dict[str, Callable[[int, Path], float]]) -> None:
    """Let the ways take turns and print the ratios of their seconds a step, as options ask."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name, way in ways.items():
                found[name].append(way(args.steps, Path(folder) / str(number) / name))
            print({name: f"{1000 * times[-1]:.0f} ms" for name, times in found.items()}, flush=True)
    for second, first in itertools.combinations(ways, 2):
        ratios = [a / b for a, b in zip(found[first], found[second], strict=True)]
        middle = statistics.median(ratios)
        print(f"{first} / {second}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        write_training(root, SCENES)
        compare(
            __doc__,
            200,
            {
                "plain": lambda steps, _: plain(root, steps),
                "cached": lambda steps, out: ours(root, out, steps, "--cache-latents"),
                "images": lambda steps, out: ours(root, out, steps),
            },
        )


if __name__ == "__main__":
    main()
