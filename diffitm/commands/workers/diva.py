"""What a worker of Ray Train runs to tune a CLIP under a frozen diffusion model (DIVA)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffitm.core import images
from diffitm.distributed.train_loop import work
from diffitm.models.clip import LoadedClip, load_clip
from diffitm.models.loading import load_denoiser
from diffitm.scoring.clip import ClipScorer
from diffitm.scoring.diffusion import scaled
from diffitm.scoring.encoded_items import Cache
from diffitm.training.crops import Views
from diffitm.training.dataloader import Loader
from diffitm.training.diva.reconstructions import row_of_pictures, write_pictures
from diffitm.training.diva.step import Diva
from diffitm.training.gradient_sync import Gradients
from diffitm.training.job import DivaJob
from diffitm.training.lora.step import Posterior
from diffitm.training.module import Measured, TrainModule, Worker
from diffitm.training.run_folder import PICTURES
from diffitm.training.sampler import Item, seed_of
from diffitm.training.validation import accuracy

DRAWS = 4  # of timestep, noise and patches, of each held-out image
SHOWN = 6  # images of the picture


def build(job: DivaJob, device: torch.device | str) -> tuple[LoadedClip, Diva]:
    """CLIP, and what trains its tower. Raises InputError if the parts cannot be loaded or do not fit."""
    parts = load_clip(job.clip, device)
    teacher = load_denoiser(job.source, job.dtype, str(device), job.variant)
    return parts, Diva(
        parts.model,
        job.clip.name,
        teacher,
        job.recap,
        job.prompt,
        job.add,
        job.repeats,
        job.reduce,
        job.seed,
        job.checkpointing,
    )


class DivaModule(TrainModule):
    """A Diva; its validation measures reconstruction and matching, and chooses nothing."""

    job: DivaJob
    names = ("loss",)

    def __init__(self, job: DivaJob, worker: Worker) -> None:
        super().__init__(job, worker)
        self.parts, self.diva = build(job, worker.device)
        self.passes = job.repeats
        self.cache = Cache(job.latents) if job.latents else None
        cached = self.cache is not None
        view = Views(self.diva.teacher.resolution, self.diva.side, job.crop_scale, both=not cached)
        tower, projection = self.diva.parts()
        self.groups = [(tower, job.lr), (projection, job.projection_lr)]
        self.loader = Loader(job, worker.rank, worker.world, view, worker.processors)
        self.held_out: list[tuple[int, list[np.ndarray]]] | None = None

    def prepare(self, step: int, gradients: Gradients) -> None:
        """The tower waits until the projection has had its steps."""
        tower, _ = self.diva.parts()
        gradients.wait(tower, step < self.job.projection_steps)

    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """One loss a repeat."""
        if self.cache is not None:
            lost = self.cache.failures
            for path in (i.image for i in items if i.image in lost):
                self.worker.lose(f"{path}: {lost[path]}")
            items = [item for item in items if item.image not in lost]
            if not items:
                return
        paths, seeds = [item.image for item in items], [item.seed for item in items]
        values = [images[path] for path in paths]
        pixels = self._stacked([value[-1] for value in values])
        if self.cache is not None:
            latents = self.cache(paths)
            posterior = Posterior(latents["mean"], latents["deviation"])
        else:
            posterior = self._posterior([value[0] for value in values])
        for loss, error in self.diva.losses(pixels, posterior, seeds):
            yield loss, (error,)

    def _posterior(self, squares: list[np.ndarray]) -> Posterior:
        pixels = torch.stack([scaled(square) for square in squares])
        mean, std = self.diva.teacher.encode_posterior(pixels.to(self.worker.device))
        return Posterior(mean.clone(), std.clone())

    def _stacked(self, squares: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)

    def weights(self) -> dict[str, Tensor]:
        return self.diva.weights()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.diva.load(weights)

    def measures(self, step: int) -> bool:
        return self._checks(step) or self.is_due(step, self.job.measure_every)

    def _checks(self, step: int) -> bool:
        check = self.job.validation
        return check is not None and self.is_due(step, check.every)

    @torch.no_grad()
    def measure(self, step: int) -> Measured:
        """Reconstruction error of the held-out images, and accuracy of the validation's tasks."""
        values: dict[str, float] = {}
        if self.is_due(step, self.job.measure_every):
            values |= self._reconstruction(step)
        check = self.job.validation
        if check is not None and self._checks(step):
            scorer = ClipScorer(self.parts, check.root, str(self.worker.device))
            for name in check.tasks:
                if (mean := accuracy(name, check, scorer, self.worker)) is not None:
                    values[f"accuracy/{name}"] = mean
        return Measured(values)

    def _reconstruction(self, step: int) -> dict[str, float]:
        """Mean squared error with the tokens; the first time without them, too, which never changes."""
        kinds = (False, True) if step == 0 else (False,)
        sums = [0.0, *(0.0 for _ in kinds)]
        views = self._held_out_views()
        size = self.job.micro_batch_size
        for begin in range(0, len(views), size):
            numbers, squares = zip(*views[begin : begin + size], strict=True)
            posterior = self._posterior([pair[0] for pair in squares])
            pixels = self._stacked([pair[1] for pair in squares])
            for draw in range(DRAWS):
                seeds = [seed_of("held", number, draw) for number in numbers]
                for place, blind in enumerate(kinds):
                    errors = self.diva.errors(pixels, posterior, seeds, blind)
                    sums[1 + place] += float(errors.sum())
            sums[0] += DRAWS * len(numbers)
        total = self.worker.summed(sums)
        if not total[0]:
            return {}
        names = ("reconstruction", "reconstruction_without_tokens")
        return {name: float(s / total[0]) for name, s in zip(names, total[1:], strict=False)}

    def _held_out_views(self) -> list[tuple[int, list[np.ndarray]]]:
        """This worker's held-out images, whole, with their numbers; unreadable ones are told."""
        if self.held_out is None:
            view = Views(self.diva.teacher.resolution, self.diva.side, 1.0)
            self.held_out = []
            for number in range(self.worker.rank, len(self.job.held_out), self.worker.world):
                path = self.job.held_out[number]
                try:
                    image, _ = images.load(self.job.root, path)
                    self.held_out.append((number, view(image, 0)))
                except Exception as error:  # whatever a decoder raises
                    self.worker.lose(f"{path}: {type(error).__name__}: {error}")
        return self.held_out

    @torch.no_grad()
    def leave(self, folder: Path) -> None:
        """A picture of what the tokens tell the teacher."""
        rows = [
            row_of_pictures(
                self.diva,
                self._stacked([pair[1]]),
                self._posterior([pair[0]]),
                seed_of("held", number, 0),
            )
            for number, pair in self._held_out_views()[:SHOWN]
        ]
        if rows:
            write_pictures(rows, folder / PICTURES)


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(DivaModule, settings)
