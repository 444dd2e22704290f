"""A LoRA on a diffusion transformer: its update against plain code, and its file in stock diffusers."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from diffusers import DiffusionPipeline
from pyarrow import parquet
from torch import Tensor

from diffitm.commands.stages.encode import EncodeActor, Encoder
from diffitm.core.errors import InputError
from diffitm.models.dit import Dit
from diffitm.models.folder import Folder
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.lora import lora_network, lora_weights, restore_adapter, save_lora
from diffitm.models.model_check import check_loadable
from diffitm.models.noise_schedule import FlowSchedule
from diffitm.scoring.encoded_items import Cache
from diffitm.training.lora.objectives import Objective
from diffitm.training.lora.step import Posterior, Tuner
from diffitm.training.sampler import Item, draw_noise, seed_of
from tests import families, tiny

CAPTIONS = ["A red cube", "a small blue sphere, left of it"]  # of other lengths
LAMBDA = 1.5


@pytest.fixture(scope="module", params=families.WRITERS)
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Do not write into it."""
    return families.write(request.param, tmp_path_factory.mktemp("family") / "model")


def items() -> list[Item]:
    return [
        Item(i, f"{i}", CAPTIONS[i], f"{i}-", CAPTIONS[1 - i], seed_of("t", i)) for i in range(2)
    ]


def tuner_of(folder: Path) -> Tuner:
    """With a LoRA that changes something."""
    made = Tuner(load_denoiser(resolve(str(folder))), Objective("hard-neg", LAMBDA), rank=2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in made.parameters:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


def posterior(model: Any, seed: int) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.randn(2, *model.latent_shape, generator=generator) for _ in range(2))
    return Posterior(mean, 0.1 * std.abs())


def plain_error(model: Any, where: Posterior, item: Item, i: int, text: str) -> Tensor:
    """One pair at a time, by the formulas: eps - z0 of (1 - sigma) z0 + sigma eps, or epsilon on a table."""
    drawn = draw_noise([item.seed], model.latent_shape, model.schedule)
    z0 = where.mean[i : i + 1] + where.std[i : i + 1] * drawn.posterior
    at, eps = drawn.timesteps, drawn.noise
    if model.schedule.prediction == "flow":
        sigma = at[0] / 1000
        noised, target = (1 - sigma) * z0 + sigma * eps, eps - z0
    else:
        abar = model.scheduler.alphas_cumprod[at[0]]
        noised, target = abar.sqrt() * z0 + (1 - abar).sqrt() * eps, eps
    condition = {k: v.clone() for k, v in model.encode_texts([text]).items()}
    return ((model.predict(noised, at, condition) - target) ** 2).mean()


def test_an_update_equals_plain_code(folder: Path) -> None:
    """Loss and gradients of HardNeg with negatives of images and texts; nothing but the LoRA has any."""
    tuner = tuner_of(folder)
    model: Any = tuner.denoiser
    right, wrong = posterior(model, 0), posterior(model, 1)
    found = tuner.losses(items(), right, wrong)
    found.loss.backward()
    gradients = [parameter.grad for parameter in tuner.parameters]
    frozen = [p for name, p in tuner.network.named_parameters() if "lora_" not in name]
    assert frozen and all(p.grad is None for p in frozen)
    tuner.network.zero_grad()
    total = torch.zeros(())
    for i, item in enumerate(items()):
        one = plain_error(model, right, item, i, item.caption)
        two = plain_error(model, wrong, item, i, item.negative_caption)
        total = total + (one - torch.minimum(two, LAMBDA * one.detach())) / 2
    total.backward()
    torch.testing.assert_close(found.loss, total, atol=1e-5, rtol=1e-4)
    moved = 0
    for parameter, gradient in zip(tuner.parameters, gradients, strict=True):
        if parameter.grad is None:  # a last block's text goes nowhere
            assert gradient is None
            continue
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)
        moved += bool(parameter.grad.any())
    assert moved > 0.8 * len(gradients)


