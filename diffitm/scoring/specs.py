"""What to score with, as values that travel to the workers: cheap here, loaded there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from diffitm.core.errors import InputError
from diffitm.core.storage import without_query
from diffitm.models.dpt_file import AdapterFile
from diffitm.models.loading import ModelSource, around_texts, load_denoiser, lora_digest
from diffitm.models.sides import Side
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.encoded_items import Cache
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.scorer import CLIP_IMAGE_COST, RowScorer
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES

if TYPE_CHECKING:  # open_clip is imported only where CLIP is used
    from collections.abc import Sequence

    from PIL import Image

    from diffitm.models.clip import ClipSource
    from diffitm.models.denoiser import Denoiser
    from diffitm.models.dpt import DptAdapter

SCORE_VERSION = 1  # grows when the same settings would give other scores


class Painter(Protocol):
    """What generates images."""

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser."""


class Spec(Protocol):
    """What to score with, on the images below a root."""

    @property
    def label(self) -> str:
        """The model's name in tables."""

    @property
    def cost(self) -> int:
        """Forwards of the model a pair."""

    @property
    def image_cost(self) -> int:
        """What an image costs beside them, in forwards."""

    def store_config(self) -> dict[str, Any]:
        """Everything that a score depends on."""

    def build(self, device: str) -> RowScorer:
        """Load the model on this machine."""


@dataclass(frozen=True)
class DiffusionSpec:
    """A diffusion model under a protocol on the images below `root`."""

    source: ModelSource
    root: str
    protocol: str
    timesteps: tuple[float, ...]
    seed: int = 0
    dtype: str = "fp32"
    resize: str = "squash"
    latent_seed: int | None = None
    variant: str | None = None
    lora: str | None = None
    lora_name: str | None = None  # as the user typed it, for tables
    batch_size: int = 64
    compiled: bool = False
    empty: str = "text"
    staged: bool = False  # its texts are encoded by actors of their own
    encoded: tuple[str, ...] = ()  # folders of scoring.encoded_items, with its texts once they are
    image_cost = 0

    @property
    def label(self) -> str:
        """The model's name in tables, with its LoRA file as typed."""
        return self.source.name + (f" + {self.lora_name}" if self.lora_name else "")

    @property
    def cost(self) -> int:
        """Forwards of the U-Net a pair."""
        return len(self.timesteps)

    def store_config(self) -> dict[str, Any]:
        """Everything that a score depends on."""
        config = {
            "kind": "diffusion",
            "version": SCORE_VERSION,
            "weights": self.source.digest,
            "variant": self.variant,
            "lora": lora_digest(self.lora) if self.lora else None,
            "protocol": self.protocol,
            "timesteps": list(self.timesteps),
            "seed": self.seed,
            "dtype": self.dtype,
            "resize": self.resize,
            "latent_seed": self.latent_seed,
            "root": without_query(self.root),
        }
        if self.source.prediction is not None:
            config["prediction_type"] = self.source.prediction
        if self.source.upcast and self.dtype != "fp32":
            config["vae"] = "fp32"
        if self.compiled and self.dtype != "fp32":  # in fp32 it changes less than 1e-5 of an error
            config["compiled"] = True
        if self.source.resolution is not None:
            config["resolution"] = self.source.resolution
        if self.source.guidance is not None:
            config["guidance"] = self.source.guidance
        if self.empty != "text":
            config["empty"] = self.empty
        if around := around_texts(self.source):
            config["around_texts"] = around
        return {**config, **self.source.told}

    def painter(self, device: str) -> Painter:
        """Load what generates images, on this machine."""
        return load_denoiser(self.source, self.dtype, device, self.variant, self.lora)

    def build(self, device: str) -> RowScorer:
        """Load the model on this machine."""
        if not self.timesteps or min(self.timesteps) < 0:
            text = f": {list(self.timesteps)}: give at least one timestep, none of them below 0"
            raise InputError(text, "timesteps")
        side: Side = "network" if self.staged else "whole"
        denoiser = load_denoiser(self.source, self.dtype, device, self.variant, self.lora, side)
        plan = make_plan(self.timesteps, denoiser.latent_shape, self.seed)
        try:
            denoiser.schedule.check(plan.timesteps)
        except ValueError as error:
            raise InputError(str(error)) from error
        return DiffusionScorer(
            denoiser,
            plan,
            self.root,
            self.resize,
            self.batch_size,
            self.latent_seed,
            compiled=self.compiled,
            empty=self.empty,
            encoded=Cache(*self.encoded, limit=TEXT_CACHE_BYTES) if self.staged else None,
        )


