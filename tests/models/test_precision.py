"""What keeps half precision finite and fast: fused attention in float32 inside, and where weights lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffitm.models.folder import layout
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import add_lora, lora_weights, save_lora
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import pair_errors
from tests import tiny

WRITERS = {"sd": tiny.write_sd, "sdxl": tiny.write_sdxl, "dit": tiny.write_dit}
TEXTS = ["a cat", ""]  # a class of the DiT


def inputs(model: Any, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Any]:
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(len(TEXTS), *model.latent_shape, generator=generator)
    return noised, torch.tensor([100, 900]), model.encode_texts(TEXTS)


def fused(patch: pytest.MonkeyPatch) -> list[int]:
    """A line for each call of torch's fused attention from now on."""
    real, calls = nn.functional.scaled_dot_product_attention, list[int]()

    def count(*given: Any, **more: Any) -> Tensor:
        calls.append(1)
        return real(*given, **more)

    patch.setattr(nn.functional, "scaled_dot_product_attention", count)
    return calls


def attentions(module: nn.Module) -> int:
    return sum(isinstance(part, Attention) for part in module.modules())


@pytest.mark.parametrize("family", WRITERS)
def test_attention_is_fused(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every part, each attention is one call of torch's own."""
    model: Any = load_denoiser(resolve(str(WRITERS[family](tmp_path))))
    calls = fused(monkeypatch)
    given = inputs(model)
    encoders = getattr(model, "text_encoders", [getattr(model, "text_encoder", None)])
    layers = sum(encoder.config.num_hidden_layers for encoder in encoders if encoder)
    assert len(calls) == layers
    calls.clear()
    with torch.no_grad():
        model.predict(*given)
    assert len(calls) == attentions(model.network) > 0
    calls.clear()
    model.encode_images(torch.zeros(1, 3, model.resolution, model.resolution))
    assert len(calls) == attentions(model.vae.encoder) > 0


def test_a_lora_leaves_attention_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged one, and one that is trained."""
    folder = tiny.write_sd(tmp_path / "model")
    trained: Any = load_denoiser(resolve(str(folder)))
    add_lora(trained.unet, 2, 0)
    save_lora(lora_weights(trained.unet), str(tmp_path), 2)
    merged: Any = load_denoiser(resolve(str(folder)), lora=str(tmp_path))
    calls = fused(monkeypatch)
    for model in (trained, merged):
        given = inputs(model)
        calls.clear()
        with torch.no_grad():
            model.predict(*given)
        assert len(calls) == attentions(model.unet) > 0


def overflowing(folder: Path) -> Path:
    """A model like Stable Diffusion 2: its config asks for attention in float32, and products of its queries
    and keys go beyond what fp16 holds."""
    tiny.write_sd(folder, prediction="v_prediction")
    config = folder / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"upcast_attention": True}))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name, value in weights.items():
        if name.endswith(("to_q.weight", "to_k.weight")):
            weights[name] = value * 700
    save_file(weights, file, {"format": "pt"})
    return folder


def test_products_beyond_fp16(tmp_path: Path) -> None:
    """Are those of diffusers' own attention with its upcast, to fp16's rounding; without that, NaN."""
    model: Any = load_denoiser(resolve(str(overflowing(tmp_path))), "fp16")
    given = inputs(model)
    found = {"fused": model.predict(*given)}
    model.unet.set_attn_processor(AttnProcessor())
    found["upcast"] = model.predict(*given)
    for part in model.unet.modules():
        if isinstance(part, Attention):
            assert part.upcast_attention
            part.upcast_attention = False
    found["plain"] = model.predict(*given)
    assert found["fused"].isfinite().all()
    assert not found["plain"].isfinite().all()
    torch.testing.assert_close(found["fused"], found["upcast"], rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_channels_come_last(dtype: torch.dtype) -> None:
    assert layout(torch.device("cuda", 1), dtype) == torch.channels_last
    assert layout(torch.device("cuda"), torch.float32) == torch.contiguous_format
    assert layout(torch.device("cpu"), dtype) == torch.contiguous_format


def four_dimensional(module: nn.Module) -> list[Tensor]:
    return [weight for weight in module.parameters() if weight.ndim == 4]


def is_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("family", WRITERS)
def test_channels_last(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the network and the VAE; the errors are the same to rounding, and each time the same."""
    source = resolve(str(WRITERS[family](tmp_path)))

    def errors(model: Any) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        pixels = torch.rand(2, 3, model.resolution, model.resolution, generator=generator) * 2 - 1
        latents, condition = model.encode_images(pixels), model.encode_texts(TEXTS)
        plan, pairs = make_plan([10, 900], model.latent_shape), torch.tensor([(0, 0), (1, 1)])
        return pair_errors(model, latents, condition, plan, pairs).l2

    reference = errors(load_denoiser(source))
    last: Callable[..., Any] = lambda device, dtype: torch.channels_last  # noqa: E731
    monkeypatch.setattr("diffitm.models.folder.layout", last)
    model: Any = load_denoiser(source)
    assert all(map(is_last, four_dimensional(model.network) + four_dimensional(model.vae)))
    found = errors(model)
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=0)
    assert torch.equal(errors(model), found)


def test_a_lora_of_convolutions_in_channels_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is merged to the same weights, which stay as they lie."""
    source, name = resolve(str(tiny.write_sd(tmp_path / "model"))), "conv_in"
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"unet.{name}.lora_A.weight": torch.randn(2, 4, 3, 3, generator=generator),
        f"unet.{name}.lora_B.weight": torch.randn(32, 2, 1, 1, generator=generator),
    }
    save_file(tensors, tmp_path / "lora.safetensors")
    lora = str(tmp_path / "lora.safetensors")
    expected: Any = load_denoiser(source, lora=lora)
    plain: Any = load_denoiser(source)
    monkeypatch.setattr("diffitm.models.folder.layout", lambda device, dtype: torch.channels_last)
    found: Any = load_denoiser(source, lora=lora)
    assert torch.equal(found.unet.conv_in.weight, expected.unet.conv_in.weight)
    assert not torch.equal(found.unet.conv_in.weight, plain.unet.conv_in.weight)
    assert is_last(found.unet.conv_in.weight)
