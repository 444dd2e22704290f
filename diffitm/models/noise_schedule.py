"""The training schedule: what a noised latent is, and what the model was trained to predict of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
FLOW_TIME = 1000  # a flow model's timestep where there is noise alone


class Schedule(ABC):
    """z_t = signal(t) z0 + sigma(t) eps, independent of any sampling scheduler.

    `prediction` is one of PREDICTIONS.
    """

    prediction: str

    @property
    @abstractmethod
    def timesteps(self) -> int:
        """T: timesteps are below it, those of a flow model at most it."""

    @abstractmethod
    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and sigma of each timestep [B], shaped to multiply `like` [B, ...]."""

    @abstractmethod
    def check(self, timesteps: Tensor) -> None:
        """Raises ValueError for a timestep, of [N], that the model was not trained at."""

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Tensor:
        """A timestep [1] to be trained at."""

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

    def noise(self, noised: Tensor, predicted: Tensor, timesteps: Tensor) -> Tensor:
        """eps [B, C, h, w] as the model's output for z_t says."""
        if self.prediction == "epsilon":
            return predicted
        signal, sigma = self.at(timesteps, noised)
        if self.prediction == "sample":
            return (noised - signal * predicted) / sigma
        if self.prediction == "flow":
            return noised + signal * predicted
        return signal * predicted + sigma * noised

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


@dataclass(frozen=True)
class NoiseSchedule(Schedule):
    """A timestep is a whole number, whose signal and sigma stand in tables, float32 [T]."""

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
        """See Schedule."""
        return len(self.signal)

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Schedule."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        index = timesteps.to(self.signal.device)
        signal = self.signal[index].to(like.device).view(shape)
        return signal, self.sigma[index].to(like.device).view(shape)

    def draw(self, generator: torch.Generator) -> Tensor:
        """See Schedule. All are as likely."""
        return torch.randint(self.timesteps, (1,), generator=generator)

    def check(self, timesteps: Tensor) -> None:
        """See Schedule."""
        if timesteps.is_floating_point():
            raise ValueError("a model with a table of timesteps takes whole numbers")
        if int(timesteps.max()) >= self.timesteps:
            last = self.timesteps - 1
            raise ValueError(f"timestep {int(timesteps.max())} is beyond the model's last, {last}")


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Rectified flow (Liu et al. 2023; Esser et al. 2024): z = (1 - sigma) z0 + sigma eps.

    A timestep is 1000 sigma, a real number above 0 and at most 1000. There is no table: whichever sigmas a
    sampler steps through, noise of one sigma is the same.
    """

    prediction: str = "flow"

    @property
    def timesteps(self) -> int:
        """See Schedule."""
        return FLOW_TIME

    def at(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """See Schedule."""
        sigma = timesteps.to(like.device, torch.float32) / FLOW_TIME
        sigma = sigma.view((-1,) + (1,) * (like.dim() - 1))
        return 1 - sigma, sigma

    def draw(self, generator: torch.Generator) -> Tensor:
        """See Schedule. The logit of sigma is standard normal, as for SD3 (Esser et al. 2024, 3.1)."""
        return FLOW_TIME * torch.sigmoid(torch.randn(1, generator=generator))

    def check(self, timesteps: Tensor) -> None:
        """See Schedule."""
        wrong = timesteps[(timesteps <= 0) | (timesteps > FLOW_TIME)]
        if len(wrong):
            text = (
                f"timestep {float(wrong[0]):g} is no noise of a flow model: above 0, to {FLOW_TIME}"
            )
            raise ValueError(text)
