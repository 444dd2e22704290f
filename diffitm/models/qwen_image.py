"""Qwen-Image in the diffusers layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from diffitm.models.denoiser import Condition
from diffitm.models.flow import PATCH, check_packed, pack, side_of, unpack
from diffitm.models.folder import Folder
from diffitm.models.language_flow import LanguageFlow
from diffitm.models.latent_diffusion import check_text_width
from diffitm.models.noise_schedule import FLOW_TIME

SKIPPED = 34  # tokens before a text, which the network is not given
LENGTH = 512  # tokens that it is given, of a text and what follows it in the template


class QwenImage(LanguageFlow):
    """A transformer over packed latents and the tokens of Qwen2.5-VL (Wu et al. 2025).

    Each text, '' too, stands in the pipeline's template. The VAE is one of videos, here of one picture, and
    each of its channels is shifted and scaled on its own. Raises OSError
    if a part cannot be read.
    """

    lengths = {"tokenizer": SKIPPED + LENGTH}  # noqa: RUF012
    layer = -1
    skipped = SKIPPED
    pipeline = QwenImagePipeline
    network_kind = QwenImageTransformer2DModel
    encoder_kind = Qwen2_5_VLForConditionalGeneration
    tokenizer_kind = Qwen2Tokenizer
    vae_kind = AutoencoderKLQwenImage

    def finish(self, parts: Folder) -> None:
        """See OneEncoder."""
        self._mean, self._deviation = (
            torch.tensor(values, device=self.device, dtype=torch.float32).view(-1, 1, 1)
            for values in (self.vae.config.latents_mean, self.vae.config.latents_std)
        )

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """See Denoiser."""
        return template().format(text)

    @classmethod
    def check_part(cls, name: str, config: Any) -> None:
        """See Denoiser."""
        if name == "vae":
            _check_channels(config)
        if name == "transformer" and config.guidance_embeds:
            raise OSError("its transformer takes a guidance, which is not supported")

    @classmethod
    def around_texts(cls) -> str:
        """See Denoiser."""
        return template()

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs["transformer"]
        check_packed(network, configs["vae"].z_dim)
        width = configs["text_encoder"].text_config.hidden_size
        check_text_width(width, network.joint_attention_dim)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """See LatentDiffusion."""
        return int(vae.z_dim), side_of(network), 2 ** len(vae.temperal_downsample)

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        video = pixels.to(self.device, self.vae.dtype)[:, :, None]
        found = self.vae.encode(video).latent_dist
        mean, deviation = (value[:, :, 0].float() for value in (found.mean, found.std))
        return (mean - self._mean) / self._deviation, deviation / self._deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Denoiser."""
        unscaled = latents.to(self.device) * self._deviation + self._mean
        video = self.vae.decode(unscaled[:, :, None].to(self.vae.dtype), return_dict=False)[0]
        return video[:, :, 0].float().clamp(-1, 1)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        side = noised.shape[-1]
        out = self.transformer(
            hidden_states=pack(noised.to(self.dtype)),
            timestep=timesteps / FLOW_TIME,
            encoder_hidden_states=condition["hidden"].to(self.dtype),
            encoder_hidden_states_mask=condition["mask"],
            img_shapes=[[(1, side // PATCH, side // PATCH)]] * len(noised),
            return_dict=False,
        )[0]
        return unpack(out, side).float()

    def asked(self, prompt: str, count: int, guidance: float) -> dict[str, Any]:
        """See LanguageFlow. Its guidance has another name, and needs a negative prompt."""
        return {"true_cfg_scale": guidance, "negative_prompt": [""] * count}

    def unpacked(self, latents: Tensor) -> Tensor:
        """See LanguageFlow."""
        return unpack(latents, self.latent_shape[-1])


@functools.cache
def template() -> str:
    """What the pipeline puts around a text: an order to describe a picture."""
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    return str(QwenImagePipeline(**dict.fromkeys(parts)).prompt_template_encode)


def _check_channels(config: Any) -> None:
    """Raises OSError for settings of the VAE that do not say each channel's mean and deviation."""
    for key in ("latents_mean", "latents_std"):
        values = config[key]
        if not isinstance(values, list | tuple) or len(values) != config.z_dim:
            raise OSError(
                f"vae/config.json gives {key} {str(values)[:60]}, not a number "
                f"for each of its {config.z_dim} channels"
            )
    if not all(value > 0 for value in config.latents_std):
        raise OSError(f"vae/config.json gives latents_std {config.latents_std}, not all above 0")
