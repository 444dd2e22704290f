"""Sana 1.0 and 1.5 in the diffusers layout."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizerFast

from diffitm.models.denoiser import Condition, rows_of, stack
from diffitm.models.flow import FlowDiffusion
from diffitm.models.latent_diffusion import (
    OneEncoder,
    check_network,
    check_scale,
    check_text_width,
    is_cut,
    lowered,
    sample,
    tokenize_masked,
)

LENGTH = 300  # tokens of a text, the first of all among them
MARKS = 2  # tokens that the instruction and a text are counted with twice


class Sana(OneEncoder, FlowDiffusion):
    """A linear transformer on latents of 32 pixels a side (Xie et al. 2025) that attends to Gemma-2's tokens.

    The condition is {"hidden": [B, L, D], "mask": [B, L]}. A text follows the pipeline's instruction to the
    language model, whose tokens are then left out but for the first; '' comes without it. Texts are in lower
    case and without space around them. The autoencoder has no posterior: a sample of it is its mean.
    Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer": LENGTH}  # noqa: RUF012
    patch = 1
    plain_text = staticmethod(lowered)
    network_kind = SanaTransformer2DModel
    encoder_kind = Gemma2Model
    tokenizer_kind = GemmaTokenizerFast
    vae_kind = AutoencoderDC

    @classmethod
    def check_part(cls, name: str, config: Any) -> None:
        """See Denoiser."""
        if name == "vae":
            check_scale(config.scaling_factor)
        if name == "transformer" and config.guidance_embeds:
            raise OSError("its transformer takes a guidance (Sana-Sprint), which is not supported")

    @classmethod
    def around_texts(cls) -> str:
        """See Denoiser."""
        return instruction()

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs["transformer"]
        check_network(network, configs["vae"].latent_channels)
        check_text_width(configs["text_encoder"].hidden_size, network.caption_channels)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """See LatentDiffusion."""
        factor = 2 ** (len(vae.encoder_block_out_channels) - 1)
        return int(network.in_channels), int(network.sample_size), factor

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        latents = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent.float()
        latents = latents * self.vae.config.scaling_factor
        return latents, torch.zeros_like(latents)

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        return is_cut(self.tokenizer, self.plain_text(text), LENGTH)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, as Sana does."""
        rows: dict[bool, list[Condition]] = {}
        for is_empty in {not text for text in texts}:
            some = [text for text in texts if (not text) is is_empty]
            rows[is_empty] = rows_of(self._encode(some, "" if is_empty else instruction()))
        return stack([rows[not text].pop(0) for text in texts])

    def _encode(self, texts: Sequence[str], before: str) -> Condition:
        skipped = len(self.tokenizer.encode(before)) if before else 0
        length = skipped + LENGTH - MARKS if before else LENGTH
        plain = [before + self.plain_text(text) for text in texts]
        ids, mask = tokenize_masked(self.tokenizer, plain, length, self.device)
        hidden = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        kept = [0, *range(skipped - 1 if before else 1, ids.shape[1])]
        return {"hidden": hidden[:, kept], "mask": mask[:, kept]}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        out = self.transformer(
            noised.to(self.dtype),
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            encoder_attention_mask=condition["mask"],
            timestep=timesteps * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return out.float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. The folder's sampler, diffusers' pipeline with its instruction."""
        pipeline = SanaPipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=self.vae,
            transformer=self.transformer, scheduler=self.sampler(),
        )  # fmt: skip
        return sample(
            pipeline, self, prompt, seeds, steps, guidance,
            clean_caption=False, use_resolution_binning=False, max_sequence_length=LENGTH,
        )  # fmt: skip


@functools.cache
def instruction() -> str:
    """What the pipeline puts before a text: an order to describe it in detail."""
    given = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"]
    return "\n".join(given.default)
