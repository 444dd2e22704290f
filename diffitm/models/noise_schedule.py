"""The training schedule: what a noised latent is, and what the model was trained to predict of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")


@dataclass(frozen=True)
class NoiseSchedule:
    """z_t = signal[t] z0 + sigma[t] eps, independent of any sampling scheduler.

    `signal` and `sigma` are float32 [T]. `prediction` is one of PREDICTIONS.
    """

    signal: Tensor
    sigma: Tensor
    prediction: str

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is not one of {PREDICTIONS}")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor, prediction: str) -> NoiseSchedule:
        """DDPM (Ho et al. 2020): signal sqrt(abar_t), sigma sqrt(1 - abar_t)."""
        kept = alphas_cumprod.to(torch.float32)
        return cls(kept.sqrt(), (1 - kept).sqrt(), prediction)

    @property
    def timesteps(self) -> int:
        """How many training timesteps there are (T)."""
        return len(self.signal)

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma of each timestep [B], shaped to multiply `like` [B, ...]."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        index = timesteps.to(self.signal.device)
        signal = self.signal[index].to(like.device).view(shape)
        return signal, self.sigma[index].to(like.device).view(shape)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t [B, C, h, w] from latents z0 and noise of that shape, timesteps [B]."""
        signal, sigma = self.at(timesteps, latents)
        return signal * latents + sigma * noise

    def clean(self, noised: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """z0 [B, C, h, w] as the model's output for z_t says."""
        signal, sigma = self.at(timesteps, noised)
        if self.prediction == "epsilon":
            return (noised - sigma * predicted) / signal
        if self.prediction == "sample":
            return predicted
        if self.prediction == "flow":
            return noised - sigma * predicted
        return signal * noised - sigma * predicted

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should predict: eps, v = signal eps - sigma z0, z0, or the flow eps - z0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        if self.prediction == "flow":
            return noise - latents
        signal, sigma = self.at(timesteps, latents)
        return signal * noise - sigma * latents
