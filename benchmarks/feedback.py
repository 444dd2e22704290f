"""What does a step of DIVA cost beside a plain loop, and what do cached latents save? On the CPU.

plain    one process, pixels and latents in memory: CLIP, U-Net, loss, backward, SGD, nothing else
cached   pipelines/diva.py --cache-latents, one worker of one thread
images   pipelines/diva.py, which decodes and encodes images on the way

    python -m benchmarks.feedback [--rounds 5] [--steps 100] [--out FILE]

The three take turns; README.md says what the figures mean.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import open_clip
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from benchmarks.densities import Pixels
from benchmarks.objectives import Latents
from benchmarks.tuning import BATCH, SCENES, WARM, compare, encoded, logged
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import load_denoiser, resolve
from diffitm.shapes.training import write_training
from diffitm.training.image_pool import read_images

SHARE = 0.3


def plain(root: str, steps: int) -> float:
    """Seconds a step of 'random:0.3' with one repeat, from open_clip's and diffusers' own parts."""
    folder = SHAPES / "diffusion"
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").requires_grad_(False)
    scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    visual = open_clip.create_model_from_pretrained(f"local-dir:{SHAPES / 'clip'}")[0].visual
    projection = torch.nn.Linear(64, 96)
    parameters = [*visual.parameters(), *projection.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)
    paths, _ = read_images(root)
    latents = Latents(load_denoiser(resolve("shapes")), root, paths)
    squares, text = Pixels(root, paths, 32), encoded([""])[0].mean(0)
    cfg = visual.preprocess_cfg
    mean, std = (torch.tensor(cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert scheduler.config.prediction_type == "epsilon"
    for step in range(steps):
        if step == WARM:
            begin = time.perf_counter()
        where = [paths[i] for i in torch.randint(len(paths), (BATCH,)).tolist()]
        pixels, posterior = (squares(where).float() / 255 - mean) / std, latents(where)
        found = visual.forward_intermediates(
            pixels, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
        )
        patches = found["image_intermediates"][0]
        chosen = torch.stack([torch.randperm(64)[: int(SHARE * 64)] for _ in range(BATCH)])
        kept = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[-1]))
        tokens = torch.cat([found["image_intermediates_prefix"][0], kept], 1)
        condition = projection(visual.ln_post(tokens) @ visual.proj) + text
        z = posterior.mean + posterior.std * torch.randn_like(posterior.mean)
        noise, at = torch.randn_like(z), torch.randint(1000, (BATCH,))
        predicted = unet(scheduler.add_noise(z, noise, at), at, condition).sample
        loss = ((predicted - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    return (time.perf_counter() - begin) / (steps - WARM)


def ours(root: str, out: Path, steps: int, *options: str) -> float:
    """Seconds a step as the log of diva.py has them, its first ones left out."""
    command = ["--clip", "shapes", "--teacher", "shapes", "--data", root, "--out", str(out)]
    command += ["--steps", str(steps), "--batch-size", str(BATCH), "--effective-batch", str(BATCH)]
    command += ["--repeats", "1", "--crop-scale", "1", "--measure-every", "0", "--held-out", "0"]
    return logged("diva", [*command, *options], out, steps)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_training(folder, SCENES)
        root = f"{folder}/coco/train"
        compare(
            __doc__,
            100,
            {
                "plain": lambda steps, _: plain(root, steps),
                "cached": lambda steps, out: ours(root, out, steps, "--cache-latents"),
                "images": lambda steps, out: ours(root, out, steps),
            },
        )


if __name__ == "__main__":
    main()
