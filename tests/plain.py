"""The published DiffusionITM algorithm written plainly: what results and speed are compared with.

Krojer et al. 2023, "Are Diffusion Models Vision-And-Language Reasoners?". As in the published code,
decisions go in batches, one candidate of each at a time, and nothing is kept between calls: the
image is encoded again at every timestep of every pair, the text again for every pair, and the
unconditional error is computed again for every pair. Two conventions are ours, so that results can
be compared: the standard noise table, and the posterior's mean instead of a sample of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

BATCH = 4
Pair = tuple[str, str]


class Errors(NamedTuple):
    """L2 norms [decisions, candidates, timesteps]; `unconditional` is None in text retrieval."""

    conditional: Tensor
    unconditional: Tensor | None

    def naive(self) -> Tensor:
        """The negative mean error, [decisions, candidates]."""
        return -self.conditional.mean(-1)

    def normalised(self) -> Tensor:
        """The negative mean of what is left after the unconditional error, of the same shape."""
        assert self.unconditional is not None
        return -(self.conditional.mean(-1) - self.unconditional.mean(-1))


def list_pairs(images: Sequence[str], texts: Sequence[str]) -> list[Pair]:
    """The candidates of a decision: one image with its texts, or one text with its images."""
    return [(image, text) for image in images for text in texts]


def published_timesteps(count: int) -> list[int]:
    """10, 10 + step, ... below 990."""
    return list(range(10, 990, 1000 // count))


class Plain:
    """A Stable Diffusion 1.x or 2.x in a local diffusers folder, in float32 on the CPU."""

    def __init__(self, folder: str, timesteps: Sequence[int]) -> None:
        def load(kind: type, part: str, **options: object) -> torch.nn.Module:
            return kind.from_pretrained(folder, subfolder=part, **options).eval()

        self.timesteps = timesteps
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
        self.text_encoder = load(CLIPTextModel, "text_encoder", dtype=torch.float32)
        self.vae = load(AutoencoderKL, "vae", torch_dtype=torch.float32)
        self.unet = load(UNet2DConditionModel, "unet", torch_dtype=torch.float32)
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.abar, self.prediction = scheduler.alphas_cumprod, scheduler.config.prediction_type
        channels, side = self.unet.config.in_channels, self.unet.config.sample_size
        self.side = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.randn(1000, channels, side, side, generator=generator)

    def score(
        self, decisions: Sequence[Sequence[Pair]], image_retrieval: bool, batch: int = BATCH
    ) -> Errors:
        """The errors of decisions with the same number of candidates each; images are files."""
        conditional, unconditional = [], []
        for start in range(0, len(decisions), batch):
            part = decisions[start : start + batch]
            columns = [self._column(column, image_retrieval) for column in zip(*part, strict=True)]
            conditional.append(torch.stack([column[0] for column in columns], dim=1))
            unconditional.append(torch.stack([column[1] for column in columns], dim=1))
        return Errors(torch.cat(conditional), torch.cat(unconditional) if image_retrieval else None)

    @torch.inference_mode()
    def _column(self, pairs: Sequence[Pair], image_retrieval: bool) -> tuple[Tensor, Tensor]:
        """Errors with the text and with the empty one (0 if not needed), [pairs, timesteps]."""
        pixels = torch.stack([self._pixels(image) for image, _ in pairs])
        hidden = self._encode([text for _, text in pairs])
        empty = self._encode([""] * len(pairs)) if image_retrieval else None
        found = torch.zeros(2, len(pairs), len(self.timesteps))
        for k, t in enumerate(self.timesteps):
            latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
            noise, signal, sigma = self.noise[k], self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()
            noised = signal * latents + sigma * noise
            target = noise if self.prediction == "epsilon" else signal * noise - sigma * latents
            found[0, :, k] = (target - self.unet(noised, t, hidden).sample).flatten(1).norm(dim=1)
            if empty is not None:
                wrong = target - self.unet(noised, t, empty).sample
                found[1, :, k] = wrong.flatten(1).norm(dim=1)
        return found[0], found[1]

    def _pixels(self, file: str) -> Tensor:
        """[3, side, side] in [-1, 1], the aspect ratio ignored."""
        with Image.open(file) as image:
            values = np.asarray(image.convert("RGB").resize((self.side, self.side)), np.float32)
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)

    def _encode(self, texts: list[str]) -> Tensor:
        """[texts, tokens, width]."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        return self.text_encoder(tokens.input_ids).last_hidden_state
