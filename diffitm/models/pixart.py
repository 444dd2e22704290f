"""PixArt-alpha and PixArt-Sigma in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from diffitm.models.denoiser import Condition
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import (
    OneEncoder,
    check_text_width,
    is_cut,
    lowered,
    sample,
    tokenize_masked,
)


class PixArt(OneEncoder):
    """A transformer that attends to a T5's tokens (Chen et al. 2024), epsilon on DDPM's schedule.

    The condition is {"hidden": [B, L, D], "mask": [B, L]}. Texts are in lower case and without space around
    them, as the pipeline has them where it does not clean them further. Where the network takes the image's
    size (alpha at 1024 pixels), it is that of the model. Raises OSError if
    a part cannot be read.
    """

    lengths = {"tokenizer": 120}  # noqa: RUF012
    pipeline: ClassVar[Any] = PixArtAlphaPipeline
    plain_text = staticmethod(lowered)
    network_kind = PixArtTransformer2DModel
    encoder_kind = T5EncoderModel
    tokenizer_kind = T5TokenizerFast

    def finish(self, parts: Folder) -> None:
        """See OneEncoder."""
        side = float(self.resolution)
        self.size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.transformer.use_additional_conditions:
            given = {"resolution": [[side, side]], "aspect_ratio": [[1.0]]}
            self.size = {k: torch.tensor(v, device=self.device) for k, v in given.items()}

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        super().check_together(configs)
        check_text_width(configs["text_encoder"].d_model, configs["transformer"].caption_channels)

    def cuts(self, text: str) -> bool:
        """See Denoiser."""
        return is_cut(self.tokenizer, self.plain_text(text), self.lengths["tokenizer"])

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, as PixArt does."""
        plain, length = [self.plain_text(text) for text in texts], self.lengths["tokenizer"]
        ids, mask = tokenize_masked(self.tokenizer, plain, length, self.device)
        hidden = self.text_encoder(ids, attention_mask=mask).last_hidden_state
        return {"hidden": hidden, "mask": mask}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser. The learned variance, the output's other channels, is left out."""
        size = {
            k: v if v is None else v.to(self.dtype).expand(len(noised), -1)
            for k, v in self.size.items()
        }
        out = self.transformer(
            noised.to(self.dtype),
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            encoder_attention_mask=condition["mask"],
            timestep=timesteps,
            added_cond_kwargs=size,
            return_dict=False,
        )[0]
        return out[:, : self.latent_shape[0]].float()

    def generate(
        self, prompt: str, seeds: Sequence[int], steps: int, guidance: float
    ) -> list[Image.Image]:
        """See Denoiser. DPM-Solver++, diffusers' pipeline with texts as scored."""
        pipeline = self.pipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=self.vae,
            transformer=self.transformer, scheduler=self.sampler(),
        )  # fmt: skip
        return sample(
            pipeline, self, prompt, seeds, steps, guidance,
            clean_caption=False, use_resolution_binning=False,
            max_sequence_length=self.lengths["tokenizer"],
        )  # fmt: skip


class PixArtSigma(PixArt):
    """PixArt-Sigma, which reads longer texts."""

    lengths = {"tokenizer": 300}  # noqa: RUF012
    pipeline = PixArtSigmaPipeline
