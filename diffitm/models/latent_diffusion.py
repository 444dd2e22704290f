"""What latent diffusion models in the diffusers layout share: parts, latents, training schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.denoiser import Denoiser
from diffitm.models.folder import Folder
from diffitm.models.noise_schedule import NoiseSchedule, Schedule
from diffitm.models.parts import read_schedule


def check_width(config: Any, width: int) -> None:
    """Raises OSError if texts of this width are not what the U-Net of these settings attends to."""
    found = config.cross_attention_dim
    if set(found if isinstance(found, list | tuple) else [found]) != {width}:
        raise OSError(f"its texts are {width} wide, its U-Net takes {found}: parts of two models")


def check_text_width(width: int, taken: int) -> None:
    """Raises OSError if texts of this width are not what a transformer takes."""
    if width != taken:
        raise OSError(
            f"its texts are {width} wide, its transformer takes {taken}: parts of two models"
        )


def check_network(config: Any, latent_channels: int) -> None:
    """Raises OSError if the network does not take the VAE's latents alone, or does not say their size."""
    if not isinstance(config.sample_size, int):
        raise OSError(
            f"the config.json of its network gives sample_size {config.sample_size!r}, not the side of its "
            "latents (64 for images of 512 pixels, 128 for 1024)"
        )
    check_latents(config, latent_channels)


def check_latents(config: Any, latent_channels: int) -> None:
    """Raises OSError if the network does not take the VAE's latents alone."""
    if config.in_channels != latent_channels:
        raise OSError(
            f"its network takes {config.in_channels} channels, its VAE gives {latent_channels}: parts of two "
            "models, or one that also takes a mask or an image (inpainting), which scores no texts"
        )


def check_vae(config: Any, shifts: bool = False) -> None:
    """Raises OSError for settings of a VAE (config.json) that its latents cannot be had with; `shifts` is
    whether its family takes its shift_factor off."""
    sides = len(config.block_out_channels)
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != sides:
            raise OSError(
                f"vae/config.json gives {len(config[key])} {key}, its block_out_channels are {sides}: is "
                f"{key} missing?"
            )
    check_scale(config.scaling_factor)
    for key in ("shift_factor", "latents_mean", "latents_std")[shifts:]:
        if config.get(key):
            raise OSError(
                f"vae/config.json gives {key} {str(config[key])[:60]}, which is not supported: latents are "
                "only multiplied with scaling_factor"
            )


def check_scale(scale: Any) -> None:
    """Raises OSError for a VAE's scaling_factor that is no number above 0."""
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not scale > 0:
        raise OSError(
            f"vae/config.json gives scaling_factor {scale!r}, not a number above 0 (Stable Diffusion's "
            "is 0.18215)"
        )


