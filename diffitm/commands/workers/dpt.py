"""What a worker of Ray Train runs to train DPT's adapter, and a diffusion model's LoRA with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffitm.commands.workers.lora import DenoiserModule
from diffitm.distributed.train_loop import work
from diffitm.models.denoiser import Denoiser
from diffitm.models.dpt import DptAdapter, Encode, load_adapter, settings_of
from diffitm.models.dpt_file import shape_of
from diffitm.scoring.dpt import DptScorer
from diffitm.training.dpt.expressions import StoredExpressions
from diffitm.training.dpt.locating import Locator, located
from diffitm.training.dpt.step import Dpt
from diffitm.training.job import DptJob, Validation
from diffitm.training.module import Measured, Worker
from diffitm.training.sampler import Item
from diffitm.training.validation import spread

BOXES = ("of_classes", "of_l1", "of_giou", "of_alignment")


class ProbeModule(DenoiserModule):
    """A Dpt without a LoRA, and a validation by its own score that chooses the best weights."""

    job: DptJob
    names: tuple[str, ...] = (
        "loss",
        "of_texts",
        "of_images",
        "right_texts",
        "right_images",
    )

    def __init__(self, job: DptJob, worker: Worker) -> None:
        super().__init__(job, worker)
        self.tuner = build(job, self.denoiser, self.encode_texts)
        self.groups = [(self.tuner.parameters, job.lr)]
        self.said, self.check = None, None
        if job.grounding is not None:
            self.names = (*self.names, *BOXES)
            self.said = StoredExpressions(job.grounding.file)
            if job.grounding.check is not None:
                self.check = StoredExpressions(job.grounding.check)

    def losses(
        self, items: list[Item], images: dict[str, Any]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """See TrainModule."""
        pick = self.posteriors_of(items, images)
        made = self.tuner.losses(
            items,
            pick([item.image for item in items]),
            pick([item.negative_image for item in items]),
            pick([item.random_image for item in items]),
            [self.said.draw(item.image, item.seed) for item in items] if self.said else (),
        )
        told = (made.of_texts, made.of_images, made.right_texts, made.right_images)
        error = () if made.error is None else (made.error,)
        boxes: tuple[Tensor, ...] = ()
        if self.said is not None:
            found, zero = made.grounding, made.of_texts.new_zeros(())
            boxes = (zero,) * len(BOXES)
            if found is not None:
                boxes = (found.classes, found.l1, found.giou, found.alignment)
        yield made.loss, (made.loss.detach(), *told, *error, *boxes)

    def weights(self) -> dict[str, Tensor]:
        return self.tuner.weights()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.tuner.load(weights)

    def measure(self, step: int) -> Measured:
        """Accuracy, and beside it how well boxes of other images are found, which chooses nothing."""
        measured = super().measure(step)
        check = self.job.validation
        if self.check is None or check is None:
            return measured
        job = self.job
        locator = Locator(self.denoiser, self.tuner.adapter.eval(), job.root, job.resize)
        found = located(locator, spread(list(self.check), check.examples), self.worker)
        return replace(measured, values=measured.values | found)

    def scorer(self, check: Validation) -> DptScorer:
        adapter = self.tuner.adapter.eval()
        return DptScorer(self.denoiser, adapter, check.root, resize=self.job.resize)


class TuneModule(ProbeModule):
    """The same with a LoRA."""

    names = (*ProbeModule.names, "error")


def build(job: DptJob, denoiser: Denoiser, encode_texts: Encode | None = None) -> Dpt:
    """What is trained. Raises InputError for a model without such a map, or that the adapter is not for."""
    weights = job.grounding.weights if job.grounding else None
    if job.adapter is None:
        shape = shape_of(settings_of(denoiser, "model"), job.map, "feature_map")
        shape = replace(shape, grounding=weights is not None)
        adapter = DptAdapter(shape, job.seed)
        return Dpt(denoiser, adapter, encode_texts=encode_texts, grounding=weights)
    adapter = load_adapter(job.adapter, denoiser, "adapter")
    return Dpt(
        denoiser,
        adapter,
        job.rank,
        job.seed,
        job.trains_adapter,
        job.checkpointing,
        encode_texts,
        weights,
    )


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(ProbeModule if settings["job"].adapter is None else TuneModule, settings)
