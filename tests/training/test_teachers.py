"""Transformers as teachers of a CLIP: DIVA and SDS-CLIP against loops written with diffusers' parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.clip_tokens import visual_tokens
from diffitm.models.denoiser import Denoiser
from diffitm.models.embedded import folder_of
from diffitm.models.loading import load_denoiser, resolve
from diffitm.training.diva.recap import parse_recap
from diffitm.training.diva.reconstructions import row_of_pictures
from diffitm.training.diva.sds import SdsClip
from diffitm.training.diva.step import Diva
from diffitm.training.lora.step import Posterior
from tests import families, tiny_clip
from tests.family_references import Reference, Sd3, Text, pipeline_of, reference

SEEDS = [5, 6]
CAPTIONS = ["A red cube", "a small blue sphere, left of it"]  # of other lengths
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN,
                                                     open_clip.OPENAI_DATASET_STD))  # fmt: skip


class OneClip(Sd3):
    """An SD3 whose texts its pipeline does not read."""

    def text(self, pipe: Any, text: str) -> Text:
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        out = pipe.text_encoder(ids, output_hidden_states=True)
        return Text(out.hidden_states[-2], pooled=out.pooler_output)

    def no_text(self, pipe: Any) -> tuple[Tensor, Tensor | None]:
        hidden, _, pooled = self.text(pipe, "")
        return hidden, pooled


class Known(NamedTuple):
    """A teacher, and the same model as diffusers has it."""

    name: str
    folder: Path
    model: Any
    pipe: Any
    plain: Reference


@pytest.fixture(scope="module", params=["shapes-flow", *families.WRITERS])
def known(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Known:
    """Do not change it."""
    name = request.param
    if name == "shapes-flow":
        absent = dict.fromkeys(
            f"{part}_{n}" for part in ("text_encoder", "tokenizer") for n in "23"
        )
        pipe = DiffusionPipeline.from_pretrained(folder_of(name), **absent)
        return Known(name, folder_of(name), load_denoiser(resolve(name)), pipe, OneClip())
    folder = families.write(name, tmp_path_factory.mktemp("family") / name.replace(" ", "-"))
    model = load_denoiser(resolve(str(folder)))
    return Known(name, folder, model, pipeline_of(folder), reference(name))


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=generator)


def posterior(model: Denoiser) -> Posterior:
    generator = torch.Generator().manual_seed(1)
    mean, std = (torch.randn(2, *model.latent_shape, generator=generator) for _ in range(2))
    return Posterior(mean, 0.1 * std.abs())


def drawn(model: Denoiser, seed: int) -> tuple[float, Tensor, Tensor]:
    """Timestep, noise and the posterior's noise of a seed: of a flow the logit of sigma is normal."""
    generator = torch.Generator().manual_seed(seed)
    if model.schedule.prediction == "flow":
        step = float(1000 * torch.sigmoid(torch.randn(1, generator=generator)))
    else:
        step = int(torch.randint(1000, (1,), generator=generator))
    noise, sample = (torch.randn(1, *model.latent_shape, generator=generator) for _ in range(2))
    return step, noise, sample


def diva(model: Denoiser, recap: str = "all", **more: Any) -> Diva:
    return Diva(tiny_clip.vit(), "tiny", model, parse_recap(recap), **more)


def sds(model: Denoiser, **more: Any) -> SdsClip:
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=16)
    return SdsClip(tiny_clip.vit(), tokenizer, model, 0.5, **more)


def is_frozen(model: Any) -> bool:
    encoders = getattr(model, "text_encoders", None) or [model.text_encoder]
    parts = (model.network, model.vae, *encoders)
    return all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


def told(found: Diva, image: Tensor, known: Known) -> Text:
    """What the network is told of an image, [3, H, W]: the tokens that stand for a text's, all of which
    count, and the empty text's pooled embedding."""
    with torch.no_grad():
        empty, pooled = known.plain.no_text(known.pipe)
    tokens = visual_tokens(found.tower, ((image / 255 - MEAN) / STD)[None])[0]
    weight, bias = found.projection.weight, found.projection.bias
    hidden = torch.stack([weight @ token + bias + empty[0].mean(0) for token in tokens])
    return Text(hidden[None], torch.ones(1, len(hidden), dtype=torch.bool), pooled)


def test_diva_equals_plain_code(known: Known) -> None:
    """Loss and gradients, an image at a time; the teacher has none."""
    found, where = diva(known.model, repeats=1), posterior(known.model)
    loss = found.errors(pixels(), where, SEEDS).mean()
    loss.backward()
    assert is_frozen(known.model)
    total = torch.zeros(())
    for i, seed in enumerate(SEEDS):
        step, noise, sample = drawn(known.model, seed)
        z0 = where.mean[i : i + 1] + where.std[i : i + 1] * sample
        noised, target = known.plain.noised(z0, noise, step)
        text = told(found, pixels()[i], known)
        out = known.plain.told(known.pipe, text, noised, torch.tensor([step]))
        total = total + ((out - target) ** 2).mean() / 2
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)
    for parameter, plain in zip(
        found.parameters, torch.autograd.grad(total, found.parameters), strict=True
    ):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, plain, atol=1e-5, rtol=1e-3)
        # The bias of keys moves all of a softmax's inputs alike: its gradient is 0 but for rounding.
        assert plain.any()


