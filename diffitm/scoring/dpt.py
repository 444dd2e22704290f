"""DPT's own score: a forward at one timestep, and queries of its feature map compared with the text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffitm.models.denoiser import Condition, Denoiser, select
from diffitm.models.dpt import DptAdapter, MapReader, with_pooled
from diffitm.scoring.batching import measured
from diffitm.scoring.diffusion import DiffusionScorer, MeasuredPair
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES, TextCache

TIMESTEP = 500


class DptScorer(DiffusionScorer):
    """s(z_t, t, y) of Qu et al. 2024 at one timestep, higher is better; the noise is the same for all pairs.

    Parameters as of DiffusionScorer. Raises ValueError for a timestep that is none of the model's.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        adapter: DptAdapter,
        root: str,
        timestep: int = TIMESTEP,
        seed: int = 0,
        resize: str = "squash",
        batch_size: int = 64,
        latent_seed: int | None = None,
    ) -> None:
        plan = make_plan([timestep], denoiser.latent_shape, seed)
        denoiser.schedule.check(plan.timesteps)
        super().__init__(denoiser, plan, root, resize, batch_size, latent_seed)
        encode = partial(with_pooled, denoiser, denoiser.encode_texts)
        self.texts = TextCache(encode, TEXT_CACHE_BYTES, batch_size)
        self.batches = [*self.batches[:2], self.texts.batch]
        self.adapter, self.reader = adapter, MapReader(denoiser, adapter.shape.map)

    @torch.inference_mode()
    def batches_of(self, latents: Tensor, condition: Condition, items: Tensor) -> Iterator[Tensor]:
        """Scores float32 [1, B] of a batch of items each."""
        device, batch = self.device, self.batches[0]
        latents, items = latents.to(device), items.to(device)
        step, noise = self.plan.timesteps.to(device), self.plan.noise

        def forward(start: int, end: int) -> Tensor:
            image, text, place = items[start:end].T
            at, chosen = step[place], select(condition, text)
            noised = self.denoiser.schedule.add_noise(latents[image], noise[place], at)
            with batch.timed(device):
                found, _ = self.reader(noised, at, chosen)
                return self.adapter.score(found, at, chosen["pooled"].float())[None]

        yield from batch.run(len(items), forward)

    def line(self, pair: MeasuredPair) -> dict[str, Any]:
        """The line of the store for a pair that was measured."""
        return pair.line | {"similarity": float(pair.errors[0, 0])}

    def measure_rate(self) -> float:
        """See DiffusionScorer."""
        total, condition = self.batches[0].size, self.texts([""])
        latents = torch.zeros(1, *self.denoiser.latent_shape)
        items = torch.zeros(total, 3, dtype=torch.long)
        return measured(
            total, lambda: [one.cpu() for one in self.batches_of(latents, condition, items)]
        )
