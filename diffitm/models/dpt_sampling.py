"""Images by DPT's self-correction: before each step the latent is moved towards a higher matching score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.dpt import DptAdapter, MapReader, with_pooled
from diffitm.models.latent_diffusion import check_finite
from diffitm.models.stable_diffusion import StableDiffusion


class Corrected:
    """Generates images of a denoiser (a StableDiffusion) with an adapter, by DDIM.

    At each step z + factor * ds(z, t, y)/dz is what the prompt's half of the guided prediction sees, and
    the prediction is applied to z itself, as the code of Qu et al. 2024 does; the last latent is decoded,
    where they take the one before it.
    """

    def __init__(self, denoiser: Denoiser, adapter: DptAdapter, factor: float) -> None:
        assert isinstance(denoiser, StableDiffusion), "load_adapter has refused others"
        self.denoiser, self.adapter, self.factor = denoiser, adapter, factor
        self.reader = MapReader(denoiser, adapter.shape.map)

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """As Denoiser.generate. Raises InputError for pictures that are not finite."""
        denoiser, count = self.denoiser, len(seeds)
        texts, empty = self.texts(prompt, count), self.texts("", count)
        # Stable Diffusion's latents are not cut to [-1, 1], which DDIM does where its folder does not say so.
        scheduler: Any = DDIMScheduler.from_config(denoiser.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(steps)
        latents = torch.stack(
            [
                torch.randn(denoiser.latent_shape, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        ).to(denoiser.device)
        for step in scheduler.timesteps.tolist():
            at = torch.full((count,), step, device=denoiser.device)
            corrected = latents + self.factor * self.gradient(latents, at, texts)
            with torch.no_grad():
                with_text = denoiser.predict(corrected, at, texts)
                without = denoiser.predict(latents, at, empty)
                predicted = without + guidance * (with_text - without)
                latents = scheduler.step(predicted, step, latents).prev_sample
        pixels = torch.cat([denoiser.decode(one[None]) for one in latents])
        check_finite(pixels, prompt, denoiser.dtype)
        images: list[Image.Image] = VaeImageProcessor().postprocess(pixels.cpu())
        return images

    def texts(self, text: str, count: int) -> Condition:
        """The condition of a text for so many latents, as tensors that a graph may keep."""
        found = with_pooled(self.denoiser, self.denoiser.encode_texts, [text])
        return {k: v.clone().expand(count, *v.shape[1:]) for k, v in found.items()}

    def gradient(self, latents: Tensor, at: Tensor, texts: Condition) -> Tensor:
        """ds/dz of latents [B, ..] at timesteps [B], of each its own score."""
        moved = latents.detach().requires_grad_()
        with torch.enable_grad():
            maps, _ = self.reader(moved, at, texts)
            score = self.adapter.score(maps, at, texts["pooled"].float()).sum()
            (found,) = torch.autograd.grad(score, moved)
        return found
