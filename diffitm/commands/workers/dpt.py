"""What a worker of Ray Train runs to train DPT's adapter, and a diffusion model's LoRA with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from diffitm.commands.workers.lora import DenoiserModule
from diffitm.distributed.train_loop import work
from diffitm.models.denoiser import Denoiser, Encode
from diffitm.models.dpt import DptAdapter, load_adapter, settings_of
from diffitm.models.dpt_file import shape_of
from diffitm.scoring.dpt import DptScorer
from diffitm.training.dpt.step import Dpt
from diffitm.training.job import DptJob, Validation
from diffitm.training.module import Worker
from diffitm.training.sampler import Item


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
        )
        told = (made.of_texts, made.of_images, made.right_texts, made.right_images)
        error = () if made.error is None else (made.error,)
        yield made.loss, (made.loss.detach(), *told, *error)

    def weights(self) -> dict[str, Tensor]:
        return self.tuner.weights()

    def load(self, weights: dict[str, Tensor]) -> None:
        self.tuner.load(weights)

    def scorer(self, check: Validation) -> DptScorer:
        adapter = self.tuner.adapter.eval()
        return DptScorer(self.denoiser, adapter, check.root, resize=self.job.resize)


class TuneModule(ProbeModule):
    """The same with a LoRA."""

    names = (*ProbeModule.names, "error")


def build(job: DptJob, denoiser: Denoiser, encode_texts: Encode | None = None) -> Dpt:
    """What is trained. Raises InputError for a model without such a map, or that the adapter is not for."""
    if job.adapter is None:
        shape = shape_of(settings_of(denoiser, "model"), job.map, "feature_map")
        return Dpt(denoiser, DptAdapter(shape, job.seed), encode_texts=encode_texts)
    adapter = load_adapter(job.adapter, denoiser, "adapter")
    return Dpt(
        denoiser,
        adapter,
        job.rank,
        job.seed,
        job.trains_adapter,
        job.checkpointing,
        encode_texts,
    )


def loop(settings: dict[str, Any]) -> int | None:
    """What Ray Train calls on each worker."""
    return work(ProbeModule if settings["job"].adapter is None else TuneModule, settings)