@pytest.mark.parametrize("jacobian", [True, False])
def test_sds_equals_plain_code(known: Known, jacobian: bool) -> None:
    """An image at a time. Of a flow the error is the velocity's; with its network's answer held, the
    gradient by the latents is 2 (v - (eps - z)) / (C h w), of a noise's z_t 2 (eps_theta - eps) / (C h w)."""
    made = sds(known.model, jacobian=jacobian)
    embedding = torch.randn(2, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = made.errors(embedding, CAPTIONS, SEEDS)
    weight, bias = made.projection.weight, made.projection.bias
    slopes = torch.autograd.grad(found.sum(), [embedding, weight, bias])
    plain_slopes = [torch.zeros_like(value) for value in slopes]
    for i, seed in enumerate(SEEDS):
        step, noise, _ = drawn(known.model, seed)
        z0 = (weight @ embedding[i] + bias).view(1, *known.model.latent_shape)
        noised, target = known.plain.noised(z0, noise, step)
        with torch.no_grad():
            text = known.plain.text(known.pipe, CAPTIONS[i])
        with torch.set_grad_enabled(jacobian):
            out = known.plain.told(known.pipe, text, noised, torch.tensor([step]))
        error = ((out - target) ** 2).mean()
        torch.testing.assert_close(found[i], error, atol=1e-5, rtol=1e-4)
        if not jacobian and not target.requires_grad:  # noise, which the latents do not change
            error = 2 * (noised * (out - target)).mean()
        for slope, more in zip(
            plain_slopes, torch.autograd.grad(error, [embedding, weight, bias]), strict=True
        ):
            slope += more
    for slope, plain in zip(slopes, plain_slopes, strict=True):
        torch.testing.assert_close(slope, plain, atol=1e-5, rtol=1e-3)
        assert plain.norm() > 1e-4


def test_sds_teaches_the_norms_of_the_image_tower(known: Known) -> None:
    made = sds(known.model)
    image, _ = made.embed(pixels(), CAPTIONS)
    made.errors(image, CAPTIONS, SEEDS).mean().backward()
    learn = {n for n, p in made.clip.named_parameters() if p.grad is not None and p.grad.any()}
    assert learn == {name for name in made.norms if name.startswith("visual.")}
    assert all(p.grad is not None and p.grad.any() for p in made.projection.parameters())
    assert is_frozen(known.model)


def gradients(model: Denoiser, **more: Any) -> Tensor:
    """Of DIVA and of SDS-CLIP, as one vector."""
    found, made = diva(model, repeats=1, **more), sds(model, **more)
    found.errors(pixels(), posterior(model), SEEDS).mean().backward()
    made.errors(made.embed(pixels(), CAPTIONS)[0], CAPTIONS, SEEDS).mean().backward()
    parameters = [*found.parameters, *made.parts()[0], *made.parts()[1]]
    assert {p.dtype for p in parameters} == {torch.float32}
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_checkpointing_and_half_precision(known: Known) -> None:
    """The first changes no gradient, the second hardly one."""
    source, plain = resolve(str(known.folder)), gradients(known.model)
    recomputed = gradients(load_denoiser(source), checkpointing=True)
    torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-4)
    half = gradients(load_denoiser(source, "bf16"))
    assert torch.nn.functional.cosine_similarity(half, plain, dim=0) > 0.95


def test_pictures(known: Known) -> None:
    """The tokens change what the teacher makes of an image."""
    found, where = diva(known.model, "random:0.5"), posterior(known.model)
    first = Posterior(where.mean[:1], where.std[:1])
    columns = row_of_pictures(found, pixels()[:1], first, 5)
    side = known.model.resolution
    assert all(c.shape == (3, side, side) and c.abs().max() <= 1 for c in columns[1:])
    assert not torch.equal(columns[2], columns[3])


@pytest.mark.parametrize("name", ["PixArt-alpha", "Sana", "SD3"])
def test_tokens_one_to_one_are_those_that_count(tmp_path: Path, name: str) -> None:
    """As many of the recap as the prompt has without its padding; of a mask, of none and of padding."""
    model = load_denoiser(resolve(str(families.write(name, tmp_path / "model"))))
    prompt = "a red square"  # of 10 letters and the marks of the beginning or the end
    length = model.encode_texts([prompt])["hidden"].shape[1]
    with pytest.raises(InputError, match=f"the text has {length}; let them be equal"):
        diva(model, "all", prompt=prompt, add="tokens")


@pytest.mark.parametrize(("name", "fits"), [("Lumina2", 18), ("Z-Image", 34)])
def test_a_recap_that_the_network_has_no_places_for(tmp_path: Path, name: str, fits: int) -> None:
    """Their networks have tables of places; 17 tokens, which Z-Image fills up to 32, need so many rows."""
    folder = families.write(name, tmp_path / "model")
    file = folder / "transformer" / "config.json"
    for rows in (fits, fits - 1):
        lengths = {"axes_lens": [rows, 32, 32]}
        file.write_text(json.dumps(json.loads(file.read_text()) | lengths))
        model = load_denoiser(resolve(str(folder)))
        if rows == fits:
            assert diva(model).errors(pixels(), posterior(model), SEEDS).isfinite().all()
            continue
        with pytest.raises(
            InputError, match=r"recap all: has 17 tokens .* has places for \d+; take"
        ):
            diva(model)
        model.places = None
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            diva(model).errors(pixels(), posterior(model), SEEDS)
