"""What latent diffusion models in the diffusers layout share: parts, latents, training schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor
from transformers import CLIPTokenizer

from diffitm.models.denoiser import Denoiser
from diffitm.models.noise_schedule import NoiseSchedule

_OTHER_SCHEDULES = ("EDM", "FlowMatch")  # their configs hold no betas


@dataclass(frozen=True)
class Folder:
    """A local folder or a Hub id with a commit, whose parts are read frozen and in eval mode.

    Every method raises OSError if it cannot read its part.
    """

    location: str
    dtype: torch.dtype
    device: torch.device
    revision: str | None
    variant: str | None

    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return dict(DiffusionPipeline.load_config(self.location, revision=self.revision))

    def model(self, kind: Any, part: str, dtype: torch.dtype | None = None) -> Any:
        """A model of diffusers, in another dtype than the others if one is given."""
        loaded = kind.from_pretrained(
            self.location,
            subfolder=part,
            revision=self.revision,
            torch_dtype=dtype or self.dtype,
            variant=self.variant,
        )
        return loaded.to(self.device).eval().requires_grad_(False)

    def text_encoder(self, kind: Any, part: str) -> Any:
        """A text model of transformers."""
        loaded, report = kind.from_pretrained(
            self.location,
            subfolder=part,
            revision=self.revision,
            dtype=self.dtype,
            variant=self.variant,
            output_loading_info=True,
        )
        if missing := sorted(report["missing_keys"]):  # transformers would make them up
            raise OSError(f"the weights of {part} lack {', '.join(missing[:5])}")
        return loaded.to(self.device).eval().requires_grad_(False)

    def tokenizer(self, part: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(self.location, subfolder=part, revision=self.revision)

    def scheduler(self) -> DDPMScheduler:
        """The training schedule, whatever sampling scheduler the folder names."""
        config = DDPMScheduler.load_config(
            self.location, subfolder="scheduler", revision=self.revision
        )
        name = str(config.get("_class_name"))
        if name.startswith(_OTHER_SCHEDULES):
            raise OSError(f"the scheduler {name} gives no betas, only DDPM's schedule is supported")
        return DDPMScheduler.from_config(config)


def check_width(unet: Any, width: int) -> None:
    """Raises OSError if texts of this width are not what the U-Net attends to."""
    found = unet.config.cross_attention_dim
    if set(found if isinstance(found, list | tuple) else [found]) != {width}:
        raise OSError(f"its texts are {width} wide, its U-Net takes {found}: parts of two models")


class LatentDiffusion(Denoiser):
    """A network (`network`) on the latents of a VAE; the prediction is what the scheduler's config
    says."""

    def __init__(self, folder: Folder, network: Any, vae: AutoencoderKL) -> None:
        self.device, self.dtype = folder.device, folder.dtype
        self.network, self.vae, self.scheduler = network, vae, folder.scheduler()
        self.schedule = NoiseSchedule.from_alphas_cumprod(
            self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        )
        side = int(network.config.sample_size)
        self.latent_shape = (int(network.config.in_channels), side, side)
        self.resolution = side * 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Denoiser."""
        unscaled = latents.to(self.device) / self.vae.config.scaling_factor
        pixels = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    def checkpoint_gradients(self) -> None:
        """See Denoiser."""
        self.network.enable_gradient_checkpointing()

    def sampler(self) -> DPMSolverMultistepScheduler:
        """DPM-Solver++ (Lu et al. 2022) on the training schedule."""
        return DPMSolverMultistepScheduler.from_config(self.scheduler.config)


def is_cut(tokenizer: CLIPTokenizer, text: str) -> bool:
    """Whether tokenize leaves out the text's end."""
    return len(tokenizer(text).input_ids) > tokenizer.model_max_length


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids [B, L]. Longer texts than the encoder takes are cut, as Stable Diffusion does."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def sample(
    pipeline: Any,
    prompt: str,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    output_type: str = "pil",
) -> Any:
    """What a pipeline of diffusers makes of the prompt, once a seed; see Denoiser.generate."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [prompt] * len(seeds),
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type=output_type,
    ).images
