"""The written image tower inside transformers' LLaVA, as docs say how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionModel,
)

from diffitm.models.clip import ClipSource
from diffitm.models.clip_export import write_transformers
from tests import tiny_clip

IMAGE, PATCHES = 99, 16
OPENAI = ClipSource("tiny", "ViT-B-32", "file.pt", "")


def exported(folder: Path, model: Any) -> str:
    assert write_transformers(model, OPENAI, str(folder)) is None
    return str(folder)


def llava(tower: Any, **settings: Any) -> LlavaForConditionalGeneration:
    """A LLaVA with a random tower of the same sizes."""
    text = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlavaConfig(
            vision_config=tower.config, text_config=text, image_token_id=IMAGE, **settings
        )
        return LlavaForConditionalGeneration(config).eval()


def put(model: LlavaForConditionalGeneration, tower: Any) -> None:
    """What the recipe does."""
    model.model.vision_tower = tower
    model.config.vision_config = tower.config


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    tokens = torch.tensor([[1, *[IMAGE] * PATCHES, 5, 6]])
    return model(input_ids=tokens, pixel_values=pixels).logits


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_llava_sees_the_exported_tower(tmp_path: Path, pixels: Tensor) -> None:
    """It is fed the layer before the last, patches only, of the model that was exported."""
    clip = tiny_clip.vit(quick_gelu=True, layers=3)
    tower = CLIPVisionModel.from_pretrained(exported(tmp_path / "clip", clip))
    model = llava(tower)
    before = logits(model, pixels)
    put(model, tower)
    assert (logits(model, pixels) - before).abs().max() > 1e-3
    layers = clip.visual.forward_intermediates(pixels, output_fmt="NLC")["image_intermediates"]
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert model.config.vision_feature_layer == -2
    torch.testing.assert_close(hidden[-2][:, 1:], layers[-2], atol=1e-5, rtol=0)
    fed = model.model.multi_modal_projector(layers[-2])
    taken = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(taken, fed, atol=1e-5, rtol=0)


@torch.no_grad()
def test_two_towers_give_two_answers(tmp_path: Path, pixels: Tensor) -> None:
    towers = [
        CLIPVisionModel.from_pretrained(exported(tmp_path / str(seed), tiny_clip.vit(seed=seed)))
        for seed in (0, 1)
    ]
    model = llava(towers[0])
    found = []
    for tower in (*towers, towers[0]):
        put(model, tower)
        found.append(logits(model, pixels))
    assert (found[0] - found[1]).abs().max() > 1e-3
    assert torch.equal(found[0], found[2])


def test_round_trip(tmp_path: Path, pixels: Tensor) -> None:
    """LLaVA saved with the tower loads by itself, without the folder that the tower came from."""
    folder = exported(tmp_path / "clip", tiny_clip.vit(quick_gelu=True))
    tower = CLIPVisionModel.from_pretrained(folder)
    model = llava(tower)
    put(model, tower)
    model.save_pretrained(tmp_path / "llava")
    found, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "llava", output_loading_info=True
    )
    assert not any(report.values())
    assert found.config.vision_config.hidden_act == "quick_gelu"
    torch.testing.assert_close(
        logits(found.eval(), pixels), logits(model, pixels), atol=1e-6, rtol=0
    )


@torch.no_grad()
def test_siglip_tower(tmp_path: Path, pixels: Tensor) -> None:
    """SigLIP has no class token to leave out, hence 'full'."""
    clip = tiny_clip.siglip()
    tower = SiglipVisionModel.from_pretrained(exported(tmp_path / "clip", clip))
    model = llava(tower, vision_feature_select_strategy="full")
    before = logits(model, pixels)
    put(model, tower)
    assert (logits(model, pixels) - before).abs().max() > 1e-3
    blocks = clip.visual.trunk.forward_intermediates(pixels, output_fmt="NLC")[1]
    taken = torch.stack(list(model.get_image_features(pixels).pooler_output))
    fed = model.model.multi_modal_projector(blocks[-2])
    torch.testing.assert_close(taken, fed, atol=1e-5, rtol=0)
