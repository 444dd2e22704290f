"""The weights of a DPT run: as a checkpoint holds them, and as files that others load."""

from __future__ import annotations

from torch import Tensor

from diffitm.models.dpt_file import AdapterShape, save_adapter
from diffitm.models.lora import save_lora

ADAPTER = "adapter."  # before its tensors' names in a checkpoint


def divided(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's tensors and the LoRA's of a checkpoint."""
    adapter = {k.removeprefix(ADAPTER): v for k, v in weights.items() if k.startswith(ADAPTER)}
    return adapter, {k: v for k, v in weights.items() if not k.startswith(ADAPTER)}


def save_weights(weights: dict[str, Tensor], folder: str, map: str, rank: int) -> None:
    """A checkpoint's as files: the adapter of a map and, where there is one, its LoRA, which stock diffusers
    load."""
    adapter, lora = divided(weights)
    if lora:
        save_lora(lora, folder, rank)
    channels, width = adapter["input_proj.weight"].shape[1], adapter["head.2.weight"].shape[0]
    grounding = any(key.startswith("grounding.") for key in adapter)
    shape = AdapterShape(map, channels, width, grounding)
    save_adapter(adapter, shape, folder, bool(lora))