class LatentDiffusion(Denoiser):
    """A network (`network`) on the latents of a VAE; the prediction is what the scheduler's config
    says. Parts that are not of one model raise OSError."""

    shifts: ClassVar[bool] = False  # whether latents are less the VAE's shift_factor

    def __init__(self, folder: Folder, network: Any, vae: Any) -> None:
        self.device, self.dtype = folder.device, folder.dtype
        self.network, self.vae = network, vae
        self.check_part("vae", vae.config)
        self.check_together(folder.configs)
        self.schedule = self.read_schedule(folder)
        channels, side, factor = self.geometry(network.config, vae.config)
        self.latent_shape, self.resolution = (channels, side, side), side * factor

    @classmethod
    def check_part(cls, name: str, config: Any) -> None:
        """See Denoiser."""
        if name == "vae":
            check_vae(config, cls.shifts)

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs.get("unet") or configs["transformer"]
        check_network(network, configs["vae"].latent_channels)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """Channels and side of latents, and pixels to a latent's side, by the settings of both."""
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return int(network.in_channels), int(network.sample_size), factor

    def read_schedule(self, folder: Folder) -> Schedule:
        """The training schedule, DDPM's."""
        self.scheduler = read_schedule(folder.location, folder.revision)
        return NoiseSchedule.from_alphas_cumprod(
            self.scheduler.alphas_cumprod, self.scheduler.config.prediction_type
        )

    def take_prediction(self, prediction: str) -> None:
        """See Denoiser."""
        super().take_prediction(prediction)
        self.scheduler = DDPMScheduler.from_config(
            self.scheduler.config, prediction_type=prediction
        )

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return (posterior.mean.float() - self._shift) * scale, posterior.std.float() * scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Denoiser."""
        unscaled = latents.to(self.device) / self.vae.config.scaling_factor + self._shift
        pixels = self.vae.decode(unscaled.to(self.vae.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    @property
    def _shift(self) -> float:
        return float(self.vae.config.get("shift_factor") or 0) if self.shifts else 0.0

    def checkpoint_gradients(self) -> None:
        """See Denoiser."""
        self.network.enable_gradient_checkpointing()

    def sampler(self) -> Any:
        """What images are made with: DPM-Solver++ (Lu et al. 2022) on the training schedule."""
        return DPMSolverMultistepScheduler.from_config(self.scheduler.config)


class OneEncoder(LatentDiffusion):
    """A transformer whose texts one encoder reads. Subclasses say which classes its parts are of.

    Raises OSError if a part cannot be read.
    """

    network_kind: ClassVar[Any]
    encoder_kind: ClassVar[Any]
    tokenizer_kind: ClassVar[Any]
    vae_kind: ClassVar[Any] = AutoencoderKL

    def __init__(self, parts: Folder) -> None:
        self.text_encoder = parts.text_encoder(self.encoder_kind, "text_encoder")
        self.tokenizer = parts.tokenizer("tokenizer", self.text_encoder, self.tokenizer_kind)
        self.transformer = parts.model(self.network_kind, "transformer")
        own = self.vae_kind is not AutoencoderKL
        vae = parts.model(self.vae_kind, "vae") if own else parts.vae()
        super().__init__(parts, self.transformer, vae)
        self.finish(parts)

    def finish(self, parts: Folder) -> None:
        """Set what else a family keeps, when its parts are read."""


def is_cut(tokenizer: Any, text: str, length: int | None = None) -> bool:
    """Whether a text's end is left out by tokenize, or where `length` tokens are read."""
    return len(tokenizer(text).input_ids) > (length or tokenizer.model_max_length)


def lowered(text: str) -> str:
    """In lower case and without space around it, as pipelines have texts that they do not clean further."""
    return text.lower().strip()


def tokenize_masked(
    tokenizer: Any, texts: Sequence[str], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids int64 and mask bool, [B, L] with L that of the longest, at most `length`, padded at the
    end."""
    found = tokenizer(
        list(texts), padding="longest", max_length=length, truncation=True, return_tensors="pt",
        padding_side="right",
    ).to(device)  # fmt: skip
    return found.input_ids, found.attention_mask.bool()


def tokenize_whole(
    tokenizer: Any, texts: Sequence[str], length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and mask int64 [B, length], padded where the tokenizer does."""
    found = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(device)
    return found.input_ids, found.attention_mask


def tokenize(tokenizer: Any, texts: Sequence[str], length: int | None = None) -> Tensor:
    """Token ids [B, L], L the tokenizer's or `length`. Longer texts are cut, as Stable Diffusion does."""
    return tokenizer(
        list(texts),
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def sample(
    pipeline: Any,
    denoiser: LatentDiffusion,
    prompt: str,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    unpacked: Callable[[Tensor], Tensor] | None = None,
    **more: Any,
) -> Any:
    """What a pipeline of diffusers makes of the prompt, once a seed; see Denoiser.generate. `unpacked` turns
    its latents into those that the denoiser decodes, `more` is what else it is called with; embeddings stand
    for the prompt.

    The pipeline itself would give a float32 VAE latents of the U-Net's dtype. Raises InputError for pictures
    that are not finite.
    """
    pipeline.set_progress_bar_config(disable=True)
    text = {} if "prompt_embeds" in more else {"prompt": [prompt] * len(seeds)}
    given: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "height": denoiser.resolution,
        "width": denoiser.resolution,
        "output_type": "latent",
    }
    latents = pipeline(**text, **given, **more).images
    latents = latents if unpacked is None else unpacked(latents)
    pixels = torch.cat([denoiser.decode(one[None]) for one in latents])
    check_finite(pixels, prompt, denoiser.dtype)
    return pipeline.image_processor.postprocess(pixels)


def check_finite(pixels: Tensor, prompt: str, dtype: torch.dtype) -> None:
    """Raises InputError for pictures of a prompt that are not finite."""
    if not pixels.isfinite().all():
        raise InputError(
            f"the picture of {prompt!r} is not finite in {dtype}: give another --dtype"
        )
