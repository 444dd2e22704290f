"""Objectives of tuning a diffusion model for matching, from errors of right and wrong pairs.

E+ is the error of the right pair, E- that of the wrong one: mean squared noise-prediction errors on
the same timestep and noise. Every objective is E+ less a contrast, which a bound may hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffitm.core.errors import InputError, suggest

Contrast = Literal["none", "wrong", "distance", "empty"]
# name -> what is subtracted, and whether lambda E+ bounds it.
OBJECTIVES: dict[str, tuple[Contrast, bool]] = {
    "no-neg": ("none", False),
    "hard-neg": ("wrong", True),
    "hard-neg-unclipped": ("wrong", False),
    "relativistic": ("distance", True),
    "soft-neg": ("empty", False),
}
GUARDS = ("none", "clip", "frozen")


@dataclass(frozen=True)
class Objective:
    """A loss of E+ and its contrast.

    - no-neg: E+, DiffusionITM's control.
    - hard-neg: E+ - min(E-, lambda E+) (DiffusionITM, eq. 6-7). The bound is a constant for the
      gradient, and at the bound itself the gradient still reaches E-.
    - hard-neg-unclipped: E+ - E-, the published 'unhinged' ablation.
    - relativistic: E+ - min(MSE(pred-, pred+), lambda E+), the published ablation.
    - soft-neg: E+ - E(x, t, '') (CS6476 project, eq. 2). Nothing holds the empty text's error:
      guard 'clip' bounds it like hard-neg's, 'frozen' takes it from the base model, so that it is
      a constant and the gradient is no-neg's.

    `clip_over` says where the bound holds: of each example, or of a micro-batch's means, which is
    the published way. Raises InputError for a value that none of them is.
    """

    name: str
    bound: float = 1.0  # lambda
    clip_over: str = "example"
    guard: str = "none"

    def __post_init__(self) -> None:
        if self.name not in OBJECTIVES:
            raise InputError(
                f"{self.name!r} is unknown{suggest(self.name, OBJECTIVES)}", "objective"
            )
        if not self.bound >= 0:
            raise InputError(f"{self.bound:g}: must be 0 or more", "lambda")
        if self.clip_over not in ("example", "microbatch"):
            raise InputError(f"{self.clip_over}: must be example or microbatch", "clip_over")
        if self.guard not in GUARDS:
            raise InputError(f"{self.guard}: must be one of {', '.join(GUARDS)}", "guard")
        if self.guard != "none" and self.contrast != "empty":
            raise InputError(f"{self.guard}: only soft-neg takes one, not {self.name}", "guard")

    @property
    def contrast(self) -> Contrast:
        """What is subtracted from E+."""
        return OBJECTIVES[self.name][0]

    @property
    def has_wrong_pairs(self) -> bool:
        """Whether it needs negatives: captions or images that do not fit."""
        return self.contrast in ("wrong", "distance")

    @property
    def clipped(self) -> bool:
        """Whether lambda E+ bounds the contrast."""
        return OBJECTIVES[self.name][1] or self.guard == "clip"

    def __call__(self, right: Tensor, contrast: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss, share of the contrasts that the bound holds), scalars, of errors [B]."""
        if contrast is None:
            return right.mean(), right.new_zeros(())
        if self.clip_over == "microbatch":
            right, contrast = right.mean()[None], contrast.mean()[None]
        if not self.clipped:
            return (right - contrast).mean(), right.new_zeros(())
        bound = self.bound * right.detach()
        held = contrast > bound
        return (right - torch.where(held, bound, contrast)).mean(), held.float().mean()
