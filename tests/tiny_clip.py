"""Tiny open_clip models with random weights, built from configs, so that tests download nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from safetensors.torch import save_file
from timm.models import VisionTransformer, build_model_with_cfg, register_model

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@register_model
def vit_tiny_patch8_siglip_32(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """timm's form of SigLIP's image tower, for 32 pixels and 16 patches."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    made = {**sizes, "class_token": False, "global_pool": "map", **kwargs}
    return build_model_with_cfg(VisionTransformer, "vit_tiny_patch8_siglip_32", pretrained, **made)


def vit_config(
    quick_gelu: bool = False,
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 32,
    layers: int = 2,
    head_width: int = 16,
    embed_dim: int = 24,
    custom_text: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """open_clip's config of a ViT with a class token; `text` and `vision` add to or override it."""
    sizes = {"image_size": image_size, "patch_size": patch_size}
    made = {**sizes, "width": width, "layers": layers, "head_width": head_width}
    return {
        "embed_dim": embed_dim,
        "quick_gelu": quick_gelu,
        "custom_text": custom_text,
        "vision_cfg": {**made, **(vision or {})},
        "text_cfg": {**TEXT, **(text or {})},
    }


def siglip_config(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None
) -> dict[str, Any]:
    """open_clip's config of a SigLIP with timm's image tower (32 pixels, patches of 8, width 32)."""
    tower = {"image_size": 32, "timm_model_name": "vit_tiny_patch8_siglip_32"}
    pool = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}
    words = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    return {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {**tower, **pool, **(vision or {})},
        "text_cfg": {**TEXT, **words, "norm_kwargs": {"eps": 1e-6}, **(text or {})},
    }


def build(config: dict[str, Any], seed: int = 0, **preprocess: Any) -> Any:
    """The config's model in eval mode, as open_clip's factory leaves it: with its preprocessing."""
    kind = open_clip.CustomTextCLIP if config.get("custom_text") else open_clip.CLIP
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**{k: v for k, v in config.items() if k != "custom_text"})
        for weight in model.parameters():
            if weight.ndim == 1:  # biases and norms, which would start at 0 and 1
                torch.nn.init.normal_(weight, mean=weight.mean().item(), std=0.1)
    cfg = {**vars(PreprocessCfg(size=model.visual.image_size)), **preprocess}
    open_clip.model.set_model_preprocess_cfg(model, cfg)
    return model.eval()


def vit(quick_gelu: bool = False, image_size: int = 32, seed: int = 0, **more: Any) -> Any:
    """A CLIP with a class token; see vit_config. Texts by open_clip's default tokenizer."""
    return build(vit_config(quick_gelu, image_size, **more), seed)


def siglip(seed: int = 0, **more: Any) -> Any:
    """A SigLIP with timm's image tower; see siglip_config. Texts by open_clip's default tokenizer."""
    return build(siglip_config(**more), seed, **HALF)


def write(folder: Path, config: dict[str, Any], seed: int = 0, **preprocess: Any) -> Path:
    """Save the config's model as a folder that `--clip FOLDER` takes."""
    model = build(config, seed, **preprocess)
    folder.mkdir(parents=True, exist_ok=True)
    note = {"model_cfg": config, "preprocess_cfg": model.visual.preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(note))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder
