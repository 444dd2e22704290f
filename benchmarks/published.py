"""Published diffusion models by their parts, without weights: configs, and what a call of each takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

TOKENS, T5_TOKENS = 77, 256  # of a CLIP's text; of a T5's in diffusers' pipeline of SD 3


@dataclass(frozen=True)
class Part:
    """A part of a model: `item` is what it is called with, one of the fields of Counts; `known` is how many
    parameters the published weights have."""

    name: str
    item: str
    make: Callable[[], nn.Module]
    call: Callable[[Any], object]
    known: int | None = None


@dataclass(frozen=True)
class Model:
    """A published model's parts; `text` is how many numbers the condition of a text has."""

    parts: tuple[Part, ...]
    text: int


def unet(side: int, width: int, known: int, **config: Any) -> Part:
    """A U-Net on latents of this side, which attends to texts of this width; SDXL's is told more."""
    more = {"text_embeds": (1, 1280), "time_ids": (1, 6)} if "addition_embed_type" in config else {}

    def call(network: Any) -> object:
        latents, hidden = torch.zeros(1, 4, side, side), torch.zeros(1, TOKENS, width)
        added = {name: torch.zeros(shape) for name, shape in more.items()}
        return network(latents, torch.zeros(1), hidden, added_cond_kwargs=added or None)

    shared = {"sample_size": side, "cross_attention_dim": width, "use_linear_projection": True}
    return Part("U-Net", "forwards", partial(UNet2DConditionModel, **shared, **config), call, known)


def vae(pixels: int, known: int | None, **config: Any) -> Part:
    """A VAE, whose encoder alone is called."""
    make = partial(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )

    def call(network: Any) -> object:
        return network.encode(torch.zeros(1, 3, pixels, pixels))

    return Part("VAE, encode", "images", make, call, known)


def encoder(name: str, kind: type, config: Any, tokens: int, known: int) -> Part:
    """A text encoder of transformers."""

    def call(network: Any) -> object:
        return network(torch.zeros(1, tokens, dtype=torch.long))

    return Part(name, "texts", partial(kind, config), call, known)


def clip(name: str, width: int, layers: int, known: int, projected: bool = True) -> Part:
    """The text model of a CLIP with heads of 64."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        projection_dim=width,
    )
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return encoder(name, kind, config, TOKENS, known)


def t5(known: int) -> Part:
    """The encoder of T5 v1.1 XXL."""
    config = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
    )
    return encoder("T5-XXL", T5EncoderModel, config, T5_TOKENS, known)


def mmdit(known: int) -> Part:
    """SD 3-medium's transformer."""
    make = partial(
        SD3Transformer2DModel,
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=64,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )

    def call(network: Any) -> object:
        hidden, pooled = torch.zeros(1, TOKENS + T5_TOKENS, 4096), torch.zeros(1, 2048)
        return network(torch.zeros(1, 16, 128, 128), hidden, pooled, torch.zeros(1))

    return Part("MMDiT", "forwards", make, call, known)


# Written in the terms of diffusers and transformers, after the authors' configs: sd_2_1.yaml and
# sd_xl_base.yaml of Stability-AI/generative-models; diffusers' scripts/convert_sd3_to_diffusers.py; ViT-H-14
# (without its last layer, which SD 2 does not use) and ViT-bigG-14 of open_clip; CLIP ViT-L/14 and
# T5 v1.1 XXL from memory. `known` numbers are those that others' logs, code and tests on GitHub give of the
# published weights; a config that makes another number ends the run. None was found of SD 3's VAE.
MODELS = {
    "SD 2.1-base": Model(
        (
            unet(
                64,
                1024,
                865_910_724,
                block_out_channels=(320, 640, 1280, 1280),
                attention_head_dim=(5, 10, 20, 20),
            ),
            vae(512, 83_653_863, latent_channels=4),
            clip("OpenCLIP ViT-H", 1024, 23, 340_387_840, projected=False),
        ),
        TOKENS * 1024,
    ),
    "SDXL-base": Model(
        (
            unet(
                128,
                2048,
                2_567_463_684,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                attention_head_dim=(5, 10, 20),
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            vae(1024, 83_653_863, latent_channels=4),
            clip("CLIP ViT-L", 768, 12, 123_060_480, projected=False),
            clip("OpenCLIP ViT-bigG", 1280, 32, 694_659_840),
        ),
        TOKENS * 2048 + 1280,
    ),
    "SD 3-medium": Model(
        (
            mmdit(2_028_328_000),
            vae(1024, None, latent_channels=16, use_quant_conv=False, use_post_quant_conv=False),
            clip("CLIP ViT-L", 768, 12, 123_650_304),
            clip("OpenCLIP ViT-bigG", 1280, 32, 694_659_840),
            t5(4_762_310_656),
        ),
        (TOKENS + T5_TOKENS) * 4096 + 2048,
    ),
}


def count_flops(module: nn.Module, call: Callable[[Any], object]) -> int:
    """FLOPs of a call by torch's counter, which takes a multiply-add as 2."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), torch.device("meta"):
        call(module)
    return counter.get_total_flops()
