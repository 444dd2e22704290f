"""Objectives of tuning a diffusion model for matching, from errors of right and wrong pairs.

E+ is the error of the right pair, E- that of the wrong one: mean squared noise-prediction errors on
the same timestep and noise. Most objectives are E+ less a contrast, which a bound may hold; dpo
compares both errors with those of the base model, softrepa every image of a batch with every text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, relu

from diffitm.core.errors import InputError, suggest

Contrast = Literal["none", "wrong", "distance", "empty", "base", "batch"]
# name -> what E+ is contrasted with, and whether lambda E+ bounds it.
OBJECTIVES: dict[str, tuple[Contrast, bool]] = {
    "no-neg": ("none", False),
    "hard-neg": ("wrong", True),
    "hard-neg-unclipped": ("wrong", False),
    "relativistic": ("distance", True),
    "soft-neg": ("empty", False),
    "dpo": ("base", False),
    "softrepa": ("batch", False),
}
GUARDS = ("none", "clip", "frozen")
# What some objectives have of their own, by the contrast, with the published values.
OWN: dict[Contrast, dict[str, Any]] = {
    "base": {"preference": "sigmoid", "beta": 2500.0},
    "batch": {"scale": 4.0, "temperature": 0.07, "diagonal": 10.0},
}
FLOW_DIAGONAL = 0.0  # the published value of SD3
# The loss of a preference u, given beta.
PREFERENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "sigmoid": lambda u, beta: -logsigmoid(beta * u),
    "hinge": lambda u, beta: relu(1 - beta * u),
    "ipo": lambda u, beta: (u - 1 / (2 * beta)) ** 2,
}


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
    - dpo: Diffusion-DPO (Wallace et al. 2023) with the right and the wrong pair for the preferred image
      and the other one: a loss of u = (E-  - base's E-) - (E+ - base's E+), by `preference`
      -log sigmoid(beta u), max(0, 1 - beta u) or (u - 1 / (2 beta))^2. beta has taken up the
      paper's factors.
    - softrepa: SoftREPA's (softrepa/SoftREPA), of the errors E_ij of every image i with every text j
      of a micro-batch on one timestep and one noise: cross entropy of the logits scale
      exp(-E_ij / temperature) with i = j, the mean of both softmax directions, + diagonal times the
      mean E_ii.

    `clip_over` says where the bound holds: of each example, or of a micro-batch's means, which is
    the published way. What only some objectives have is None where the published value is meant; that of
    `diagonal` is Stable Diffusion's, which `fitted` changes for flow models.
    Raises InputError for a value that none of them is, and for one that the objective does not take.
    """

    name: str
    bound: float = 1.0  # lambda
    clip_over: str = "example"
    guard: str = "none"
    preference: str | None = None
    beta: float | None = None
    scale: float | None = None
    temperature: float | None = None
    diagonal: float | None = None

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
        self._check_own()

    def _check_own(self) -> None:
        """Settings of the objectives in OWN, and those that these do not take."""
        for contrast, settings in OWN.items():
            owner = next(name for name, (kind, _) in OBJECTIVES.items() if kind == contrast)
            for name in settings:
                value = getattr(self, name)
                if value is not None and contrast != self.contrast:
                    raise InputError(f"{value}: only {owner} takes one, not {self.name}", name)
        if self.preference not in (None, *PREFERENCES):
            known = ", ".join(PREFERENCES)
            raise InputError(f"{self.preference}: must be one of {known}", "preference")
        for name in ("beta", "scale", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{value:g}: must be above 0", name)
        if self.diagonal is not None and not self.diagonal >= 0:
            raise InputError(f"{self.diagonal:g}: must be 0 or more", "diagonal")
        if self.contrast in OWN and (self.bound, self.clip_over) != (1.0, "example"):
            which = "lambda" if self.bound != 1.0 else "clip_over"
            value = f"{self.bound:g}" if self.bound != 1.0 else self.clip_over
            raise InputError(f"{value}: {self.name} has no bound", which)

    def fitted(self, flow: bool) -> Objective:
        """The same with the published values of a flow model, if it is for one."""
        if flow and self.contrast == "batch" and self.diagonal is None:
            return replace(self, diagonal=FLOW_DIAGONAL)
        return self

    @property
    def contrast(self) -> Contrast:
        """What E+ is contrasted with."""
        return OBJECTIVES[self.name][0]

    @property
    def has_wrong_pairs(self) -> bool:
        """Whether it needs negatives: captions or images that do not fit."""
        return self.contrast in ("wrong", "distance", "base")

    @property
    def clipped(self) -> bool:
        """Whether lambda E+ bounds the contrast."""
        return OBJECTIVES[self.name][1] or self.guard == "clip"

    def __call__(self, right: Tensor, contrast: Tensor | None) -> tuple[Tensor, Tensor]:
        """(loss, share of the contrasts that the bound holds), scalars, of errors [B]; not of dpo and
        softrepa."""
        if contrast is None:
            return right.mean(), right.new_zeros(())
        if self.clip_over == "microbatch":
            right, contrast = right.mean()[None], contrast.mean()[None]
        if not self.clipped:
            return (right - contrast).mean(), right.new_zeros(())
        bound = self.bound * right.detach()
        held = contrast > bound
        return (right - torch.where(held, bound, contrast)).mean(), held.float().mean()

    def prefer(
        self, right: Tensor, wrong: Tensor, base: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """dpo's (loss, share of the examples that hinge's margin leaves without a gradient), scalars, of
        errors [B]; `base` are the base model's of right and wrong pairs."""
        beta, kind = self._own("beta"), self._own("preference")
        preferred = (base[0] - base[1]) - (right - wrong)
        held = (beta * preferred.detach() > 1) & (kind == "hinge")
        return PREFERENCES[kind](preferred, beta).mean(), held.float().mean()

    def match(self, errors: Tensor) -> Tensor:
        """softrepa's loss, a scalar, of the errors [B, B] of each image (row) with each text (column)."""
        logits = self._own("scale") * torch.exp(-errors / self._own("temperature"))
        own = torch.arange(len(errors), device=errors.device)
        contrast = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        return contrast + self._own("diagonal") * errors.diagonal().mean()

    def _own(self, name: str) -> Any:
        given = getattr(self, name)
        return OWN[self.contrast][name] if given is None else given
