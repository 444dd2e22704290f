"""What does a step of tuning cost beside a plain loop, and what do cached latents save? On the CPU.

plain    one process, latents and encoded texts in memory: U-Net, loss, backward, AdamW, nothing else
cached   pipelines/finetune.py --cache-latents, one worker of one thread
images   pipelines/finetune.py, which decodes and encodes images on the way

    python -m benchmarks.tuning [--rounds 5] [--steps 200] [--out FILE]

The three take turns; README.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks.objectives import Latents, paths
from diffitm.models.load import SHAPES, load_denoiser, resolve
from diffitm.shapes.training import write_training
from diffitm.training.objectives import Objective
from diffitm.training.rows import read_rows
from diffitm.training.tune import Tuner

ROOT = Path(__file__).resolve().parents[1]
SCENES, BATCH, WARM = 500, 16, 20
PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


def plain(root: str, steps: int) -> float:
    """Seconds a step of hard-neg on hard captions, from diffusers' and peft's own parts."""
    folder = SHAPES / "diffusion"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=PROJECTIONS))
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    rows = read_rows(f"{root}/coco_neg/train_neg_clip.tsv")
    parameters = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    tuner = Tuner(load_denoiser(resolve("shapes")), Objective("no-neg"))
    latents = Latents(tuner, root, paths(rows))
    hidden = encoded([r.caption for r in rows]), encoded([r.negative_captions[0] for r in rows])
    assert scheduler.config.prediction_type == "epsilon"
    for step in range(steps):
        if step == WARM:
            begin = time.perf_counter()
        chosen = torch.randint(len(rows), (BATCH,))
        posterior = latents([rows[i].image for i in chosen.tolist()])
        z = posterior.mean + posterior.deviation * torch.randn_like(posterior.mean)
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
    command = [sys.executable, str(ROOT / "pipelines" / "finetune.py"), "--model", "shapes"]
    command += ["--data", root, "--out", str(out), "--steps", str(steps), "--lr", "1e-3"]
    command += ["--batch-size", str(BATCH), "--effective-batch", str(BATCH), *options]
    command += ["--negatives", "hard-text", "--validate-every", "0", "--log-every", str(WARM)]
    command += ["--checkpoint-every", str(steps)]
    subprocess.run(command, check=True, capture_output=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return statistics.mean(line["seconds_per_update"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"plain": [], "cached": [], "images": []}
    with tempfile.TemporaryDirectory() as folder:
        root = f"{folder}/data"
        write_training(root, SCENES)
        for number in range(args.rounds):
            out = Path(folder) / str(number)
            found["plain"].append(plain(root, args.steps))
            found["cached"].append(ours(root, out / "cached", args.steps, "--cache-latents"))
            found["images"].append(ours(root, out / "images", args.steps))
            print({name: f"{1000 * times[-1]:.0f} ms" for name, times in found.items()}, flush=True)
    for first, second in (("cached", "plain"), ("images", "plain"), ("images", "cached")):
        ratios = [a / b for a, b in zip(found[first], found[second], strict=True)]
        middle = statistics.median(ratios)
        print(f"{first} / {second}: {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
