"""Stable Diffusion 1.x and 2.x in the diffusers layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffitm.matching.schedule import NoiseSchedule
from diffitm.models.denoiser import Condition, Denoiser


class StableDiffusion(Denoiser):
    """VAE, text encoder and U-Net; epsilon or v-prediction, as the scheduler's config says.

    `folder` is a local folder or a Hub id, `revision` a commit of the latter. The scheduler gives
    the training schedule only. Raises OSError if a part cannot be read.
    """

    def __init__(
        self,
        folder: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        variant: str | None = None,
    ) -> None:
        where = {"revision": revision}
        weights = {**where, "torch_dtype": dtype, "variant": variant}
        self.device, self.dtype = torch.device(device), dtype
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer", **where)
        text = {**where, "dtype": dtype, "variant": variant}
        encoder, report = CLIPTextModel.from_pretrained(
            folder, subfolder="text_encoder", output_loading_info=True, **text
        )
        if missing := sorted(report["missing_keys"]):  # transformers would make them up
            raise OSError(f"the weights of text_encoder lack {', '.join(missing[:5])}")
        self.text_encoder = encoder.to(self.device).eval()
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", **weights)
        self.vae = vae.to(self.device).eval()
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", **weights)
        self.unet = unet.to(self.device).eval()
        for module in (self.text_encoder, self.vae, self.unet):
            module.requires_grad_(False)
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler", **where)
        self.scheduler = scheduler
        self.schedule = NoiseSchedule.from_alphas_cumprod(
            scheduler.alphas_cumprod, scheduler.config.prediction_type
        )
        side = int(unet.config.sample_size)
        self.latent_shape = (int(unet.config.in_channels), side, side)
        self.resolution = side * 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        posterior = self.vae.encode(pixels.to(self.device, self.dtype)).latent_dist
        scale = self.vae.config.scaling_factor
        return posterior.mean.float() * scale, posterior.std.float() * scale

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts than the encoder takes are cut, as Stable Diffusion does."""
        ids = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"hidden": self.text_encoder(ids.to(self.device)).last_hidden_state}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        hidden = condition["hidden"].to(self.dtype)
        out = self.unet(noised.to(self.dtype), timesteps, hidden, return_dict=False)[0]
        return out.float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. DPM-Solver++ (Lu et al. 2022), diffusers' pipeline without safety checker."""
        pipeline = StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=DPMSolverMultistepScheduler.from_config(self.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            [prompt] * len(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