@dataclass(frozen=True)
class DptSpec:
    """DPT's score of a diffusion model with an adapter, on the images below `root`."""

    source: ModelSource
    adapter: AdapterFile
    root: str
    timestep: int
    seed: int = 0
    dtype: str = "fp32"
    resize: str = "squash"
    latent_seed: int | None = None
    variant: str | None = None
    batch_size: int = 64
    correction: float = 0.0  # of the latents where images are generated
    cost = 1
    image_cost = 0

    @property
    def label(self) -> str:
        """The model's name in tables, with its adapter as typed."""
        return f"{self.source.name} + DPT {without_query(self.adapter.name)}"

    def store_config(self) -> dict[str, Any]:
        """Everything that a score depends on; a LoRA is named by the adapter, whose digest is here."""
        config = {
            "kind": "dpt",
            "version": SCORE_VERSION,
            "score": "matching",
            "weights": self.source.digest,
            "variant": self.variant,
            "adapter": self.adapter.digest,
            "map": self.adapter.shape.map,
            "timestep": self.timestep,
            "seed": self.seed,
            "dtype": self.dtype,
            "resize": self.resize,
            "latent_seed": self.latent_seed,
            "root": without_query(self.root),
        }
        if self.source.upcast and self.dtype != "fp32":
            config["vae"] = "fp32"
        return config

    def painter(self, device: str) -> Painter:
        """Load what generates images with self-correction, on this machine."""
        from diffitm.models.dpt_sampling import Corrected

        return Corrected(*self._load(device), self.correction)

    def _load(self, device: str) -> tuple[Denoiser, DptAdapter]:
        from diffitm.models.dpt import load_adapter

        lora = self.adapter.lora
        denoiser = load_denoiser(self.source, self.dtype, device, self.variant, lora)
        return denoiser, load_adapter(self.adapter, denoiser, "dpt")

    def build(self, device: str) -> RowScorer:
        """Load the model on this machine."""
        from diffitm.scoring.dpt import DptScorer

        denoiser, adapter = self._load(device)
        try:
            return DptScorer(
                denoiser, adapter, self.root, self.timestep, self.seed, self.resize,
                self.batch_size, self.latent_seed,
            )  # fmt: skip
        except ValueError as error:
            raise InputError(str(error), "dpt_timestep") from error


@dataclass(frozen=True)
class ClipSpec:
    """A CLIP on the images below `root`."""

    source: ClipSource
    root: str
    batch_size: int = 64
    cost = 1
    image_cost = CLIP_IMAGE_COST

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return f"CLIP {self.source.name}"

    def store_config(self) -> dict[str, Any]:
        """Everything that a score depends on."""
        from diffitm.models.clip import preprocessing

        own = preprocessing(self.source)
        config: dict[str, Any] = {
            "kind": "clip",
            "version": SCORE_VERSION,
            "weights": self.source.digest,
            "root": without_query(self.root),
        }
        if own:
            config["preprocessing"] = own
        if self.source.quick_gelu and not self.source.is_tagged:  # a tag says it by itself
            config["quick_gelu"] = True
        return config

    def build(self, device: str) -> RowScorer:
        """Load the model on this machine."""
        from diffitm.scoring.clip import ClipScorer

        return ClipScorer(self.source, self.root, device, self.batch_size)