def test_every_attention_learns(folder: Path) -> None:
    """A block's attention in the network has a LoRA, also where q, k and v are one layer."""
    network = lora_network(tuner_of(folder).denoiser)
    attends = re.compile(r".+\.\d+\.(attn\d?|attention)(?=\.|$)")

    def blocks(names: list[str]) -> set[str]:
        return {found[0] for name in names if (found := attends.match(name))}

    learn = blocks([name for name, _ in network.named_parameters() if "lora_" in name])
    assert learn == blocks([name for name, _ in network.named_modules()])
    assert len(learn) > 0


def test_the_file_is_read_by_diffusers_and_by_us(folder: Path, tmp_path: Path) -> None:
    """Stock diffusers fuses it to the weights that we merge, which predict what the tuner does; a
    checkpoint is put back."""
    tuner = tuner_of(folder)
    model: Any = tuner.denoiser
    save_lora(lora_weights(tuner.network), str(tmp_path), 2)
    source = resolve(str(folder))
    check_loadable(source, [str(tmp_path)])
    merged: Any = load_denoiser(source, lora=str(tmp_path))
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, *model.latent_shape, generator=generator)
    given = z, torch.tensor([40, 700]), model.encode_texts(CAPTIONS)
    with torch.no_grad():
        expected = model.predict(*given)
        torch.testing.assert_close(merged.predict(*given), expected, atol=1e-4, rtol=1e-3)
    other = Tuner(load_denoiser(source), Objective("no-neg"), rank=2)
    restore_adapter(other.network, lora_weights(tuner.network))
    with torch.no_grad():
        torch.testing.assert_close(other.denoiser.predict(*given), expected)
    no_t5 = {"text_encoder_3": None, "tokenizer_3": None} if getattr(model, "t5", 0) is None else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **no_t5)
    if not hasattr(pipeline, "load_lora_weights"):
        assert "PixArt" in type(pipeline).__name__  # for which diffusers has none
        return
    pipeline.load_lora_weights(tmp_path)
    pipeline.transformer.fuse_lora()
    stock = pipeline.transformer.state_dict()
    for key, value in merged.transformer.state_dict().items():
        at, _, name = key.rpartition(".")
        own = stock.get(key, stock.get(f"{at}.base_layer.{name}"))
        torch.testing.assert_close(value, own, atol=1e-5, rtol=1e-4)


def test_texts_that_were_encoded_beforehand(folder: Path, tmp_path: Path) -> None:
    """Are what the model itself makes of them, whatever their lengths."""
    encoder = Encoder(resolve(str(folder)), None, "fp32", "", "squash")
    table = pa.table({"row": [0], "start": [0], "names": [CAPTIONS]})
    counter = SimpleNamespace(add=SimpleNamespace(remote=lambda count: None))
    parquet.write_table(EncodeActor("text", encoder, "cpu", counter)(table), tmp_path / "0.parquet")
    model: Any = load_denoiser(resolve(str(folder)))
    z, at = torch.randn(2, *model.latent_shape), torch.tensor([40, 700])
    with torch.no_grad():
        cached = model.predict(z, at, Cache(str(tmp_path))(CAPTIONS))
        torch.testing.assert_close(cached, model.predict(z, at, model.encode_texts(CAPTIONS)))


def test_times_of_a_flow_are_logit_normal() -> None:
    """Each an example's own; the median is 500, the quartiles those of a logistic normal."""
    seeds = [seed_of("x", i) for i in range(2000)]
    at = draw_noise(seeds, (1, 2, 2), FlowSchedule()).timesteps
    assert torch.equal(at[7:8], draw_noise(seeds[7:8], (1, 2, 2), FlowSchedule()).timesteps)
    FlowSchedule().check(at)
    quartiles = torch.quantile(at, torch.tensor([0.25, 0.5, 0.75]))
    wanted = 1000 * torch.sigmoid(torch.tensor([-0.6745, 0.0, 0.6745]))
    torch.testing.assert_close(quartiles, wanted, atol=20, rtol=0)


def test_a_model_of_classes_is_not_tuned(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a Dit takes no LoRA"):
        lora_network(Dit(Folder(str(tiny.write_dit(tmp_path)))))
