"""What a step of DIVA holds in memory at the published sizes, and what each way of saving saves.

    python -m benchmarks.memory [--batch 2] [--out FILE]

Stable Diffusion 2.1-base's U-Net and VAE and CLIP ViT-L/14, built from their configs with random
weights, on the CPU: memory depends on shapes, not on values. Each way runs in a process of its own and
tells the resident memory before the step and at its peak. Seconds of a CPU say little of a GPU's.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import open_clip
import psutil
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor

from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.noise_schedule import NoiseSchedule
from diffitm.training.diva.recap import parse_recap
from diffitm.training.diva.step import Diva
from diffitm.training.lora.step import Posterior

WAYS = {
    "fp32": ("fp32", False, False),
    "fp32, checkpointing": ("fp32", True, False),
    "bf16": ("bf16", False, False),
    "bf16, checkpointing": ("bf16", True, False),
    "bf16, checkpointing, cached latents": ("bf16", True, True),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30


class Published(Denoiser):
    """SD 2.1-base's sizes; its text is a constant."""

    def __init__(self, dtype: torch.dtype, cached: bool) -> None:
        self.device, self.dtype = torch.device("cpu"), dtype
        self.resolution, self.latent_shape = 512, (4, 64, 64)
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        kept = torch.cumprod(1 - betas, 0)
        self.schedule = NoiseSchedule.from_alphas_cumprod(kept, "epsilon")
        torch.set_default_dtype(dtype)
        self.unet = UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024,
            use_linear_projection=True,
        ).requires_grad_(False)
        self.vae = None if cached else published_vae()
        torch.set_default_dtype(torch.float32)

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.vae is None:
            return torch.zeros(len(pixels), *self.latent_shape), torch.ones(1)
        found = self.vae.encode(pixels.to(self.dtype)).latent_dist
        return found.mean.float(), found.std.float()

    def encode_texts(self, texts: Sequence[str]) -> Condition:
        return {"hidden": torch.zeros(len(texts), 77, 1024, dtype=self.dtype)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        hidden = condition["hidden"].to(self.dtype)
        return self.unet(noised.to(self.dtype), timesteps, hidden, return_dict=False)[0].float()

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def checkpoint_gradients(self) -> None:
        self.unet.enable_gradient_checkpointing()


def published_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
    ).requires_grad_(False)


def one(way: str, batch: int) -> dict[str, float]:
    """Memory in GiB before a step and at its peak (gradients and momentum included), seconds."""
    dtype, checkpointing, cached = WAYS[way]
    clip = open_clip.create_model("ViT-L-14")
    teacher = Published(DTYPES[dtype], cached)
    diva = Diva(clip, "ViT-L-14", teacher, parse_recap("random:0.3"), checkpointing=checkpointing)
    optimizer = torch.optim.SGD(diva.parameters, lr=1e-4, momentum=0.9)
    pixels = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8)
    before, begin = psutil.Process().memory_info().rss, time.perf_counter()
    mean, _ = teacher.encode_posterior(torch.zeros(batch, 3, 512, 512))
    posterior = Posterior(mean.clone(), torch.ones_like(mean))
    for loss, _ in diva.losses(pixels, posterior, list(range(batch))):
        loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"before": before / GIB, "peak": peak / GIB, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one(args.way, args.batch)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.memory", "--batch", str(args.batch), "--way"]
        done = subprocess.run([*command, way], check=True, capture_output=True, text=True)
        found[way] = json.loads(done.stdout.splitlines()[-1])
        told = "{before:.2f} GiB before, {peak:.2f} GiB at the peak, {seconds:.0f} s"
        print(f"{way}: {told.format(**found[way])}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
