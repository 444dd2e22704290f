"""Stable Diffusion 1.x and 2.x in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from diffitm.models.denoiser import Condition
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import (
    LatentDiffusion,
    check_width,
    is_cut,
    sample,
    tokenize,
)

_OLD_END = 2


class StableDiffusion(LatentDiffusion):
    """VAE, text encoder and U-Net; epsilon or v-prediction, as the scheduler's config says.

    The scheduler gives the training schedule only. Raises OSError if a part cannot be read.
    """

    def __init__(self, parts: Folder) -> None:
        self.text_encoder = parts.text_encoder(CLIPTextModel, "text_encoder")
        self.tokenizer = parts.tokenizer("tokenizer", self.text_encoder)
        self.unet = parts.model(UNet2DConditionModel, "unet")
        super().__init__(parts, self.unet, parts.vae())

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        super().check_together(configs)
        check_width(configs["unet"], configs["text_encoder"].hidden_size)

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        return is_cut(self.tokenizer, text)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts than the encoder takes are cut, as Stable Diffusion does."""
        ids = tokenize(self.tokenizer, texts).to(self.device)
        return {"hidden": self.text_encoder(ids).last_hidden_state}

    def text_ends(self, texts: Sequence[str]) -> Tensor:
        """The place of each text's end token, int64 [B]: there "hidden" is the encoder's pooled output."""
        ids, end = tokenize(self.tokenizer, texts), self.text_encoder.config.eos_token_id
        # What older configs say; the encoder takes the token of the highest number then.
        return ids.argmax(1) if end == _OLD_END else (ids == end).int().argmax(1)

    def text_places(self, texts: Sequence[str]) -> Tensor:
        """Which characters of its text each token is of, int64 [B, L, 2], from and to (not included); 0 and 0
        of a token that is of none. Raises ValueError for a tokenizer that cannot tell."""
        if not self.tokenizer.is_fast:
            kind = type(self.tokenizer).__name__
            raise ValueError(f"a {kind} does not tell which characters its tokens are of")
        found: Tensor = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_offsets_mapping=True,
            return_tensors="pt",
        ).offset_mapping
        return found

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
            scheduler=self.sampler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        return sample(pipeline, self, prompt, seeds, steps, guidance)
