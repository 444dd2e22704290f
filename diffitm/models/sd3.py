"""Stable Diffusion 3 and 3.5 in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5EncoderModel,
    T5TokenizerFast,
)

from diffitm.core.errors import InputError
from diffitm.models.denoiser import Condition
from diffitm.models.flow import FlowDiffusion
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import (
    check_text_width,
    is_cut,
    sample,
    tokenize,
)

_CLIPS = ("", "_2")  # how the names of their parts end


class StableDiffusion3(FlowDiffusion):
    """A transformer over image and text tokens (Esser et al. 2024), two CLIPs and a T5.

    The condition is {"hidden": [B, L, D], "pooled": [B, P]}: tokens of the CLIPs side by side, then those
    of the T5 with its padding, which the network was trained to see; and the CLIPs' projected embeddings.
    Without `text_encoder_3` zeros stand for the T5's tokens, as the pipeline has it. One CLIP alone, without
    a projection, gives its tokens as they are and what it pools; the network has to be of their width.
    Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer_3": 256}  # noqa: RUF012

    def __init__(self, parts: Folder) -> None:
        ends = _CLIPS if parts.has("text_encoder_2") else _CLIPS[:1]
        self.is_alone = len(ends) == 1
        kind = CLIPTextModel if self.is_alone else CLIPTextModelWithProjection
        self.text_encoders = [parts.text_encoder(kind, f"text_encoder{end}") for end in ends]
        self.tokenizers = [
            parts.tokenizer(f"tokenizer{end}", encoder)
            for end, encoder in zip(ends, self.text_encoders, strict=True)
        ]
        self.t5: Any = None
        if parts.has("text_encoder_3"):
            self.t5 = parts.text_encoder(T5EncoderModel, "text_encoder_3")
            self.t5_tokenizer = parts.tokenizer("tokenizer_3", self.t5, T5TokenizerFast)
        self.transformer = parts.model(SD3Transformer2DModel, "transformer")
        super().__init__(parts, self.transformer, parts.vae())

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        super().check_together(configs)
        network = configs["transformer"]
        if "text_encoder_2" not in configs:
            width = configs["text_encoder"].hidden_size
            check_text_width(width, network.joint_attention_dim)
            check_text_width(width, network.pooled_projection_dim)
            return
        pooled = sum(configs[f"text_encoder{end}"].projection_dim for end in _CLIPS)
        check_text_width(pooled, network.pooled_projection_dim)
        if "text_encoder_3" in configs:
            check_text_width(configs["text_encoder_3"].d_model, network.joint_attention_dim)

    def take_resolution(self, side: int) -> None:
        """See Denoiser. The network has places for so many patches and no more."""
        super().take_resolution(side)
        most = self.resolution // self.latent_shape[-1] * self.patch
        most *= self.transformer.config.pos_embed_max_size
        if side > most:
            raise InputError(f"{side}: this model has places for {most} pixels", "resolution")

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        if self.t5 is not None:
            return is_cut(self.t5_tokenizer, text, self.lengths["tokenizer_3"])
        return any(is_cut(tokenizer, text) for tokenizer in self.tokenizers)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, by each encoder at its own length."""
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            out = encoder(tokenize(tokenizer, texts).to(self.device), output_hidden_states=True)
            hidden.append(out.hidden_states[-2])
            pooled.append(out.pooler_output if self.is_alone else out.text_embeds)
        if self.is_alone:
            return {"hidden": hidden[0], "pooled": pooled[0]}
        short, width = torch.cat(hidden, -1), self.transformer.config.joint_attention_dim
        long = self._t5_tokens(texts, width)
        both = torch.cat([pad(short, (0, width - short.shape[-1])), long.to(short.dtype)], 1)
        return {"hidden": both, "pooled": torch.cat(pooled, -1)}

    def _t5_tokens(self, texts: Sequence[str], width: int) -> Tensor:
        length = self.lengths["tokenizer_3"]
        if self.t5 is None:
            return torch.zeros(len(texts), length, width, device=self.device)
        ids = tokenize(self.t5_tokenizer, texts, length).to(self.device)
        hidden: Tensor = self.t5(ids).last_hidden_state
        return hidden

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        out = self.transformer(
            hidden_states=noised.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            pooled_projections=condition["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return out.float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. Euler's steps with the folder's shift, diffusers' pipeline with texts as scored."""
        texts = ("text_encoder", "tokenizer")
        absent = dict.fromkeys(f"{part}{end}" for part in texts for end in ("", "_2", "_3"))
        pipeline = StableDiffusion3Pipeline(
            transformer=self.transformer, scheduler=self.sampler(), vae=self.vae, **absent
        )
        text, empty = (
            {k: v.expand(len(seeds), *v.shape[1:]) for k, v in self.encode_texts([one]).items()}
            for one in (prompt, "")
        )
        return sample(
            pipeline, self, prompt, seeds, steps, guidance,
            prompt_embeds=text["hidden"], pooled_prompt_embeds=text["pooled"],
            negative_prompt_embeds=empty["hidden"], negative_pooled_prompt_embeds=empty["pooled"],
        )  # fmt: skip
