"""The update step of tuning a denoiser's LoRA for matching. The loop is the caller's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffitm.models.denoiser import Condition, Denoiser
from diffitm.models.lora import add_lora, lora_network, without_lora
from diffitm.scoring.text_cache import TextCache
from diffitm.training.lora.objectives import Objective
from diffitm.training.sampler import Item, draw_noise

TEXT_CACHE_BYTES = 512 * 2**20
TEXT_BATCH = 64


@dataclass(frozen=True)
class Posterior:
    """Mean and std of latents, [B, C, h, w] each."""

    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class Losses:
    """Of a micro-batch: the loss with its graph, and for the log the means of E+ and of the contrast
    (0 without one; of a batch's matrix the errors beside the diagonal) and the share of contrasts that
    the bound holds."""

    loss: Tensor
    right: Tensor
    contrast: Tensor
    clipped_share: Tensor


class Tuner:
    """A frozen denoiser with a trainable LoRA, and an objective.

    `parameters` are the LoRA's, float32. With `autocast` the forward runs in the denoiser's dtype.
    `encode_texts` stands in for the denoiser's own where texts were encoded beforehand. Raises
    InputError for a denoiser that takes no LoRA.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        rank: int = 4,
        seed: int = 0,
        checkpointing: bool = False,
        encode_texts: Callable[[Sequence[str]], Condition] | None = None,
    ) -> None:
        self.denoiser, self.objective = denoiser, objective
        self.network = lora_network(denoiser)
        self.parameters = add_lora(self.network, rank, seed)
        if checkpointing:
            denoiser.checkpoint_gradients()
        self.texts = TextCache(encode_texts or denoiser.encode_texts, TEXT_CACHE_BYTES, TEXT_BATCH)
        self.autocast = denoiser.dtype != torch.float32

    def losses(self, items: Sequence[Item], right: Posterior, wrong: Posterior | None) -> Losses:
        """The objective on a micro-batch; `wrong` are the negative images' latents, None where the
        negatives are captions alone.

        Right and wrong pairs of an example share timestep, noise and the posterior's noise, and are
        one batch of the U-Net. An objective that contrasts a batch has one timestep and noise, those of
        its first example, and no contrast where unreadable images left one example alone.
        """
        device = self.denoiser.device
        drawn = draw_noise(
            [item.seed for item in items],
            self.denoiser.latent_shape,
            self.denoiser.schedule,
        )
        at, noise = drawn.timesteps.to(device), drawn.noise.to(device)
        latents = self._latents(right, drawn.posterior)
        captions = [item.caption for item in items]
        contrast = self.objective.contrast
        if contrast == "batch":
            return self._matched(latents, captions, at, noise)
        if contrast == "none":
            error, _ = self._errors(latents, captions, at, noise)
            loss, held = self.objective(error, None)
            return Losses(loss, error.detach().mean(), error.new_zeros(()), held)
        if contrast == "empty":
            others, other_latents = [""] * len(items), latents
        else:
            others = [item.negative_caption for item in items]
            other_latents = latents if wrong is None else self._latents(wrong, drawn.posterior)
        pairs = (
            torch.cat([latents, other_latents]),
            captions + others,
            at.repeat(2),
            noise.repeat(2, 1, 1, 1),
        )
        if self.objective.guard == "frozen":
            error, _ = self._errors(latents, captions, at, noise)
            with torch.no_grad(), without_lora(self.network):
                subtracted, _ = self._errors(other_latents, others, at, noise)
        else:
            errors, predicted = self._errors(*pairs)
            error, subtracted = errors.chunk(2)
            if contrast == "distance":
                one, two = predicted.chunk(2)
                subtracted = ((two - one) ** 2).flatten(1).mean(1)
        if contrast == "base":
            with torch.no_grad(), without_lora(self.network):
                before, _ = self._errors(*pairs)
            one, two = before.chunk(2)
            loss, held = self.objective.prefer(error, subtracted, (one, two))
        else:
            loss, held = self.objective(error, subtracted)
        return Losses(loss, error.detach().mean(), subtracted.detach().mean(), held)

    def _matched(self, latents: Tensor, captions: list[str], at: Tensor, noise: Tensor) -> Losses:
        """Every image of the micro-batch with every caption, as one batch of the U-Net."""
        count = len(captions)
        errors, _ = self._errors(
            latents.repeat_interleave(count, 0),
            captions * count,
            at[:1].repeat(count**2),
            noise[:1].repeat(count**2, 1, 1, 1),
        )
        errors = errors.view(count, count)
        right, total = errors.detach().diagonal().sum(), errors.detach().sum()
        wrong = (total - right) / max(1, count**2 - count)
        return Losses(self.objective.match(errors), right / count, wrong, errors.new_zeros(()))

    def _latents(self, posterior: Posterior, noise: Tensor) -> Tensor:
        device = self.denoiser.device
        mean, std = posterior.mean.to(device), posterior.std.to(device)
        return mean + std * noise.to(device)

    def _errors(
        self, latents: Tensor, texts: list[str], at: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mean squared error of each pair [B], and the predictions [B, C, h, w]."""
        schedule = self.denoiser.schedule
        noised = schedule.add_noise(latents, noise, at)
        device = self.denoiser.device
        with torch.autocast(device.type, self.denoiser.dtype, enabled=self.autocast):
            predicted = self.denoiser.predict(noised, at, self.texts.repeated(texts))
        wrong = predicted.float() - schedule.target(latents, noise, at)
        return (wrong**2).flatten(1).mean(1), predicted.float()
