"""The embedded models built from their configs: a tiny Stable Diffusion, its tokenizer, a tiny CLIP."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffitm.shapes.language import vocabulary

PIXELS = 32
LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's form whose merges make each word of the grammar one token.

    Other words fall apart into letters, as with any CLIP tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    letters = _byte_letters()
    merges: list[tuple[str, str]] = []
    for word in vocabulary():
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            known = next((p for p in merges if p in itertools.pairwise(pieces)), None)
            pair = known or (pieces[0], pieces[1])
            if known is None:
                merges.append(pair)
            pieces = _merge(pieces, pair)
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += [first + second for first, second in merges]
    tokens = list(dict.fromkeys([*tokens, START, END]))
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": "!",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte) if byte in plain else chr(spare))
        spare += byte not in plain
    return letters


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=PIXELS,
        scaling_factor=1.0,
    )


def build_text_encoder(
    tokenizer: CLIPTokenizer, layers: int = 4, inner: int = 384
) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        block_out_channels=(48, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        layers_per_block=1,
        attention_head_dim=(3, 6),
        cross_attention_dim=96,
        norm_num_groups=8,
        use_linear_projection=True,
    )


def build_transformer() -> SD3Transformer2DModel:
    """Its blocks begin as the identity, and it predicts zeros (adaLN-Zero, Peebles and Xie 2023)."""
    transformer = SD3Transformer2DModel(
        sample_size=PIXELS // 4,
        patch_size=2,
        in_channels=4,
        num_layers=6,
        attention_head_dim=24,
        num_attention_heads=4,
        joint_attention_dim=96,
        caption_projection_dim=96,
        pooled_projection_dim=96,
        out_channels=4,
        pos_embed_max_size=PIXELS // 8,
        qk_norm="rms_norm",
    )
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for module in modulations:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)
    return transformer


def build_scheduler() -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
    )


def clip_config(tokenizer: CLIPTokenizer) -> dict[str, Any]:
    """open_clip's model config of the tiny CLIP."""
    return {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": PIXELS,
            "layers": 3,
            "width": 96,
            "head_width": 24,
            "patch_size": 4,
        },
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": len(tokenizer),
            "hf_tokenizer_name": "tokenizer",
            "width": 96,
            "heads": 4,
            "layers": 2,
        },
    }
