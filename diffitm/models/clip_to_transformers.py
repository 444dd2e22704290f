"""An open_clip model as transformers' CLIPModel or SiglipModel."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer
from timm.layers import GELUTanh
from timm.models import VisionTransformer as TimmTransformer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, SiglipConfig, SiglipModel

from diffitm.models.clip_tokens import image_side

# Names of weights in open_clip and timm, and what transformers calls them.
_OPEN_CLIP = {
    r"^transformer\.resblocks\.": "encoder.layers.",
    r"\.ln_(\d)\.": r".layer_norm\1.",
    r"\.attn\.": ".self_attn.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"^conv1\.": "embeddings.patch_embedding.",
    r"^class_embedding$": "embeddings.class_embedding",
    r"^positional_embedding$": "embeddings.position_embedding.weight",
    r"^token_embedding\.": "embeddings.token_embedding.",
    r"^ln_pre\.": "pre_layrnorm.",
    r"^ln_post\.": "post_layernorm.",
    r"^ln_final\.": "final_layer_norm.",
    r"^text_projection\.": "head.",
}
_TIMM = {
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.in_proj_",
    r"\.attn\.proj\.": ".self_attn.out_proj.",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^pos_embed$": "embeddings.position_embedding.weight",
    r"^norm\.": "post_layernorm.",
    r"^attn_pool\.latent$": "head.probe",
    r"^attn_pool\.in_proj_": "head.attention.in_proj_",
    r"^attn_pool\.proj\.": "head.attention.out_proj.",
    r"^attn_pool\.norm\.": "head.layernorm.",
    r"^attn_pool\.mlp\.": "head.mlp.",
}


class NoFormError(Exception):
    """Why transformers has no form for a model."""


class _Tower(NamedTuple):
    """Settings and weights of a tower in transformers' names, less those of its projection."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    projection: Tensor | None


def convert(model: Any) -> Any:
    """The model in transformers' form; `model` is float32, on the CPU and in eval mode.

    Raises NoFormError where there is none or its embeddings differ by more than 1e-4.
    """
    made = _siglip(model) if isinstance(model.visual, TimmModel) else _clip(model)
    _check_agreement(model, made)
    return made


def make_processor(model: Any) -> Any:
    """transformers' preprocessing for an open_clip model. Raises NoFormError."""
    used, side = model.visual.preprocess_cfg, image_side(model.visual)
    if used["resize_mode"] == "longest":
        raise NoFormError("no image processor for the resize mode 'longest'")
    square = {"height": side, "width": side}
    squash = used["resize_mode"] == "squash"
    return CLIPImageProcessor(
        size=square if squash else {"shortest_edge": side},
        crop_size=square,
        do_center_crop=not squash,
        resample=2 if used["interpolation"] == "bilinear" else 3,
        image_mean=list(used["mean"]),
        image_std=list(used["std"]),
    )


def _clip(model: Any) -> Any:
    vision, text = _vision(model.visual), _text(model)
    if vision.projection is None or text.projection is None:
        raise NoFormError("a projection is missing or has a bias")
    width = {"projection_dim": vision.projection.shape[1]}
    words = {**text.config, **width, "bos_token_id": None, "eos_token_id": _end_token(model)}
    made = CLIPModel(
        CLIPConfig(text_config=words, vision_config=vision.config | width, **width),
    )
    joint = {
        "visual_projection.weight": vision.projection.T,
        "text_projection.weight": text.projection.T,
        "logit_scale": model.logit_scale.reshape(()),
    }
    return _fill(made, vision, text, joint)


def _siglip(model: Any) -> Any:
    vision, text = _timm_vision(model.visual), _text(model)
    made = SiglipModel(SiglipConfig(text_config=text.config, vision_config=vision.config))
    bias = torch.zeros(1) if model.logit_bias is None else model.logit_bias.reshape(1)
    joint = {"logit_scale": model.logit_scale.reshape(1), "logit_bias": bias}
    return _fill(made, vision, text, joint)


def _end_token(model: Any) -> int:
    """The end token by which CLIPTextModel pools as open_clip does; 2 means the largest token."""
    plain = isinstance(model, open_clip.CLIP)
    pool = model.text_pool_type if plain else model.text.pool_type
    end = int(model.text_eos_id if plain else model.text.eos_id)
    if pool == "argmax":
        return 2
    if pool != "eos" or end == 2:
        raise NoFormError(
            f"the text tower pools by {pool!r} (end token {end}), CLIPTextModel does not"
        )
    return end


def _vision(tower: Any) -> _Tower:
    if not isinstance(tower, VisionTransformer) or tower.pool_type != "tok":
        raise NoFormError(
            f"the image tower ({type(tower).__name__}) is no ViT that pools by its class token"
        )
    weights = _renamed(tower.state_dict(), _OPEN_CLIP)
    block = tower.transformer.resblocks[0]
    config = _sizes(tower.transformer.resblocks, block.ln_1, block.mlp.c_fc, block.mlp.gelu)
    config |= {"image_size": image_side(tower), "patch_size": tower.patch_size[0]}
    return _Tower(config, weights, weights.pop("proj", None))


def _timm_vision(tower: Any) -> _Tower:
    trunk = tower.trunk
    if not isinstance(trunk, TimmTransformer) or trunk.global_pool != "map" or len(tower.head):
        raise NoFormError(f"the image tower (timm's {type(trunk).__name__}) is not SigLIP's")
    weights = trunk.state_dict()
    weights["pos_embed"] = weights["pos_embed"][0]
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"attn_pool.{part}.{kind}") for part in ("q", "kv")]
        weights[f"attn_pool.in_proj_{kind}"] = torch.cat(parts)
    block: Any = trunk.blocks[0]
    config = _sizes(trunk.blocks, block.norm1, block.mlp.fc1, block.mlp.act)
    config |= {"image_size": image_side(tower), "patch_size": trunk.patch_embed.patch_size[0]}
    return _Tower(config, _renamed(weights, _TIMM), None)


def _text(model: Any) -> _Tower:
    """The text tower, which open_clip.CLIP holds as parts of its own."""
    part = model if isinstance(model, open_clip.CLIP) else model.text
    if not isinstance(part, open_clip.CLIP | TextTransformer):
        raise NoFormError(f"the text tower is a {type(part).__name__}")
    own = ("visual.", "logit_")
    state = {key: value for key, value in part.state_dict().items() if not key.startswith(own)}
    weights = _renamed(state, _OPEN_CLIP)
    block = part.transformer.resblocks[0]
    config = _sizes(part.transformer.resblocks, block.ln_1, block.mlp.c_fc, block.mlp.gelu)
    config |= {"vocab_size": model.vocab_size, "max_position_embeddings": model.context_length}
    if "head.weight" in weights:
        config["projection_size"] = len(weights["head.weight"])
    return _Tower(config, weights, weights.pop("text_projection", None))


def _sizes(blocks: Any, norm: Any, hidden: Any, activation: nn.Module) -> dict[str, Any]:
    tanh = isinstance(activation, GELUTanh) or getattr(activation, "approximate", "") == "tanh"
    quick = isinstance(activation, QuickGELU)
    return {
        "hidden_size": hidden.in_features,
        "intermediate_size": hidden.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": "quick_gelu" if quick else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": norm.eps,
    }


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Weights in transformers' names, query, key and value apart."""
    out = {}
    for key, value in weights.items():
        for old, new in names.items():
            key = re.sub(old, new, key)
        before, mark, kind = key.partition("self_attn.in_proj_")
        if mark:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                out[f"{before}self_attn.{part}_proj.{kind}"] = piece
        else:
            out[key] = value
    return out


def _fill(made: Any, vision: _Tower, text: _Tower, joint: dict[str, Tensor]) -> Any:
    state = {f"vision_model.{key}": value for key, value in vision.weights.items()}
    state |= {f"text_model.{key}": value for key, value in text.weights.items()}
    try:
        made.load_state_dict(state | joint)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise NoFormError(f"the weights do not fit: {told[:300]}") from error
    return made.eval()


@torch.inference_mode()
def _check_agreement(model: Any, made: Any) -> None:
    """What names and shapes do not show: pooling, masks, activations."""
    generator = torch.Generator().manual_seed(0)
    side = image_side(model.visual)
    pixels = torch.randn(2, 3, side, side, generator=generator)
    tokens = torch.randint(model.vocab_size, (2, model.context_length), generator=generator)
    found = made(input_ids=tokens, pixel_values=pixels)
    image, text = model.encode_image(pixels, True), model.encode_text(tokens, True)
    for name, ours, theirs in (
        ("image", image, found.image_embeds),
        ("text", text, found.text_embeds),
    ):
        if (ours - theirs).abs().max() > 1e-4:
            raise NoFormError(f"the {name} tower gives other embeddings in transformers")
