"""Stable Diffusion XL in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffitm.models.denoiser import Condition
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import (
    LatentDiffusion,
    check_width,
    is_cut,
    sample,
    tokenize,
)

_TEXT_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class StableDiffusionXL(LatentDiffusion):
    """Two text encoders and a U-Net that also takes a pooled text and the image's size (Podell et al.
    2023).

    The condition is {"hidden": [B, L, D], "pooled": [B, P]}: the encoders' penultimate hidden states
    side by side, and the second's projected embedding. The VAE is in float32 unless its config says that
    it need not be (`force_upcast`), because the published one overflows in fp16. Raises OSError if a part
    cannot be read or the model, like the refiner, comes without one.
    """

    def __init__(self, parts: Folder) -> None:
        index = parts.index()
        if absent := [part for part in _TEXT_PARTS if not (index.get(part) or [None])[0]]:
            raise OSError(f"model_index.json names no {', '.join(absent)} (a refiner has not all)")
        self.zeros = bool(index.get("force_zeros_for_empty_prompt", True))
        self.text_encoders = [
            parts.text_encoder(CLIPTextModel, "text_encoder"),
            parts.text_encoder(CLIPTextModelWithProjection, "text_encoder_2"),
        ]
        self.tokenizers = [
            parts.tokenizer(name, encoder)
            for name, encoder in zip(("tokenizer", "tokenizer_2"), self.text_encoders, strict=True)
        ]
        self.unet = parts.model(UNet2DConditionModel, "unet")
        super().__init__(parts, self.unet, parts.vae(upcast=True))
        pixels = float(self.resolution)
        # Original size, crop's corner and target size.
        self.time_ids = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=self.device)

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        super().check_together(configs)
        encoders = (configs[name] for name in ("text_encoder", "text_encoder_2"))
        check_width(configs["unet"], sum(encoder.hidden_size for encoder in encoders))

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        return any(is_cut(tokenizer, text) for tokenizer in self.tokenizers)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. '' is zeros where the model asks for it (force_zeros_for_empty_prompt)."""
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = tokenize(tokenizer, texts).to(self.device)
            out = encoder(ids, output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
        condition = {"hidden": torch.cat(hidden, dim=-1), "pooled": out.text_embeds}
        if self.zeros:
            empty = torch.tensor([not text for text in texts], device=self.device)
            for value in condition.values():
                value[empty] = 0
        return condition

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        hidden, pooled = (condition[name].to(self.dtype) for name in ("hidden", "pooled"))
        added = {"text_embeds": pooled, "time_ids": self.time_ids.expand(len(noised), -1)}
        out = self.unet(
            noised.to(self.dtype), timesteps, hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return out.float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. DPM-Solver++ (Lu et al. 2022), diffusers' pipeline without watermark."""
        pipeline = StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoders[0],
            text_encoder_2=self.text_encoders[1],
            tokenizer=self.tokenizers[0],
            tokenizer_2=self.tokenizers[1],
            unet=self.unet,
            scheduler=self.sampler(),
            force_zeros_for_empty_prompt=self.zeros,
            add_watermarker=False,
        )
        return sample(pipeline, self, prompt, seeds, steps, guidance)
