"""The dense visual tokens of a CLIP, through open_clip's own interface."""

from __future__ import annotations

from typing import Any

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from diffitm.core.errors import InputError


def find_tower(model: nn.Module, name: str) -> nn.Module:
    """The image tower of an open_clip model.

    Raises InputError, naming the model as `name`, for a kind whose tokens cannot be had.
    """
    tower: Any = model.visual
    if isinstance(tower, VisionTransformer):
        if tower.attn_pool is None and tower.pool_type == "tok" and not tower.final_ln_after_pool:
            return tower
    elif isinstance(tower, TimmModel) and hasattr(tower.trunk, "num_prefix_tokens"):
        return tower
    raise InputError(
        f"{name!r}: has no dense tokens here; a ViT with a class token (OpenAI, MetaCLIP, DFN)"
        " or one of timm's (SigLIP) has",
        "clip",
    )


def patch_grid(tower: Any) -> tuple[int, int]:
    """Patches down and across."""
    part = tower if isinstance(tower, VisionTransformer) else tower.trunk.patch_embed
    rows, columns = part.grid_size
    return int(rows), int(columns)


def image_side(tower: Any) -> int:
    """Side in pixels of the square image that the tower takes. Raises InputError for another shape."""
    sides = tower.image_size
    sides = tuple(sides) if isinstance(sides, tuple | list) else (sides,)
    if len(set(sides)) != 1:
        raise InputError(
            f": takes images of {' x '.join(map(str, sides))} pixels, not squares", "clip"
        )
    return int(sides[0])


def visual_tokens(tower: Any, pixels: Tensor) -> Tensor:
    """Tokens [B, 1 + P, W] in the joint space of preprocessed pixels [B, 3, H, W].

    The first is the tower's own embedding of the image (class token or attention pool), then come
    the patches, row by row, after the final norm and the same projection.
    """
    if isinstance(tower, VisionTransformer):
        return project(_last_tokens(tower, pixels), tower.ln_post, tower.proj)
    features = tower.trunk.forward_features(pixels)
    pooled = tower.head(tower.trunk.forward_head(features))
    patches = tower.head(tower.trunk.head(tower.trunk.fc_norm(_patches(tower, features))))
    return join_tokens(pooled, patches)


def patch_features(tower: Any, pixels: Tensor) -> Tensor:
    """Patches [B, h, w, C] after the final norm, before the projection."""
    if isinstance(tower, VisionTransformer):
        patches = tower.ln_post(_last_tokens(tower, pixels)[:, 1:])
    else:
        patches = _patches(tower, tower.trunk.forward_features(pixels))
    return patches.unflatten(1, patch_grid(tower))


def project(tokens: Tensor, norm: nn.Module, projection: Tensor | None) -> Tensor:
    """Tokens [B, N, C] of the last layer, each normed and projected to the joint space [B, N, W]."""
    normed = norm(tokens)
    return normed if projection is None else normed @ projection


def join_tokens(pooled: Tensor, patches: Tensor) -> Tensor:
    """The pooled token [B, W] before the patches [B, P, W]."""
    return torch.cat([pooled[:, None], patches], dim=1)


def _last_tokens(tower: VisionTransformer, pixels: Tensor) -> Tensor:
    found = tower.forward_intermediates(
        pixels, indices=1, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    (prefix,), (patches,) = found["image_intermediates_prefix"], found["image_intermediates"]
    return torch.cat([prefix, patches], dim=1)


def _patches(tower: Any, features: Tensor) -> Tensor:
    return features[:, tower.trunk.num_prefix_tokens :]
