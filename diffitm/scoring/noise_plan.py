"""Which timesteps, and which noise at each: the same for every image and text of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffitm.core.errors import InputError

NOISE_TABLE = 1000
DRAWN_AT_ONCE = 16  # numbers of torch.randn on the CPU


@dataclass(frozen=True)
class NoisePlan:
    """Timesteps [N] and one noise tensor for each, float32 [N, C, h, w]. Timesteps are int64 of a model with
    a table, float32 of a flow model (1000 sigma).

    Every candidate of a decision meets the same pairs of timestep and noise (common random
    numbers), so a score does not depend on how the work was split.
    """

    timesteps: Tensor
    noise: Tensor

    def __post_init__(self) -> None:
        if self.timesteps.dim() != 1 or len(self.timesteps) == 0:
            raise ValueError(f"timesteps must be [N], N >= 1, not {tuple(self.timesteps.shape)}")
        if len(self.noise) != len(self.timesteps):
            raise ValueError(f"{len(self.noise)} noise tensors for {len(self.timesteps)} timesteps")
        if self.timesteps.min() < 0:
            raise ValueError(f"timestep {self.timesteps.min().item()} is below 0")

    def __len__(self) -> int:
        return len(self.timesteps)


def standard_noise(positions: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    """The first `positions` slices of torch.randn(1000, C, h, w) from a CPU generator, float32.

    No more is drawn than that takes: torch.randn draws sixteen numbers after sixteen, and the last sixteen
    again where its length is no multiple; up to there a shorter table is the start of a longer one.
    """
    if positions > NOISE_TABLE:
        raise InputError(
            f"timesteps: {positions} is out of range, the noise table has {NOISE_TABLE}"
        )
    size, whole = positions * math.prod(shape), NOISE_TABLE * math.prod(shape)
    drawn = -(-size // DRAWN_AT_ONCE) * DRAWN_AT_ONCE
    if drawn > whole - DRAWN_AT_ONCE:
        drawn = whole
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(drawn, generator=generator)[:size].view(positions, *shape).clone()


def make_plan(timesteps: Sequence[float], shape: tuple[int, int, int], seed: int = 0) -> NoisePlan:
    """The plan of these timesteps with the standard noise, for latents of `shape` (C, h, w)."""
    return NoisePlan(torch.tensor(list(timesteps)), standard_noise(len(timesteps), shape, seed))
