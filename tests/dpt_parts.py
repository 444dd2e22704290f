"""A tiny DPT for tests, with the items and latents that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffitm.models.dpt import DptAdapter
from diffitm.models.dpt_file import AdapterShape
from diffitm.models.folder import Folder
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.training.dpt.expressions import Expression
from diffitm.training.dpt.step import Dpt
from diffitm.training.lora.step import Posterior
from diffitm.training.sampler import Item, seed_of
from tests import tiny

SHAPE = (4, 8, 8)
CAPTIONS = ["a red circle", "a blue square", "a green cross"]
SAID = [
    Expression(
        "0", "a red circle and a blue square", ((0.3, 0.4, 0.2, 0.3), (0.7, 0.6, 0.3, 0.2)),
        (((0, 12),), ((17, 30),)),
    ),
    Expression("1", "a green cross to the left", ((0.2, 0.5, 0.2, 0.2),), (((0, 13),),)),
]  # fmt: skip


def items() -> list[Item]:
    return [
        Item(
            i, f"{i}", CAPTIONS[i], f"{i}-", CAPTIONS[(i + 1) % 3], seed_of("t", i),
            random_image=f"{i}+", random_caption=CAPTIONS[(i + 2) % 3],
        )
        for i in range(2)
    ]  # fmt: skip


def posteriors(count: int = 2) -> list[Posterior]:
    """Of the own, the hard and the random images."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randn(count, *SHAPE, generator=generator) for _ in range(6)]
    return [Posterior(draw[i], 0.1 * draw[i + 3].abs()) for i in range(3)]


def without_dropout(adapter: DptAdapter) -> DptAdapter:
    for module in adapter.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    return adapter


def dpt(
    folder: Path, name: str = "up1", rank: int | None = None, boxes: bool = False, **options: Any
) -> Dpt:
    """On a tiny model; a LoRA's B starts at zero, where half of the gradients vanish."""
    channels = {"bottom0": 32, "mid": 64, "up0": 64, "up1": 32}[name]
    adapter = without_dropout(DptAdapter(AdapterShape(name, channels, tiny.WIDTH, boxes), 5))
    made = Dpt(StableDiffusion(Folder(str(folder))), adapter, rank, **options)
    for key, parameter in made.unet.named_parameters():
        if "lora_" in key:
            generator = torch.Generator().manual_seed(3)
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made
