"""The sides of a model that can be loaded alone: its text encoders, or its network and VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers import CLIPTextConfig, PreTrainedModel

Side = Literal["whole", "texts", "network"]


def is_loaded(part: str, side: Side) -> bool:
    """Whether a side has the weights of a part, a folder of diffusers' layout."""
    return side == "whole" or part.startswith("text_encoder") == (side == "texts")


def empty_part(kind: Any, settings: Mapping[str, Any]) -> Any:
    """A part of a class of diffusers or transformers by its settings (config.json), without memory for its
    weights."""
    with torch.device("meta"):
        if not issubclass(kind, PreTrainedModel):
            return kind.from_config(dict(settings))
        config = kind.config_class
        return kind(config.from_dict(of_text(settings) if config is CLIPTextConfig else settings))


def of_text(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A text encoder's settings, also where the config is that of a whole CLIP."""
    return dict(settings.get("text_config") or settings)
