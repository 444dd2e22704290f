"""What a worker of Ray Train runs to tune a diffusion model's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffitm.distributed.train_loop import Run, work
from diffitm.models.denoiser import Condition
from diffitm.models.loading import load_denoiser
from diffitm.models.lora import load_lora, lora_weights
from diffitm.scoring.diffusion import DiffusionScorer, scaled
from diffitm.scoring.noise_plan import make_plan, plan_timesteps
from diffitm.training.crops import Whole
from diffitm.training.dataloader import Loader
from diffitm.training.job import Job, Validation
from diffitm.training.latent_cache import Cache, CachedLoader
from diffitm.training.lora.step import Posterior, Tuner
from diffitm.training.sampler import Item, images_in


class LoraRun(Run):
    """A Tuner, and a validation that chooses the best weights."""

    job: Job
    names = ("loss", "right", "contrast", "held")

    def __init__(self, job: Job, monitor: Any, processors: float) -> None:
        super().__init__(job, monitor, processors)
        denoiser = load_denoiser(job.source, job.dtype, str(self.device), job.variant)
        texts = self._on_device(Cache(job.texts)) if job.texts else None
        self.tuner = Tuner(denoiser, job.objective, job.rank, job.seed, job.checkpointing, texts)
        loader: Loader | CachedLoader
        if job.latents:
            loader = CachedLoader(job, job.latents, self.rank, self.world)
        else:
            view = Whole(denoiser.resolution, job.resize)
            loader = Loader(job, self.rank, self.world, view, self.processors)
        self.begin([(self.tuner.parameters, job.lr)], loader)

    def losses(
        self, items: list[Item], found: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """See Run. Images are encoded once; negatives of the same image need no latents of their own."""
        right = [item.image for item in items]
        wrong = [item.negative_image for item in items]
        unique = images_in(items)
        mean, deviation = self._posteriors([found[path] for path in unique])
        place = {path: i for i, path in enumerate(unique)}

        def pick(paths: list[str]) -> Posterior:
            rows = torch.tensor([place[path] for path in paths], device=self.device)
            return Posterior(mean.clone()[rows], deviation.clone()[rows])

        made = self.tuner.losses(items, pick(right), pick(wrong) if wrong != right else None)
        yield made.loss, (made.loss.detach(), made.right, made.contrast, made.clipped_share)

    def _posteriors(self, images: list[Any]) -> tuple[Tensor, Tensor]:
        """Mean and deviation of latents [N, C, h, w], of pixels or as they were cached."""
        if self.job.latents:
            mean, deviation = (torch.stack(p).to(self.device) for p in zip(*images, strict=True))
            return mean, deviation
        pixels = torch.stack([scaled(image) for (image,) in images])
        return self.tuner.denoiser.encode_posterior(pixels.to(self.device))

    def _on_device(self, cache: Cache) -> Callable[[Sequence[str]], Condition]:
        def read(texts: Sequence[str]) -> Condition:
            return {name: value.to(self.device) for name, value in cache(texts).items()}

        return read

    def weights(self) -> dict[str, Tensor]:
        """See Run."""
        return lora_weights(self.tuner.unet)

    def load(self, weights: dict[str, Tensor]) -> None:
        """See Run."""
        load_lora(self.tuner.unet, weights)

    def check(self) -> None:
        """Accuracy of the tasks; keeps the best weights."""
        check = self.job.validation
        if check is None or not self.due(check.every):
            return
        self.tuner.unet.eval()
        with self.averaged():
            scorer = self._scorer(check)
            found = {name: self.accuracy(name, check, scorer) for name in check.tasks}
            mean = float(np.mean([value for value in found.values() if value is not None] or [0.0]))
            if self.progress.step == 0:
                self.progress.base = mean
            elif mean > self.progress.best:
                self.progress.best, self.progress.best_step = mean, self.progress.step
                self.best = self.weights()
        self.log({f"accuracy/{name}": value for name, value in found.items() if value is not None})

    def _scorer(self, check: Validation) -> DiffusionScorer:
        steps = plan_timesteps("diffusionitm", check.timesteps)
        plan = make_plan(steps, self.tuner.denoiser.latent_shape)
        return DiffusionScorer(self.tuner.denoiser, plan, check.root, self.job.resize)


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(LoraRun, settings)
