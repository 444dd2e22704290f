"""What a worker of Ray Train runs to tune a diffusion model's LoRA."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffitm.distributed.train_loop import work
from diffitm.models.denoiser import Condition
from diffitm.models.families import FAMILIES
from diffitm.models.loading import load_denoiser
from diffitm.models.lora import lora_network, lora_weights, restore_adapter
from diffitm.scoring.diffusion import DiffusionScorer, scaled
from diffitm.scoring.encoded_items import Cache
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.protocols import choose_protocol, planned
from diffitm.training.crops import Whole
from diffitm.training.dataloader import Loader
from diffitm.training.job import DenoiserJob, LoraJob, Validation
from diffitm.training.latent_cache import CachedLoader
from diffitm.training.lora.step import Posterior, Tuner
from diffitm.training.module import Measured, TrainModule, Worker
from diffitm.training.sampler import Item, images_in
from diffitm.training.validation import accuracy


class DenoiserModule(TrainModule):
    """A denoiser, latents of a micro-batch's images, and a validation that chooses the best weights."""

    job: DenoiserJob

    def __init__(self, job: DenoiserJob, worker: Worker) -> None:
        super().__init__(job, worker)
        self.denoiser = load_denoiser(job.source, job.dtype, str(worker.device), job.variant)
        self.encode_texts = self._on_device(Cache(job.texts)) if job.texts else None
        if job.latents:
            self.loader = CachedLoader(job, job.latents, worker.rank, worker.world)
        else:
            view = Whole(self.denoiser.resolution, job.resize)
            self.loader = Loader(job, worker.rank, worker.world, view, worker.processors)

    @abstractmethod
    def scorer(self, check: Validation) -> DiffusionScorer:
        """What validates the model as it is."""

    def posteriors_of(
        self, items: list[Item], images: dict[str, Any]
    ) -> Callable[[list[str]], Posterior]:
        """What gives the latents of images of the items by their paths; each image is encoded once."""
        unique = images_in(items)
        mean, std = self._posteriors([images[path] for path in unique])
        place = {path: i for i, path in enumerate(unique)}

        def pick(paths: list[str]) -> Posterior:
            rows = torch.tensor([place[path] for path in paths], device=self.worker.device)
            return Posterior(mean.clone()[rows], std.clone()[rows])

        return pick

    def _posteriors(self, images: list[Any]) -> tuple[Tensor, Tensor]:
        """Mean and std of latents [N, C, h, w], of pixels or as they were cached."""
        if self.job.latents:
            mean, std = (torch.stack(p).to(self.worker.device) for p in zip(*images, strict=True))
            return mean, std
        pixels = torch.stack([scaled(image) for (image,) in images])
        return self.denoiser.encode_posterior(pixels.to(self.worker.device))

    def _on_device(self, cache: Cache) -> Callable[[Sequence[str]], Condition]:
        def read(texts: Sequence[str]) -> Condition:
            return {name: value.to(self.worker.device) for name, value in cache(texts).items()}

        return read

    def measures(self, step: int) -> bool:
        return self.job.validation is not None and self.is_due(step, self.job.validation.every)

    def measure(self, step: int) -> Measured:
        """Accuracy of the tasks; their mean is the quality."""
        check = self.job.validation
        assert check is not None, "measures() asks for it"
        lora_network(self.denoiser).eval()
        scorer = self.scorer(check)
        values = {name: accuracy(name, check, scorer, self.worker) for name in check.tasks}
        measured = {f"accuracy/{name}": v for name, v in values.items() if v is not None}
        return Measured(measured, float(np.mean(list(measured.values()) or [0.0])))


class LoraModule(DenoiserModule):
    """A Tuner, validated by its errors."""

    job: LoraJob
    names = ("loss", "right", "contrast", "held")

    def __init__(self, job: LoraJob, worker: Worker) -> None:
        super().__init__(job, worker)
        self.tuner = Tuner(
            self.denoiser,
            job.objective,
            job.rank,
            job.seed,
            job.checkpointing,
            self.encode_texts,
        )
        self.groups = [(self.tuner.parameters, job.lr)]

    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """Negatives of the same image need no latents of their own."""
        pick = self.posteriors_of(items, images)
        right = [item.image for item in items]
        wrong = [item.negative_image for item in items]
        made = self.tuner.losses(items, pick(right), pick(wrong) if wrong != right else None)
        yield made.loss, (made.loss.detach(), made.right, made.contrast, made.clipped_share)

    def weights(self) -> dict[str, Tensor]:
        return lora_weights(self.tuner.network)

    def load(self, weights: dict[str, Tensor]) -> None:
        restore_adapter(self.tuner.network, weights)

    def scorer(self, check: Validation) -> DiffusionScorer:
        protocol = choose_protocol("auto", FAMILIES[self.job.source.family].flow)
        steps = planned(protocol, check.timesteps)
        plan = make_plan(steps, self.denoiser.latent_shape)
        return DiffusionScorer(self.denoiser, plan, check.root, self.job.resize)


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(LoraModule, settings)
