"""FLUX.1 dev and schnell in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel, T5TokenizerFast

from diffitm.models.denoiser import Condition
from diffitm.models.flow import (
    GUIDANCE,
    PATCH,
    FlowDiffusion,
    check_packed,
    pack,
    side_of,
    unpack,
)
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import (
    check_text_width,
    is_cut,
    sample,
    tokenize,
)
from diffitm.models.noise_schedule import FLOW_TIME

SCHNELL_LENGTH = 256  # tokens of a text that schnell was trained with


class Flux(FlowDiffusion):
    """A transformer over packed latents and T5 tokens (Black Forest Labs 2024).

    The condition is {"hidden": [B, L, D], "pooled": [B, P]}: the T5's tokens with their padding, which the
    network was trained to see, and CLIP's pooled embedding. A network that takes a guidance (dev) is told 1.
    Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer_2": 512}  # noqa: RUF012

    def __init__(self, parts: Folder) -> None:
        self.clip = parts.text_encoder(CLIPTextModel, "text_encoder")
        self.tokenizer = parts.tokenizer("tokenizer", self.clip)
        self.t5 = parts.text_encoder(T5EncoderModel, "text_encoder_2")
        self.text_encoders = [self.clip, self.t5]
        self.t5_tokenizer = parts.tokenizer("tokenizer_2", self.t5, T5TokenizerFast)
        self.transformer = parts.model(FluxTransformer2DModel, "transformer")
        super().__init__(parts, self.transformer, parts.vae())
        self.length = self.lengths_of(self.transformer.config)["tokenizer_2"]
        self.guidance = GUIDANCE if self.transformer.config.guidance_embeds else None

    @classmethod
    def lengths_of(cls, network: Mapping[str, Any]) -> Mapping[str, int]:
        """See Denoiser. A network without a guidance is schnell."""
        return cls.lengths if network.get("guidance_embeds") else {"tokenizer_2": SCHNELL_LENGTH}

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs["transformer"]
        check_packed(network, configs["vae"].latent_channels)
        check_text_width(configs["text_encoder_2"].d_model, network.joint_attention_dim)
        check_text_width(configs["text_encoder"].hidden_size, network.pooled_projection_dim)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """See LatentDiffusion."""
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return int(vae.latent_channels), side_of(network), factor

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        return is_cut(self.t5_tokenizer, text, self.length)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, by each encoder at its own length."""
        pooled = self.clip(tokenize(self.tokenizer, texts).to(self.device)).pooler_output
        ids = tokenize(self.t5_tokenizer, texts, self.length).to(self.device)
        return {"hidden": self.t5(ids).last_hidden_state, "pooled": pooled}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        hidden = condition["hidden"].to(self.dtype)
        side, guidance = noised.shape[-1], None
        if self.guidance is not None:
            guidance = torch.full((len(noised),), self.guidance, device=self.device)
        out = self.transformer(
            hidden_states=pack(noised.to(self.dtype)),
            timestep=timesteps / FLOW_TIME,
            guidance=guidance,
            pooled_projections=condition["pooled"].to(self.dtype),
            encoder_hidden_states=hidden,
            txt_ids=torch.zeros(hidden.shape[1], 3, device=self.device, dtype=self.dtype),
            img_ids=_places(side // PATCH).to(self.device, self.dtype),
            return_dict=False,
        )[0]
        return unpack(out, side).float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. Euler's steps, diffusers' pipeline; the guidance is what dev's network is
        told, schnell has none."""
        pipeline = FluxPipeline(
            scheduler=self.sampler(), vae=self.vae, transformer=self.transformer,
            text_encoder=self.clip, tokenizer=self.tokenizer,
            text_encoder_2=self.t5, tokenizer_2=self.t5_tokenizer,
        )  # fmt: skip
        return sample(
            pipeline, self, prompt, seeds, steps, guidance,
            max_sequence_length=self.length,
            unpacked=lambda tokens: unpack(tokens, self.latent_shape[-1]),
        )  # fmt: skip


def _places(side: int) -> Tensor:
    """[side * side, 3]: (0, row, column) of each packed token."""
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], -1).view(-1, 3)
