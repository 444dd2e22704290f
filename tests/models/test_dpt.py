"""DPT's adapter against its formulas, the maps that it reads, its file, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffitm.core.errors import InputError
from diffitm.models.dpt import DptAdapter, MapReader, load_adapter, positions, with_pooled
from diffitm.models.dpt_file import (
    LORA,
    NAME,
    AdapterShape,
    check_adapter,
    find_adapter,
    maps_of,
    save_adapter,
    shape_of,
)
from diffitm.models.folder import Folder
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import add_lora, lora_weights, save_lora
from diffitm.models.stable_diffusion import StableDiffusion
from tests import plain_dpt, tiny

SHAPE = AdapterShape("up1", 32, tiny.WIDTH)
MAPS = {"bottom0": 32, "bottom1": 64, "mid": 64, "up0": 64, "up1": 32}


def test_queries_equal_the_formulas() -> None:
    """Position, time, both layers and the head; each example is its own."""
    adapter = DptAdapter(AdapterShape("mid", 6, 12), seed=1).eval()
    maps, steps = torch.randn(2, 6, 2, 3), torch.tensor([3, 870])
    found = adapter(maps, steps)
    assert found.shape == (2, 10, 12)
    state = dict(adapter.named_parameters())
    for i in range(2):
        expected = plain_dpt.queries(state, maps[i], int(steps[i]))
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)
    texts = torch.randn(2, 12)
    scores = adapter.score(maps, steps, texts)
    for i in range(2):
        expected = plain_dpt.score(state, maps[i], int(steps[i]), texts[i])
        torch.testing.assert_close(scores[i], expected, rtol=1e-4, atol=1e-5)


def test_positions_are_detrs() -> None:
    found = positions(2, 3)
    for row in range(2):
        for column in range(3):
            expected = torch.tensor(plain_dpt.position(row, column, 2, 3))
            torch.testing.assert_close(found[3 * row + column], expected, rtol=1e-4, atol=1e-5)


def test_what_is_drawn_is_the_seeds() -> None:
    """And torch's own generator is where it was; the temperature begins at CLIP's."""
    before = torch.get_rng_state()
    one, same, other = (DptAdapter(SHAPE, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["queries"], other["queries"])
    assert float(one["logit_scale"].exp()) == pytest.approx(1 / 0.07)


@pytest.mark.parametrize("name", MAPS)
def test_maps(sd: StableDiffusion, name: str) -> None:
    """The same where the forward ends there, which runs nothing behind it; its hook is gone then."""
    assert maps_of(sd.unet.config) == MAPS
    noised, steps = torch.randn(2, *sd.latent_shape), torch.tensor([10, 700])
    condition = sd.encode_texts(["a red circle", "a blue square"])
    calls: list[int] = []
    handle = sd.unet.conv_out.register_forward_hook(lambda *given: calls.append(1))
    read = MapReader(sd, name)
    with torch.no_grad():
        short, nothing = read(noised, steps, condition)
        assert not calls and nothing is None
        whole, predicted = read(noised, steps, condition, whole=True)
        assert calls == [1]
        assert torch.equal(sd.predict(noised, steps, condition), predicted)
        for i in range(2):
            hidden = condition["hidden"][i : i + 1]
            expected, _ = plain_dpt.read(sd, name, noised[i], int(steps[i]), hidden)
            torch.testing.assert_close(short[i], expected, rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(short, whole) and short.shape[1] == MAPS[name]
    assert not sd.unet.get_submodule(plain_dpt.BLOCKS[name])._forward_hooks


def test_up_and_down_samplers_are_of_their_block(sd: StableDiffusion) -> None:
    noised, steps = torch.randn(1, *sd.latent_shape), torch.tensor([10])
    condition = sd.encode_texts(["a red circle"])
    sides = [MapReader(sd, name)(noised, steps, condition)[0].shape[2] for name in MAPS]
    assert sides == [4, 4, 4, 8, 8]


@pytest.mark.parametrize("old", [False, True])
def test_pooled_is_the_encoders_own(sd_folder: Path, old: bool) -> None:
    """Also where the config has the end token of older versions, and of a text that is cut."""
    model = StableDiffusion(Folder(str(sd_folder)))
    if old:
        model.text_encoder.config.eos_token_id = 2
        for part in (model.text_encoder, getattr(model.text_encoder, "text_model", None)):
            if hasattr(part, "eos_token_id"):
                part.eos_token_id = 2
    texts = ["a red circle", "", "a blue square to the left of a red circle " * 4]
    found = with_pooled(model, model.encode_texts, texts)["pooled"]
    for i, text in enumerate(texts):
        torch.testing.assert_close(found[i], plain_dpt.encoded(model, text)[1])


def write(folder: Path, shape: AdapterShape = SHAPE, seed: int = 3) -> DptAdapter:
    adapter = DptAdapter(shape, seed)
    save_adapter(adapter.state_dict(), shape, str(folder), tuned=False)
    return adapter


def test_file_there_and_back(sd: StableDiffusion, tmp_path: Path) -> None:
    """By its file or its folder, the same tensors; other content has another digest."""
    adapter = write(tmp_path)
    for name in (str(tmp_path), str(tmp_path / NAME)):
        found = find_adapter(name, "dpt")
        assert (found.shape, found.lora) == (SHAPE, None)
        state = load_adapter(found, sd, "dpt").state_dict()
        assert all(torch.equal(value, state[key]) for key, value in adapter.state_dict().items())
    write(tmp_path, seed=4)
    assert find_adapter(str(tmp_path), "dpt").digest != found.digest
    with pytest.raises(InputError, match="changed while the run was going on"):
        load_adapter(found, sd, "dpt")


def test_an_adapter_with_boxes(sd: StableDiffusion, tmp_path: Path) -> None:
    """It comes back as such; its matching is that of the same seed without them, and that of a hundred and
    ten queries in one sequence, as published."""
    shape = replace(SHAPE, grounding=True)
    adapter, plain = write(tmp_path, shape), DptAdapter(SHAPE, 3)
    found = find_adapter(str(tmp_path), "dpt")
    assert found.shape == shape
    loaded = load_adapter(found, sd, "dpt")
    maps, at, pooled = torch.randn(1, 32, 8, 8), torch.tensor([500]), torch.randn(1, tiny.WIDTH)
    score = loaded.score(maps, at, pooled)
    assert torch.equal(score, adapter.eval().score(maps, at, pooled))
    assert torch.equal(score, plain.eval().score(maps, at, pooled))
    state = loaded.state_dict()
    assert all(torch.equal(state[key], value) for key, value in plain.state_dict().items())
    expected = plain_dpt.score(dict(loaded.named_parameters()), maps[0], 500, pooled[0])
    torch.testing.assert_close(score[0], expected, rtol=1e-4, atol=1e-5)


def test_a_file_of_before_there_were_boxes(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / NAME
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    told = json.loads(header["__metadata__"]["dpt"])
    del told["grounding"]
    header["__metadata__"]["dpt"] = json.dumps(told)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert find_adapter(str(tmp_path), "dpt").shape == SHAPE


def test_a_tuned_adapter_brings_its_lora(sd_folder: Path, tmp_path: Path) -> None:
    """And nothing else's: one that is missing, or another, is refused."""
    model = StableDiffusion(Folder(str(sd_folder)))
    add_lora(model.unet, 2, 0)
    save_lora(lora_weights(model.unet), str(tmp_path), 2)
    save_adapter(DptAdapter(SHAPE).state_dict(), SHAPE, str(tmp_path), tuned=True)
    assert find_adapter(str(tmp_path), "dpt").lora == str(tmp_path / LORA)
    lora = (tmp_path / LORA).read_bytes()
    (tmp_path / LORA).write_bytes(lora + b" ")
    with pytest.raises(InputError, match="not the one that it was trained with"):
        find_adapter(str(tmp_path), "dpt")
    (tmp_path / LORA).unlink()
    with pytest.raises(InputError, match="was trained with a LoRA, which is not beside it"):
        find_adapter(str(tmp_path), "dpt")


