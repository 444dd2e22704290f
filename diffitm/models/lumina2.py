"""Lumina-Image 2.0 in the diffusers layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from transformers import Gemma2Model, GemmaTokenizerFast

from diffitm.models.denoiser import Condition
from diffitm.models.folder import Folder
from diffitm.models.language_flow import LanguageFlow
from diffitm.models.latent_diffusion import check_text_width
from diffitm.models.noise_schedule import FLOW_TIME


class Lumina2(LanguageFlow):
    """A transformer over latents and Gemma-2's tokens (Qin et al. 2025), which predicts z0 - eps.

    A text follows the pipeline's system prompt, which counts among its tokens; '' comes without it.
    Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer": 256}  # noqa: RUF012
    pipeline = Lumina2Pipeline
    network_kind = Lumina2Transformer2DModel
    encoder_kind = Gemma2Model
    tokenizer_kind = GemmaTokenizerFast

    def finish(self, parts: Folder) -> None:
        """See OneEncoder. The image has the place after the text's last token."""
        self.places = self.transformer.config.axes_lens[0] - 1

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """See Denoiser."""
        return f"{system_prompt()} <Prompt Start> {text}" if text else ""

    @classmethod
    def around_texts(cls) -> str:
        """See Denoiser."""
        return system_prompt()

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        super().check_together(configs)
        check_text_width(configs["text_encoder"].hidden_size, configs["transformer"].cap_feat_dim)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser. The network's time is 1 where there is no noise."""
        out = self.transformer(
            hidden_states=noised.to(self.dtype),
            timestep=1 - timesteps / FLOW_TIME,
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return -out.float()


@functools.cache
def system_prompt() -> str:
    """What the pipeline puts before a text."""
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    return str(Lumina2Pipeline(**dict.fromkeys(parts)).system_prompt)
