"""Sides of a model that are loaded alone, against the whole one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffitm.core.errors import InputError
from diffitm.models.denoiser import Condition, rows_of, stack
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import text_encoders
from diffitm.models.model_check import check_loadable
from tests import families, tiny

TEXTS = ["a cup", "a small red bird sits on the branch of a tree beside two other birds" * 9, ""]
# One of each constructor, and of each kind of encoder that is built by its settings.
NAMES = (
    "SD3",
    "SD3 without T5",
    "PixArt-alpha",
    "FLUX.1-dev",
    "Qwen-Image",
    "Lumina2",
    "FLUX.2-dev",
)
WRITERS: dict[str, Any] = {
    "SD": tiny.write_sd,
    "SDXL": tiny.write_sdxl,
    "SD3 of one CLIP": families.write_sd3_of_one_clip,
    **{name: families.WRITERS[name] for name in NAMES},
}


def same(one: Condition, other: Condition) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def devices(module: Any) -> set[str]:
    return {weight.device.type for weight in module.parameters()}


@pytest.mark.parametrize("name", WRITERS)
def test_a_side_does_what_the_whole_does(name: str, tmp_path: Path) -> None:
    """Bit for bit, without memory for the other's weights; what is cut is known on both sides."""
    source = resolve(str(WRITERS[name](tmp_path / "model")))
    whole: Any = load_denoiser(source)
    texts: Any = load_denoiser(source, side="texts")
    network: Any = load_denoiser(source, side="network")
    assert devices(texts.network) == devices(texts.vae) == {"meta"}
    assert devices(network.network) == devices(network.vae) == {"cpu"}
    for encoder in text_encoders(network):
        assert devices(encoder) == {"meta"}
    assert {device for encoder in text_encoders(texts) for device in devices(encoder)} == {"cpu"}
    condition = whole.encode_texts(TEXTS)
    assert same(texts.encode_texts(TEXTS), condition)
    for side in (texts, network):
        assert [side.cuts(text) for text in TEXTS] == [False, True, False]
    pixels = torch.linspace(-1, 1, 3 * network.resolution**2).view(1, 3, *[network.resolution] * 2)
    latents = whole.encode_images(pixels)
    assert torch.equal(network.encode_images(pixels), latents)
    noised, at = latents.expand(3, -1, -1, -1), torch.tensor([20, 300, 900])
    given = stack(rows_of(condition))
    with torch.inference_mode():
        assert torch.equal(network.predict(noised, at, given), whole.predict(noised, at, given))


def test_the_memory_of_a_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is what is asked of a GPU that is to have it alone."""
    source = check_loadable(resolve(str(families.write_sd3(tmp_path / "sd3"))))
    whole: Any = load_denoiser(source)
    encoders = [*whole.text_encoders, whole.t5]
    counts = [sum(p.numel() for p in part.parameters()) for part in encoders]
    others = sum(p.numel() for part in (whole.transformer, whole.vae) for p in part.parameters())
    assert (source.memory("bf16", "texts"), source.memory("bf16", "network")) == (
        2 * sum(counts), 2 * others,
    )  # fmt: skip
    upcast = replace(source, upcast=True)
    assert upcast.memory("bf16", "texts") == source.memory("bf16", "texts")
    # One byte too few for the text encoders, none for the network, far too few for the whole.
    room = {"whole": 2 * others, "texts": 2 * sum(counts) - 1, "network": 2 * others}
    told = {"whole": "its weights are", "texts": "the weights of its text encoders are"}
    for side, free in room.items():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, 80 * 10**9))
        with pytest.raises(InputError) as found:  # there is no GPU here
            load_denoiser(source, "bf16", "cuda", side=side)  # type: ignore[arg-type]
        assert ("are free" in found.value.message) == (side in told)
        assert told.get(side, "") in found.value.message


def test_a_model_without_text_encoders(tmp_path: Path) -> None:
    assert not resolve(str(tiny.write_dit(tmp_path / "dit"))).has_text_encoders
    assert resolve("shapes").has_text_encoders