def test_other_files_are_refused(sd: StableDiffusion, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*dpt_adapter\.safetensors"):
        find_adapter(str(tmp_path), "dpt")
    (tmp_path / NAME).write_text("no")
    with pytest.raises(InputError, match="no adapter of finetune"):
        find_adapter(str(tmp_path), "dpt")
    save_file({"unet.x": torch.zeros(2)}, tmp_path / NAME)  # a LoRA, say
    with pytest.raises(InputError, match="no adapter of finetune"):
        find_adapter(str(tmp_path), "dpt")
    save_adapter({"queries": torch.zeros(2)}, SHAPE, str(tmp_path), tuned=False)
    with pytest.raises(InputError, match="holds other tensors than an adapter's"):
        load_adapter(find_adapter(str(tmp_path), "dpt"), sd, "dpt")


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (AdapterShape("up3", 32, tiny.WIDTH), "is an adapter of up3: the maps of this U-Net are bottom0"),
        (AdapterShape("up1", 64, tiny.WIDTH), "of 64 channels and texts 32 wide; this model has 32 and 32"),
        (AdapterShape("up1", 32, 768), "of 32 channels and texts 768 wide; this model has 32 and 32"),
    ],
)  # fmt: skip
def test_adapters_of_other_models(
    sd: StableDiffusion, sd_folder: Path, tmp_path: Path, shape: AdapterShape, told: str
) -> None:
    """On the driver, from the settings alone, and where the model is loaded."""
    write(tmp_path, shape)
    found = find_adapter(str(tmp_path), "dpt")
    with pytest.raises(InputError, match=f"^dpt .*{told}"):
        check_adapter(found, resolve(str(sd_folder)), "dpt")
    with pytest.raises(InputError, match=told):
        load_adapter(found, sd, "dpt")


def test_other_families_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "adapter")
    found = find_adapter(str(tmp_path / "adapter"), "dpt")
    folders = {
        "StableDiffusionXLPipeline": tiny.write_sdxl(tmp_path / "xl"),
        "DiTPipeline": tiny.write_dit(tmp_path / "dit"),
    }
    for name, folder in folders.items():
        with pytest.raises(InputError, match=f"this is a {name}"):
            check_adapter(found, resolve(str(folder)), "dpt")
        with pytest.raises(InputError, match=r"and 2\.x, not of a "):
            load_adapter(found, load_denoiser(resolve(str(folder))), "dpt")


def test_a_unet_without_a_middle(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "sd")
    config = tmp_path / "sd" / "unet" / "config.json"
    settings: dict[str, Any] = json.loads(config.read_text()) | {"mid_block_type": None}
    assert "mid" not in maps_of(settings)
    with pytest.raises(InputError, match="feature_map mid: the maps of this U-Net are bottom0"):
        shape_of(settings, "mid", "feature_map")
