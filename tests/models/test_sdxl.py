"""Stable Diffusion XL against diffusers' own pipeline, and what identifies a folder's weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.models.embedded import SHAPES
from diffitm.models.folder import Folder
from diffitm.models.loading import DTYPES, load_denoiser, resolve
from diffitm.models.sdxl import StableDiffusionXL
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.specs import DiffusionSpec
from tests import tiny

TEXTS = ["a red circle", "a blue square", ""]
SHAPE = (2 * tiny.WIDTH, tiny.POOLED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return tiny.write_sdxl(tmp_path_factory.mktemp("sdxl") / "tiny")


@pytest.fixture(scope="module")
def sdxl(folder: Path) -> StableDiffusionXL:
    """Do not change it."""
    return StableDiffusionXL(Folder(str(folder)))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def pipeline_of(folder: Path) -> Any:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_attributes(sdxl: StableDiffusionXL) -> None:
    assert (sdxl.latent_shape, sdxl.resolution) == ((4, 8, 8), 32)
    assert (sdxl.schedule.prediction, sdxl.schedule.timesteps) == ("epsilon", 1000)
    assert sdxl.encode_images(pixels()).shape == (2, 4, 8, 8)
    parts = (sdxl.unet, sdxl.vae, *sdxl.text_encoders)
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


@pytest.mark.parametrize("zeros", [True, False])
def test_texts_are_the_pipelines(tmp_path: Path, zeros: bool) -> None:
    """Of prompts and of the empty text, beside others and alone."""
    folder = tiny.write_sdxl(tmp_path / "m", zeros=zeros)
    found = StableDiffusionXL(Folder(str(folder))).encode_texts(TEXTS)
    with torch.no_grad():
        hidden, empty, pooled, pooled_empty = pipeline_of(folder).encode_prompt(TEXTS[:2])
    assert found["hidden"].shape == (3, 16, SHAPE[0])
    assert found["pooled"].shape == (3, SHAPE[1])
    torch.testing.assert_close(found["hidden"], torch.cat([hidden, empty[:1]]))
    torch.testing.assert_close(found["pooled"], torch.cat([pooled, pooled_empty[:1]]))
    assert bool((found["pooled"][2] == 0).all()) is zeros
    alone = StableDiffusionXL(Folder(str(folder))).encode_texts([""])
    torch.testing.assert_close(alone["hidden"][0], found["hidden"][2])


def test_prediction_is_the_pipelines(folder: Path, sdxl: StableDiffusionXL) -> None:
    """What its U-Net answers in a guided step, without and with the prompt."""
    pipeline, seen = pipeline_of(folder), []
    pipeline.unet.register_forward_hook(lambda _, given, out: seen.append((*given, out[0])))
    with torch.no_grad():
        pipeline("a red circle", num_inference_steps=1, guidance_scale=3.0, output_type="latent")
        (noised, step, out) = seen[0]
        condition = sdxl.encode_texts(["", "a red circle"])
        found = sdxl.predict(noised, step.repeat(2).long(), condition)
    assert len(noised) == 2
    torch.testing.assert_close(found, out, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-3)


def test_images_are_the_pipelines(folder: Path, sdxl: StableDiffusionXL) -> None:
    pipeline = pipeline_of(folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    prompts, options = ["a red circle"] * 2, {"num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pipeline(prompts, generator=generators, **options).images
    found = sdxl.generate("a red circle", [0, 1], steps=3, guidance=3.0)
    assert [image.size for image in found] == [(32, 32)] * 2
    for one, other in zip(found, expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= 1
    assert np.abs(np.asarray(found[0], int) - np.asarray(found[1], int)).max() > 1


def test_decode(sdxl: StableDiffusionXL) -> None:
    """Pixels as the VAE gives them, cut at black and white."""
    latents = sdxl.encode_images(pixels())
    found = sdxl.decode(latents)
    assert (found.shape, found.dtype, found.requires_grad) == ((2, 3, 32, 32), torch.float32, False)
    plain = sdxl.vae.decode(latents / sdxl.vae.config.scaling_factor).sample
    torch.testing.assert_close(found, plain.clamp(-1, 1))
    bright = sdxl.decode(1000 * latents)
    assert bright.abs().max() == 1


def test_scores_do_not_depend_on_the_batch(folder: Path, tmp_path: Path) -> None:
    for i in range(2):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    rows = [PairRow(i, f"{i}.png", TEXTS[i:]) for i in range(2)]
    source, found = resolve(str(folder)), []
    for size in (64, 3):
        spec = DiffusionSpec(source, str(tmp_path), "diffusionitm", (10, 900), batch_size=size)
        found.append(spec.build("cpu").score(rows))
    assert [(line["image"], line["text"]) for line in found[0]] == [
        *(("0.png", text) for text in TEXTS),
        *(("1.png", text) for text in TEXTS[1:]),
    ]
    for one, other in zip(*found, strict=True):
        assert one["failure"] is None
        np.testing.assert_allclose(one["l2"], other["l2"], rtol=1e-5)
    assert len({tuple(line["l2"]) for line in found[0]}) == len(found[0])


@pytest.mark.parametrize("kind", [StableDiffusion, StableDiffusionXL])
def test_gradients_reach_the_condition(folder: Path, sd_folder: Path, kind: Any) -> None:
    """Every part of it, the same with recomputed activations, of which fewer are kept."""
    model = kind(Folder(str(folder if kind is StableDiffusionXL else sd_folder)))
    condition = model.encode_texts(TEXTS[:2])
    plain, kept = tiny.gradients(model, condition)
    model.checkpoint_gradients()
    saved, less = tiny.gradients(model, condition)
    assert set(plain) == set(condition)
    for name, value in plain.items():
        assert value.flatten(1).abs().amax(1).min() > 0
        torch.testing.assert_close(saved[name], value, atol=1e-6, rtol=1e-5)
    assert less < kept / 2
    assert not model.unet.training
    assert all(p.grad is None and not p.requires_grad for p in model.unet.parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(folder: Path, copy: Path, sdxl: StableDiffusionXL, dtype: str) -> None:
    """The VAE stays whole where its config says so; predictions are close, images can be made."""
    model: Any = load_denoiser(resolve(str(folder)), dtype)
    assert (model.unet.dtype, model.vae.dtype) == (DTYPES[dtype], torch.float32)
    assert torch.equal(model.encode_images(pixels()), sdxl.encode_images(pixels()))
    noised, at = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 900])
    with torch.no_grad():
        found = model.predict(noised, at, model.encode_texts(TEXTS))
        expected = sdxl.predict(noised, at, sdxl.encode_texts(TEXTS))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert model.generate("a red circle", [0], steps=2, guidance=3.0)[0].size == (32, 32)
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    half: Any = load_denoiser(resolve(str(copy)), dtype)
    assert half.vae.dtype == DTYPES[dtype]
    torch.testing.assert_close(
        half.encode_images(pixels()), sdxl.encode_images(pixels()), atol=0.02, rtol=0.05
    )


def test_lora_is_the_pipelines(folder: Path, tmp_path: Path) -> None:
    layers = {}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        plain: Any = StableDiffusionXL(Folder(str(folder)))
        for name, module in plain.unet.named_modules():
            if name.endswith(("to_q", "to_out.0")):
                layers[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, module.in_features)
                layers[f"{name}.lora_B.weight"] = 0.3 * torch.randn(module.out_features, 2)
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    pipeline = pipeline_of(folder)
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    merged: Any = load_denoiser(resolve(str(folder)), lora=str(tmp_path))
    expected = {k.replace(".base_layer", ""): v for k, v in pipeline.unet.state_dict().items()}
    for name, value in merged.unet.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        changed = name.removesuffix("weight") + "lora_A.weight" in layers
        assert torch.equal(value, plain.unet.state_dict()[name]) is not changed


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2", "unet"])
def test_folder_that_lacks_a_part(copy: Path, part: str) -> None:
    shutil.rmtree(copy / part)
    with pytest.raises(InputError, match=f"lacks {part}"):
        resolve(str(copy))


def test_model_without_a_text_encoder(copy: Path) -> None:
    """As the refiner's index has it."""
    tiny.write_index(copy, text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(InputError, match="names no text_encoder, tokenizer") as raised:
        load_denoiser(resolve(str(copy)))
    assert str(copy) in str(raised.value)


@pytest.mark.parametrize(
    "name", ["EDMDPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_scheduler_without_betas(copy: Path, name: str) -> None:
    """Its noising is another; DDPM's default betas would give wrong scores."""
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=f"the scheduler {name} gives no betas"):
        load_denoiser(resolve(str(copy)))


def test_digest(copy: Path) -> None:
    """The empty text's condition is part of the weights' name; not saying it is saying yes."""
    digest = resolve(str(copy)).digest
    tiny.write_index(copy, force_zeros_for_empty_prompt=False)
    assert resolve(str(copy)).digest != digest
    index = json.loads((copy / "model_index.json").read_text())
    del index["force_zeros_for_empty_prompt"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert resolve(str(copy)).digest == digest
    (copy / "text_encoder_2" / "config.json").write_text("{}")
    assert resolve(str(copy)).digest != digest


def test_digest_of_stable_diffusion_is_unchanged() -> None:
    """Stores are named by it: sha256 over the names and the sha256 of the parts' files."""
    folder, total = SHAPES / "diffusion", hashlib.sha256()
    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    for path in sorted(p for part in parts for p in (folder / part).rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    assert resolve("shapes").digest == total.hexdigest()
