"""The settings of a tuning run, as a value that travels to the workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffitm.models.dpt_file import AdapterFile
from diffitm.models.loading import ModelSource
from diffitm.training.diva.recap import Recap
from diffitm.training.dpt.expressions import GroundingData
from diffitm.training.lora.objectives import Objective
from diffitm.training.row_table import RowsFile, StoredRows
from diffitm.training.sampler import BatchSampler

if TYPE_CHECKING:  # open_clip is imported only where CLIP is used
    from diffitm.models.clip import ClipSource


@dataclass(frozen=True)
class Validation:
    """Tasks below `root` that are scored every so many steps, `examples` of each, evenly spread;
    `timesteps` of a diffusion model's score."""

    root: str
    tasks: tuple[str, ...]
    every: int
    examples: int
    timesteps: int = 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What every tuning run has: a diffusion model, rows, updates of the weights.

    `micro_batch_size` examples make a micro-batch, `grad_accum_steps` of those an update, whatever the
    number of workers.
    """

    source: ModelSource
    variant: str | None
    dtype: str
    rows: RowsFile
    root: str
    negatives: str = "none"
    per_example: bool = False
    micro_batch_size: int
    grad_accum_steps: int
    steps: int
    optimizer: str
    lr: float
    lr_scheduler: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    ema: float | None = None
    checkpointing: bool
    seed: int
    checkpoint_every: int
    log_every: int
    validation: Validation | None
    latents: str | None  # folder of training.latent_cache, None to encode on the way

    @property
    def reads_images(self) -> bool:
        """Whether the loop decodes images."""
        return True

    def sampler(self) -> BatchSampler:
        """Which rows make up which step."""
        rows = StoredRows(self.rows)
        return BatchSampler(
            rows,
            rows.kept,
            self.micro_batch_size,
            self.grad_accum_steps,
            self.negatives,
            self.per_example,
            self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class DenoiserJob(Training):
    """Tuning of a diffusion model for matching; `rank` is its LoRA's."""

    resize: str
    rank: int
    texts: str | None  # folder of training.latent_cache

    @property
    def reads_images(self) -> bool:
        """See Training: not where they were encoded beforehand."""
        return self.latents is None


@dataclass(frozen=True, kw_only=True)
class SdsJob(Training):
    """Tuning of a CLIP's norms by SDS-CLIP. `weight` is lambda, the denoising error's beside the
    contrastive loss; `jacobian` whether the gradient goes through the teacher's network."""

    clip: ClipSource
    projection_lr: float
    weight: float
    jacobian: bool


@dataclass(frozen=True, kw_only=True)
class LoraJob(DenoiserJob):
    """Tuning of a diffusion model's LoRA by its errors."""

    objective: Objective


@dataclass(frozen=True, kw_only=True)
class DptJob(DenoiserJob):
    """Training of DPT's adapter on a map of the U-Net, `map` by its name, or with `adapter` tuning with what
    a probe left, which stays as it is unless `trains_adapter`; with `grounding` by boxes, too."""

    map: str
    adapter: AdapterFile | None
    trains_adapter: bool
    grounding: GroundingData | None = None


@dataclass(frozen=True, kw_only=True)
class DivaJob(Training):
    """Tuning of a CLIP's image tower under the diffusion model. The first `projection_steps` train the
    projection alone, which has a learning rate of its own. `crop_scale` is the least share of an image
    that it sees, 1 the whole. `held_out` are images that are not trained on, for the reconstruction error,
    measured every `measure_every` steps (0: never)."""

    clip: ClipSource
    projection_lr: float
    projection_steps: int
    recap: Recap
    prompt: str
    add: str
    repeats: int
    reduce: str
    crop_scale: float
    held_out: Sequence[str]
    measure_every: int
