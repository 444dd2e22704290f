"""FLUX.2 dev and klein in the diffusers layout."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from torch import Tensor
from transformers import (
    AutoTokenizer,
    Mistral3ForConditionalGeneration,
    Qwen2TokenizerFast,
    Qwen3ForCausalLM,
)

from diffitm.models.denoiser import Condition
from diffitm.models.flow import GUIDANCE, PATCH, side_of
from diffitm.models.folder import Folder
from diffitm.models.language_flow import LanguageFlow, chat
from diffitm.models.latent_diffusion import check_latents, check_text_width, tokenize_whole
from diffitm.models.noise_schedule import FLOW_TIME


class Flux2(LanguageFlow):
    """A transformer over cells of 2 x 2 latents and three layers of Mistral-3 (Black Forest Labs 2025).

    The condition is {"hidden": [B, L, 3 D]}, with the padding, which the network sees. A cell's values are
    channels, [B, 4 C, h / 2, w / 2], normalised by the VAE's batch norm. A network that takes a guidance
    (dev) is told 1. Raises OSError if a part cannot be read.
    """

    lengths = {"tokenizer": 512}  # noqa: RUF012
    patch = 1
    pipeline = Flux2Pipeline
    layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    network_kind, vae_kind = Flux2Transformer2DModel, AutoencoderKLFlux2
    encoder_kind: ClassVar[Any] = Mistral3ForConditionalGeneration
    tokenizer_kind: ClassVar[Any] = AutoTokenizer

    def finish(self, parts: Folder) -> None:
        """See OneEncoder."""
        self.guidance = GUIDANCE if self.transformer.config.guidance_embeds else None
        if parts.index().get("is_distilled"):  # a klein, whose pipeline then takes no guidance
            self.pipeline = functools.partial(self.pipeline, is_distilled=True)

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """See Denoiser. Without the mark of the beginning where the tokenizer sets it itself."""
        given = chat(tokenizer, format_input([text])[0], add_generation_prompt=False)
        is_set = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return given.removeprefix(tokenizer.bos_token) if is_set else given

    @classmethod
    def check_part(cls, name: str, config: Any) -> None:
        """See Denoiser."""
        if name == "text_encoder":
            count = config.get_text_config().num_hidden_layers
            if count < max(cls.layers):
                raise OSError(
                    f"its text encoder has {count} layers, the network is given those up to {max(cls.layers)}"
                )

    @classmethod
    def around_texts(cls) -> str:
        """See Denoiser."""
        return str(format_input([""])[0])

    @classmethod
    def check_together(cls, configs: Mapping[str, Any]) -> None:
        """See Denoiser."""
        network = configs["transformer"]
        check_latents(network, PATCH**2 * configs["vae"].latent_channels)
        width = configs["text_encoder"].get_text_config().hidden_size
        check_text_width(len(cls.layers) * width, network.joint_attention_dim)

    @staticmethod
    def geometry(network: Any, vae: Any) -> tuple[int, int, int]:
        """See LatentDiffusion."""
        factor = PATCH * 2 ** (len(vae.block_out_channels) - 1)
        return int(network.in_channels), side_of(network) // PATCH, factor

    @torch.inference_mode()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See Denoiser."""
        posterior = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        mean, deviation = (_cells(value.float()) for value in (posterior.mean, posterior.std))
        middle, width = self._norm
        return (mean - middle) / width, deviation / width

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """See Denoiser."""
        middle, width = self._norm
        raw = _from_cells(latents.to(self.device) * width + middle)
        pixels: Tensor = self.vae.decode(raw.to(self.vae.dtype), return_dict=False)[0]
        return pixels.float().clamp(-1, 1)

    @property
    def _norm(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation [4 C, 1, 1] that the VAE's batch norm keeps."""
        norm = self.vae.bn
        width = (norm.running_var.float() + self.vae.config.batch_norm_eps).sqrt()
        return norm.running_mean.float().view(-1, 1, 1), width.view(-1, 1, 1)

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. Longer texts are cut, as the pipeline does."""
        given = [self.templated(text, self.tokenizer) for text in texts]
        ids, mask = tokenize_whole(self.tokenizer, given, self.lengths["tokenizer"], self.device)
        states = self.hidden_states(ids, mask)
        return {"hidden": torch.cat([states[layer] for layer in self.layers], -1)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser."""
        hidden, guidance = condition["hidden"].to(self.dtype), None
        count, _, height, width = noised.shape
        if self.guidance is not None:
            guidance = torch.full((count,), self.guidance, device=self.device)
        out = self.transformer(
            hidden_states=noised.to(self.dtype).flatten(2).transpose(1, 2),
            timestep=timesteps / FLOW_TIME,
            guidance=guidance,
            encoder_hidden_states=hidden,
            txt_ids=self._places(count, 1, 1, hidden.shape[1]),
            img_ids=self._places(count, height, width, 1),
            return_dict=False,
        )[0]
        return Flux2.unpacked(self, out).float()

    def asked(self, prompt: str, count: int, guidance: float) -> dict[str, Any]:
        """See LanguageFlow. The text as scored: the pipeline would ask for its processor of pictures."""
        return {"prompt_embeds": self.encode_texts([prompt])["hidden"].expand(count, -1, -1)}

    def unpacked(self, latents: Tensor) -> Tensor:
        """See LanguageFlow."""
        return latents.transpose(1, 2).unflatten(2, self.latent_shape[1:])

    def _places(self, count: int, height: int, width: int, length: int) -> Tensor:
        """[B, tokens, 4]: (0, row, column, word) of each token."""
        axes = (torch.arange(size, device=self.device) for size in (1, height, width, length))
        return torch.cartesian_prod(*axes).expand(count, -1, -1)


class Flux2Klein(Flux2):
    """FLUX.2 klein, whose texts Qwen3 reads."""

    layers = (9, 18, 27)
    encoder_kind = Qwen3ForCausalLM
    tokenizer_kind = Qwen2TokenizerFast
    pipeline = Flux2KleinPipeline

    @classmethod
    def templated(cls, text: str, tokenizer: Any) -> str:
        """See Denoiser."""
        return chat(tokenizer, [{"role": "user", "content": text}], enable_thinking=False)

    @classmethod
    def around_texts(cls) -> str:
        """See Denoiser. Its template is the tokenizer's alone."""
        return ""

    def asked(self, prompt: str, count: int, guidance: float) -> dict[str, Any]:
        """See LanguageFlow."""
        return {}

    def unpacked(self, latents: Tensor) -> Tensor:
        """See LanguageFlow. This pipeline gives its VAE's own."""
        middle, width = self._norm
        return (_cells(latents.float()) - middle) / width


def _cells(latents: Tensor) -> Tensor:
    """[B, C, h, w] to [B, 4 C, h / 2, w / 2]."""
    b, c, h, w = latents.shape
    cells = latents.view(b, c, h // PATCH, PATCH, w // PATCH, PATCH).permute(0, 1, 3, 5, 2, 4)
    return cells.reshape(b, c * PATCH**2, h // PATCH, w // PATCH)


def _from_cells(cells: Tensor) -> Tensor:
    """What _cells was given."""
    b, c, h, w = cells.shape
    latents = cells.view(b, c // PATCH**2, PATCH, PATCH, h, w).permute(0, 1, 4, 2, 5, 3)
    return latents.reshape(b, c // PATCH**2, h * PATCH, w * PATCH)
