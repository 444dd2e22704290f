"""What a worker of Ray Train runs to tune a CLIP's norms by SDS-CLIP."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.distributed.train_loop import work
from diffitm.models.clip import load_clip
from diffitm.models.loading import load_denoiser
from diffitm.scoring.clip import ClipScorer
from diffitm.training.crops import Whole
from diffitm.training.dataloader import Loader
from diffitm.training.diva.sds import SdsClip
from diffitm.training.job import SdsJob
from diffitm.training.module import Measured, TrainModule, Worker
from diffitm.training.sampler import Item
from diffitm.training.validation import accuracy

Batch = tuple[list[Item], dict[str, Any]]


class SdsModule(TrainModule):
    """An SdsClip; its validation measures matching, and chooses nothing.

    The contrastive loss is that of all images and captions of an update. So every worker embeds its
    micro-batches without a graph, they put the embeddings together, and each micro-batch then goes backward
    from the loss's gradient by its own embeddings.
    """

    job: SdsJob
    names: tuple[str, ...] = ("loss", "contrast", "denoising")

    def __init__(self, job: SdsJob, worker: Worker) -> None:
        super().__init__(job, worker)
        self.parts = load_clip(job.clip, worker.device)
        teacher = load_denoiser(job.source, job.dtype, str(worker.device), job.variant)
        caption = job.sampler().batches(0)[0][0].caption
        if job.weight and (reason := teacher.refuses(caption)):
            raise InputError(f": cannot be told of captions: {reason}", "teacher")
        made = (job.weight, job.jacobian, job.seed, job.checkpointing)
        self.sds = SdsClip(self.parts.model, self.parts.tokenizer, teacher, *made)
        if not job.weight:
            self.names = ("loss",)
        norms, projection = self.sds.parts()
        self.groups = [(norms, job.lr)]
        if projection:
            self.groups.append((projection, job.projection_lr))
        squashed = self.sds.clip.visual.preprocess_cfg["resize_mode"] == "squash"
        view = Whole(self.sds.side, "squash" if squashed else "crop")
        self.loader = Loader(job, worker.rank, worker.world, view, worker.processors)
        self.slopes: deque[tuple[Tensor, Tensor]] = deque()  # of micro-batches still to come
        self.contrast = 0.0

    def gather(self, batches: list[Batch]) -> None:
        """The contrastive loss of the update, and its gradient by each embedding of this worker."""
        size, world, rank = self.job.micro_batch_size, self.worker.world, self.worker.rank
        with torch.no_grad():
            own = [torch.cat(self._embedded(*batch), 1).double().cpu() for batch in batches]
        width = 2 * self.sds.projection.in_features
        # A row for each place of the update, in the order that one worker has; what nobody has stays 0.
        places = torch.zeros(self.job.grad_accum_steps * size, width + 1, dtype=torch.float64)
        starts = [(rank + number * world) * size for number in range(len(own))]
        for start, values in zip(starts, own, strict=True):
            places[start : start + len(values), :width] = values
            places[start : start + len(values), width] = 1
        total = self.worker.summed(places)
        there = total[:, width] > 0
        images, texts = total[there, :width].chunk(2, dim=1)
        if not len(images):
            return
        contrast, *slopes = self.sds.contrast(images, texts)
        spread = torch.zeros(len(total), width, dtype=torch.float64)
        spread[there] = torch.cat(slopes, 1)
        self.contrast = float(contrast)
        self.slopes = deque()
        for start, values in zip(starts, own, strict=True):
            by_image, by_text = spread[start : start + len(values)].chunk(2, dim=1)
            self.slopes.append((by_image, by_text))

    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """One loss, whose gradient is this micro-batch's part of the update's."""
        embedded = self._embedded(items, images)
        contrast = torch.tensor(self.contrast, device=self.worker.device)
        # The loop divides by the number of micro-batches, whose sum the contrastive loss's gradient is.
        pairs = zip(embedded, self.slopes.popleft(), strict=True)
        part = torch.stack([(value * slope.to(value)).sum() for value, slope in pairs]).sum()
        part = self.job.grad_accum_steps * part
        loss = contrast + part - part.detach()
        if not self.job.weight:
            yield loss, (loss.detach(),)
            return
        captions, seeds = [item.caption for item in items], [item.seed for item in items]
        error = self.sds.errors(embedded[0], captions, seeds).mean()
        loss = loss + self.job.weight * error
        yield loss, (loss.detach(), contrast, error.detach())

    def _embedded(self, items: list[Item], images: dict[str, Any]) -> tuple[Tensor, Tensor]:
        squares = np.stack([images[item.image][0] for item in items])
        pixels = torch.from_numpy(squares).permute(0, 3, 1, 2)
        return self.sds.embed(pixels, [item.caption for item in items])

    def weights(self) -> dict[str, Tensor]:
        return self.sds.weights()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.sds.load(weights)

    def measures(self, step: int) -> bool:
        check = self.job.validation
        return check is not None and self.is_due(step, check.every)

    def measure(self, step: int) -> Measured:
        """Accuracy of the validation's tasks."""
        check = self.job.validation
        assert check is not None, "measures() asks for it"
        scorer = ClipScorer(self.parts, check.root, str(self.worker.device))
        values = {name: accuracy(name, check, scorer, self.worker) for name in check.tasks}
        return Measured({f"accuracy/{name}": v for name, v in values.items() if v is not None})


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(SdsModule, settings)
