"""Z-Image and Z-Image-Turbo in the diffusers layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3Model

from diffitm.models.denoiser import Condition
from diffitm.models.flow import side_of
from diffitm.models.folder import Folder
from diffitm.models.language_flow import LanguageFlow, chat
from diffitm.models.latent_diffusion import check_latents, check_text_width
from diffitm.models.noise_schedule import FLOW_TIME

FILLED = 32  # the network fills texts up to a multiple of it


class ZImage(LanguageFlow):
    """A transformer over latents and Qwen3's tokens (Z-Image Team 2025), which predicts z0 - eps.

    Each text, '' too, is a message in the chat template of its tokenizer. The network is given lists: an
    item's own tokens alone, filled up to a multiple of 32 by itself. Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer": 512}  # noqa: RUF012
    pipeline = ZImagePipeline
    network_kind = ZImageTransformer2DModel
    encoder_kind = Qwen3Model
    tokenizer_kind = Qwen2Tokenizer

    def finish(self, parts: Folder) -> None:
        """See OneEncoder. A text's places begin with 1, and the image's is the one after the filled text."""
        self.places = (self.transformer.config.axes_lens[0] - 2) // FILLED * FILLED

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """See Denoiser."""
        return chat(tokenizer, [{"role": "user", "content": text}], enable_thinking=True)

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs["transformer"]
        check_latents(network, configs["vae"].latent_channels)
        check_text_width(configs["text_encoder"].hidden_size, network.cap_feat_dim)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """See LatentDiffusion."""
        factor = 2 ** (len(vae.block_out_channels) - 1)
        return int(network.in_channels), side_of(network), factor

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser. The network's time is 1 where there is no noise."""
        texts = [
            hidden[mask].to(self.dtype)
            for hidden, mask in zip(condition["hidden"], condition["mask"], strict=True)
        ]
        pictures = list(noised.to(self.dtype)[:, :, None].unbind())
        out = self.transformer(pictures, 1 - timesteps / FLOW_TIME, texts, return_dict=False)[0]
        return -torch.stack(list(out))[:, :, 0].float()
