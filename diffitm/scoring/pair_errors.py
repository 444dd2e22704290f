"""Noise-prediction errors of (image, text) pairs at every timestep of a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from diffitm.models.denoiser import Condition, Denoiser, select
from diffitm.scoring.batching import Batch
from diffitm.scoring.noise_plan import NoisePlan


@dataclass(frozen=True)
class PairErrors:
    """float32 [P, N] on the CPU, P pairs by N timesteps.

    `l2` is the plain norm over the latent's elements, `l1` and `huber` (delta 1) are means over
    them. The unconditional error is that of a pair with the empty text.
    """

    l2: Tensor
    l1: Tensor
    huber: Tensor
    elements: int

    @property
    def mse(self) -> Tensor:
        """Mean squared error, [P, N]."""
        return self.l2**2 / self.elements


@torch.inference_mode()
def pair_errors(
    denoiser: Denoiser,
    latents: Tensor,
    condition: Condition,
    plan: NoisePlan,
    pairs: Tensor,
    batch: Batch | None = None,
) -> PairErrors:
    """e(x, w, t) = || target(eps, z0, t) - model(z_t, t, w) || (DiffusionITM, eq. 3), at the whole plan.

    latents [I, C, h, w], a condition of T texts, pairs int64 [P, 2] of (image, text) rows. A `batch`,
    of 64 by default, is filled over pairs and timesteps alike; each pair costs len(plan) forwards of
    the model, whose time the batch adds up. No pairs give no errors, [0, N].

    Raises as error_batches.
    """
    count = len(plan)
    _check_rows(pairs, len(latents), len(next(iter(condition.values()))))
    pairs = pairs.view(-1, 2)
    places = torch.arange(count).repeat(len(pairs))[:, None]
    items = torch.cat([pairs.repeat_interleave(count, 0), places], 1)
    found = [torch.zeros(3, 0, device=denoiser.device)]
    found += error_batches(denoiser, latents, condition, plan, items, batch)
    l2, l1, huber = torch.cat(found, 1).cpu().view(3, len(pairs), count)
    return PairErrors(l2, l1, huber, latents.shape[1:].numel())


@torch.inference_mode()
def error_batches(
    denoiser: Denoiser,
    latents: Tensor,
    condition: Condition,
    plan: NoisePlan,
    items: Tensor,
    batch: Batch | None = None,
    predict: Callable[[Tensor, Tensor, Condition], Tensor] | None = None,
) -> Iterator[Tensor]:
    """l2, l1 and huber errors of items int64 [M, 3]: (image, text, place in the plan). A batch's are float32
    [3, B] on the model's device: who fetches each makes a GPU wait. `predict` is called instead of the
    denoiser's, as it is.

    Raises ValueError if the plan's noise has another shape than a latent, one of its timesteps is not a
    training timestep of the model, or an item names a row that is not there, such as a negative one;
    InputError if not one forward fits a GPU's memory.
    """
    if plan.noise.shape[1:] != latents.shape[1:]:
        wrong, right = tuple(plan.noise.shape[1:]), tuple(latents.shape[1:])
        raise ValueError(f"the plan's noise has shape {wrong}, the latents {right}")
    denoiser.schedule.check(plan.timesteps)
    if len(items) == 0:
        return
    _check_rows(items[:, :2], len(latents), len(next(iter(condition.values()))))
    device, used = denoiser.device, batch or Batch(64)
    latents, noise = latents.to(device), plan.noise.to(device)
    steps, items = plan.timesteps.to(device), items.to(device)
    predict = predict or denoiser.predict

    def forward(start: int, end: int) -> Tensor:
        image, text, place = items[start:end].T
        # Noise by place in the plan alone: every pair meets the same.
        at, eps, z0 = steps[place], noise[place], latents[image]
        noised, chosen = denoiser.schedule.add_noise(z0, eps, at), select(condition, text)
        with used.timed(device):
            predicted = predict(noised, at, chosen)
        target = denoiser.schedule.target(z0, eps, at)
        return torch.stack(_kinds(predicted, target))

    yield from used.run(len(items), forward)


def _check_rows(pairs: Tensor, images: int, texts: int) -> None:
    """Raises ValueError for a pair of a row that is not there: torch would count negative ones from the
    end."""
    if len(pairs) == 0:
        return
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs must be [P, 2] of (image, text) rows, not {tuple(pairs.shape)}")
    for name, column, count in (("image", pairs[:, 0], images), ("text", pairs[:, 1], texts)):
        wrong = ((column < 0) | (column >= count)).nonzero().flatten()
        if len(wrong):
            at = int(wrong[0])
            raise ValueError(
                f"pairs[{at}] = {tuple(pairs[at].tolist())}: there is no {name} {int(column[at])}, "
                f"rows are 0 to {count - 1}"
            )


def _kinds(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l2 norm, mean absolute and mean Huber error of each row, [B] each."""
    wrong = (target - predicted).flatten(1)
    huber = huber_loss(predicted, target, reduction="none").flatten(1)
    return wrong.norm(dim=1), wrong.abs().mean(1), huber.mean(1)
