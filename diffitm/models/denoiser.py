"""The contract between a diffusion model and everything that uses one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.noise_schedule import NoiseSchedule

# What the model is conditioned on, by name; every tensor is [B, ...]. Stable Diffusion needs
# {"hidden": [B, L, D]}; a model with pooled text adds its own.
Condition = dict[str, Tensor]


class Denoiser(ABC):
    """A latent diffusion model, frozen and in eval mode.

    Subclasses set the attributes and the abstract methods. Latents are float32 [B, C, h, w], already
    multiplied by the model's scaling factor.
    """

    resolution: int  # side of the input image in pixels
    latent_shape: tuple[int, int, int]  # C, h, w
    schedule: NoiseSchedule
    device: torch.device
    dtype: torch.dtype

    @abstractmethod
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels float32 [B, 3, H, W] in [-1, 1] to mean and deviation of their latents, [B, C, h, w]."""

    def encode_images(self, pixels: Tensor, seed: int | None = None) -> Tensor:
        """Pixels float32 [B, 3, H, W] in [-1, 1] to latents: the posterior's mean.

        With a seed, one sample of the posterior instead, with the same noise for every image.
        """
        mean, deviation = self.encode_posterior(pixels)
        if seed is None:
            return mean
        generator = torch.Generator().manual_seed(seed)
        return mean + deviation * torch.randn(mean.shape[1:], generator=generator).to(mean)

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] to pixels float32 [B, 3, H, W], cut to [-1, 1]; without gradient."""

    def take_prediction(self, prediction: str) -> None:
        """Read the network's output as this (one of noise_schedule.PREDICTIONS), whatever its folder
        says."""
        self.schedule = replace(self.schedule, prediction=prediction)

    def refuses(self, text: str) -> str | None:
        """Why a text cannot be a condition of this model; None if it can, as every text here."""
        return None

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than the model reads, so that encode_texts leaves its end out."""
        return False

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """The condition of each text; '' is the unconditional one.

        Raises ValueError for a text that the model refuses.
        """

    @abstractmethod
    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """The model's output float32 [B, C, h, w] for noised latents, timesteps [B], condition [B].

        Gradients reach the condition.
        """

    @abstractmethod
    def checkpoint_gradients(self) -> None:
        """From now on recompute activations in the backward pass of predict: less memory, more time."""

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """An image of the prompt for each seed, which alone determines its noise.

        Raises InputError for a kind of model that generates none here.
        """
        raise InputError(f": {type(self).__name__} generates no images", "prompts")


def select(condition: Condition, index: Tensor) -> Condition:
    """Rows `index` [B] of a condition."""
    return {name: value[index.to(value.device)] for name, value in condition.items()}
