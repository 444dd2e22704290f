"""Which timesteps, and which noise at each: the same for every image and text of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffitm.core.errors import InputError

NOISE_TABLE = 1000
DRAWN_AT_ONCE = 16  # numbers of torch.randn on the CPU
PROTOCOLS = ("diffusionitm", "paper", "diffusion-classifier")


@dataclass(frozen=True)
class NoisePlan:
    """Timesteps int64 [N] and one noise tensor for each, float32 [N, C, h, w].

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
        if int(self.timesteps.min()) < 0:
            raise ValueError(f"timestep {int(self.timesteps.min())} is below 0")

    def __len__(self) -> int:
        return len(self.timesteps)


def plan_timesteps(protocol: str, count: int, seed: int = 0, total: int = 1000) -> list[int]:
    """The timesteps of a protocol; `count` asked for, `total` training timesteps T.

    - diffusionitm: range(10, 990, 1000 // count), as DiffusionITM's code does. Another number can
      come out than was asked for (250 gives 245), so print the length of the list.
    - paper: `count` uniform draws from [0, T) (DiffusionITM, section 3); the first n of a longer
      list are the draws of a shorter one.
    - diffusion-classifier: `count` strata of T // count timesteps from 0 on, their mid-points, as the
      code of Li et al. 2023 has them (64 of 1000 end at 952).

    Raises InputError for an unknown protocol or a count that the protocol cannot give.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    if not 1 <= count <= total:
        raise InputError(f"timesteps: {count} is out of range, must be 1 to {total}")
    if protocol == "diffusionitm":
        steps = list(range(10 * total // 1000, 990 * total // 1000, total // count))
        return steps or [0]
    if protocol == "paper":
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, total, (total,), generator=generator)[:count].tolist()
    stride = total // count
    return list(range(stride // 2, total, stride))[:count]


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


def make_plan(timesteps: list[int], shape: tuple[int, int, int], seed: int = 0) -> NoisePlan:
    """The plan of these timesteps with the standard noise, for latents of `shape` (C, h, w)."""
    return NoisePlan(torch.tensor(timesteps), standard_noise(len(timesteps), shape, seed))
