"""Transformer families against diffusers' own pipelines, and a plain reference of their errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffitm.core import registry
from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.evaluation.evaluate import evaluate
from diffitm.models import flux2, lumina2, qwen_image, sana
from diffitm.models.denoiser import Denoiser
from diffitm.models.distilled import tell_untrained
from diffitm.models.families import FAMILIES
from diffitm.models.flow import FlowDiffusion, pack, unpack
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.model_check import check_loadable, settled
from diffitm.models.text_limits import TextLimits, tell_long_texts
from diffitm.scoring.batching import Batch
from diffitm.scoring.compiled import CompiledPredict
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import pair_errors
from diffitm.scoring.specs import DiffusionSpec
from diffitm.scoring.text_cache import TextCache
from diffitm.store.score_store import open_store
from tests import families, tiny
from tests.family_references import TEXTS, flat, pipeline_of, reference, spied

DISTILLED = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.2-dev")  # without a negative prompt
GUIDED = ("FLUX.1-dev", "FLUX.2-dev")
READ_LONG = (*GUIDED, "Qwen-Image", "Z-Image", "FLUX.2-klein")  # texts of 302 tokens


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Do not write into them."""
    above = tmp_path_factory.mktemp("families")
    return {name: families.write(name, above / name.replace(" ", "-")) for name in families.WRITERS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    """Do not change them."""
    return {name: load_denoiser(resolve(str(folder))) for name, folder in folders.items()}


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.2-dev"])
def test_a_tiny_model_is_always_the_same(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Every file: the library's list of bytes has another order at each call."""
    again = families.write(name, tmp_path / "again")
    first = sorted(path for path in folders[name].rglob("*") if path.is_file())
    assert len(first) > 8
    for path in first:
        assert path.read_bytes() == (again / path.relative_to(folders[name])).read_bytes(), path


def latents_of(model: Denoiser, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *model.latent_shape, generator=generator)


@pytest.mark.parametrize("name", families.WRITERS)
def test_the_network_gets_what_the_pipeline_gives(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """Every argument of an unguided step; of a masked text what it attends to."""
    pipeline, model, plain = pipeline_of(folders[name]), models[name], reference(name)
    side, noised = model.resolution, latents_of(model, 1)

    def draw() -> None:
        pipeline(
            prompt=TEXTS[1], height=side, width=side, num_inference_steps=2, output_type="latent",
            latents=plain.given(noised), **plain.asked,
        )  # fmt: skip

    given = spied(pipeline.transformer, draw)[0]
    step, condition = plain.step(given), model.encode_texts(TEXTS[1:2])

    def predict() -> None:
        with torch.no_grad():
            model.predict(noised, step, condition)

    (found,) = spied(model.transformer, predict)
    expected, found = flat(given), flat(found)
    expected.pop("return_dict"), found.pop("return_dict")
    if mask := next((key for key in found if key.endswith("_mask")), None):
        assert found.pop(mask).all()
        if mask in expected:  # which Qwen's pipeline leaves out where all is a text
            kept = expected.pop(mask)[0].bool()
            expected["encoder_hidden_states"] = expected["encoder_hidden_states"][:, kept]
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5, msg=f"{name}: {key}")


@pytest.mark.parametrize("name", [n for n in families.WRITERS if n not in DISTILLED])
def test_no_text_is_the_pipelines(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """The empty negative prompt of a guided step."""
    with torch.no_grad():
        hidden, pooled = reference(name).no_text(pipeline_of(folders[name]))
    condition = models[name].encode_texts([""])
    torch.testing.assert_close(condition["hidden"], hidden, atol=1e-5, rtol=1e-5)
    if pooled is not None:
        torch.testing.assert_close(condition["pooled"], pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", families.WRITERS)
def test_errors_are_a_plain_references(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """Of one pair, and of the same one in a batch of texts of other lengths."""
    model, steps = models[name], [100, 700] if name.startswith("PixArt") else [65.9656, 993.2432]
    z0, plan = latents_of(model, 1), make_plan(steps, model.latent_shape)
    expected = [
        reference(name).error(folders[name], z0, plan.noise[i : i + 1], step)
        for i, step in enumerate(steps)
    ]
    pairs = torch.tensor([(0, t) for t in range(len(TEXTS))])
    batch = pair_errors(model, z0, model.encode_texts(TEXTS), plan, pairs)
    alone = pair_errors(model, z0, model.encode_texts(TEXTS[:1]), plan, pairs[:1])
    np.testing.assert_allclose(alone.l2[0], expected, rtol=1e-5)
    np.testing.assert_allclose(batch.l2[0], expected, rtol=1e-5)
    assert len({round(float(v), 3) for v in batch.l2[:, 1]}) == len(TEXTS)


@pytest.mark.parametrize("name", families.WRITERS)
def test_cached_texts(name: str, models: dict[str, Any]) -> None:
    """What comes out of the cache is what goes in; of masked texts without their padding."""
    model = models[name]
    cache = TextCache(model.encode_texts, 2**20, 2)
    found, whole = cache(TEXTS), model.encode_texts(TEXTS)
    assert found.keys() == whole.keys()
    seen = whole["mask"][..., None] if "mask" in whole else torch.tensor(True)
    for key, value in whole.items():
        expected = value * seen if key == "hidden" else value
        torch.testing.assert_close(found[key], expected, atol=1e-5, rtol=1e-5)
    if "mask" in whole:
        kept = [cache.kept[text]["hidden"].shape[1] for text in TEXTS]
        assert kept == whole["mask"].sum(1).tolist()
        assert len(set(kept)) == len(TEXTS)
        assert cache(TEXTS[2:])["hidden"].shape[1] == kept[2]


@pytest.mark.parametrize("name", families.WRITERS)
def test_latents_and_pixels(name: str, folders: dict[str, Path], models: dict[str, Any]) -> None:
    """Shifted and scaled as the pipeline takes them back."""
    model, vae, plain = models[name], pipeline_of(folders[name]).vae, reference(name)
    side = model.resolution
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        raw = plain.encoded(vae, pixels)
        drawn = vae.decode(raw).sample.clamp(-1, 1)
    latents = model.encode_images(pixels)
    torch.testing.assert_close(latents, plain.scaled(vae, raw))
    assert latents.shape == (2, *model.latent_shape)
    found = model.decode(latents)
    torch.testing.assert_close(found, drawn.view_as(found), atol=1e-5, rtol=1e-4)
    sampled = model.encode_images(pixels, seed=3)
    assert torch.equal(sampled, latents) is (name == "Sana")


@pytest.mark.parametrize("name", families.WRITERS)
def test_gradients_reach_the_condition(name: str, models: dict[str, Any]) -> None:
    model = models[name]
    condition = {
        key: value.clone().requires_grad_() if value.is_floating_point() else value.clone()
        for key, value in model.encode_texts(TEXTS[:2]).items()
    }
    out = model.predict(latents_of(model, 2), torch.tensor([100, 700]), condition)
    (out**2).sum().backward()
    for key, value in condition.items():
        if key != "mask":
            assert value.grad is not None and value.grad.flatten(1).abs().amax(1).min() > 0
    assert out.shape == (2, *model.latent_shape) and out.dtype == torch.float32


@pytest.mark.parametrize("name", families.WRITERS)
def test_folders_are_found_whole(name: str, folders: dict[str, Path]) -> None:
    check_loadable(resolve(str(folders[name])))


def test_a_store_names_what_diffusers_puts_around_texts(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version's words would give other scores from the same files."""

    def stated() -> dict[str, Any]:
        sources = {name: resolve(str(folder)) for name, folder in folders.items()}
        specs = {n: DiffusionSpec(s, "", "snr", (500.0,)) for n, s in sources.items()}
        return {name: spec.store_config().get("around_texts") for name, spec in specs.items()}

    first = stated()
    known = {name for name, value in first.items() if value}
    assert {"Qwen-Image", "Lumina2", "FLUX.2-dev", "Sana"} == known
    other = "Answer <Prompt Start> {}"
    monkeypatch.setattr(qwen_image, "template", lambda: other)
    monkeypatch.setattr(lumina2, "system_prompt", lambda: other)
    monkeypatch.setattr(sana, "instruction", lambda: other)
    monkeypatch.setattr(flux2, "format_input", lambda prompts: [[{"content": other}]])
    second = stated()
    assert {name for name, value in first.items() if second[name] != value} == known


@pytest.mark.parametrize("name", ["Qwen-Image", "FLUX.2-klein"])
def test_where_a_gpu_has_channels_last(
    name: str, folders: dict[str, Path], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its half precisions do: also a VAE of videos, whose weights cannot lie so, is loaded."""
    last = torch.channels_last
    monkeypatch.setattr("diffitm.models.folder.layout", lambda device, dtype: last)
    found: Any = load_denoiser(resolve(str(folders[name])))
    pixels = torch.rand(1, 3, found.resolution, found.resolution)
    expected = models[name].encode_images(pixels)
    torch.testing.assert_close(found.encode_images(pixels), expected, rtol=1e-4, atol=1e-5)
    weights = [weight for weight in found.vae.parameters() if weight.dim() == 4]
    is_last = all(weight.is_contiguous(memory_format=last) for weight in weights)
    assert is_last is (name != "Qwen-Image")


def test_packing_is_the_pipelines(folders: dict[str, Path]) -> None:
    pipeline = pipeline_of(folders["FLUX.1-schnell"])
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    assert torch.equal(packed, pipeline._pack_latents(latents, 2, 4, 6, 6))
    assert torch.equal(unpack(packed, 6), latents)


def test_pixart_that_takes_the_images_size(tmp_path: Path) -> None:
    """As alpha does at 1,024 pixels: height and width in pixels, and their ratio."""
    model: Any = load_denoiser(resolve(str(families.write_pixart(tmp_path / "m", sized=True))))
    condition = model.encode_texts(TEXTS[:2])
    (found,) = spied(
        model.transformer,
        lambda: model.predict(latents_of(model, 2), torch.tensor([1, 2]), condition),
    )
    added = found["added_cond_kwargs"]
    assert added["resolution"].tolist() == [[32.0, 32.0]] * 2
    assert added["aspect_ratio"].tolist() == [[1.0]] * 2


def test_sd3_with_one_clip(tmp_path: Path) -> None:
    """Its network gets the tokens and what is pooled of that CLIP alone, as the pipeline hands them on."""
    folder = families.write_sd3_of_one_clip(tmp_path / "m")
    check_loadable(resolve(str(folder)))
    model: Any = load_denoiser(resolve(str(folder)))
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    ids = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
        TEXTS[0], padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        text = encoder(ids.input_ids, output_hidden_states=True)
    away = [f"{part}_{number}" for part in ("text_encoder", "tokenizer") for number in (2, 3)]
    pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(away))
    noised = latents_of(model, 1)

    def draw() -> None:
        pipeline(
            prompt_embeds=text.hidden_states[-2], pooled_prompt_embeds=text.pooler_output,
            height=32, width=32, num_inference_steps=2, latents=noised, guidance_scale=1.0,
            output_type="latent",
        )  # fmt: skip

    given = spied(pipeline.transformer, draw)[0]
    condition = model.encode_texts([TEXTS[0]])
    (found,) = spied(
        model.transformer,
        lambda: model.predict(noised, given["timestep"], condition),
    )
    expected, found = flat(given), flat(found)
    assert found.keys() == expected.keys()
    for key in expected.keys() - {"return_dict"}:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=1e-5, msg=key)


def test_sd3_with_one_clip_has_to_fit(tmp_path: Path) -> None:
    """Its widths are the network's; a CLIP with a projection has a second one beside it."""
    wide = families.write_sd3_of_one_clip(tmp_path / "wide", taken=2 * tiny.WIDTH)
    for refuse in (load_denoiser, check_loadable):
        with pytest.raises(InputError, match=f"{tiny.WIDTH} wide, its transformer takes"):
            refuse(resolve(str(wide)))
    kind = CLIPTextModelWithProjection
    with pytest.raises(InputError, match="lacks text_encoder_2, tokenizer_2"):
        resolve(str(families.write_sd3_of_one_clip(tmp_path / "projected", kind=kind)))


def test_every_flow_family_says_so() -> None:
    """The table, which options are checked by, and the classes agree."""
    for family in FAMILIES.values():
        kind = registry.load(family.denoiser)
        assert issubclass(kind, FlowDiffusion) is family.flow
        assert family.flow is (family.told.get("prediction") == "flow")


@pytest.mark.parametrize("name", ["Sana", "SD3", "Qwen-Image", "Z-Image"])
def test_scores_do_not_depend_on_the_batch(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Through the scorer, whose lines hold sigmas; without a text zeros are another score."""
    for i in range(2):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    rows = [PairRow(i, f"{i}.png", TEXTS[i:]) for i in range(2)]
    steps, source = (65.9656, 993.2432), resolve(str(folders[name]))
    spec = DiffusionSpec(source, str(tmp_path), "selfbench", steps, batch_size=64)
    found = spec.build("cpu").score(rows)
    for other in (
        DiffusionSpec(source, str(tmp_path), "selfbench", steps, batch_size=3),
        DiffusionSpec(source, str(tmp_path), "selfbench", steps, empty="zeros"),
    ):
        for one, two in zip(found, other.build("cpu").score(rows), strict=True):
            assert one["failure"] is None and one["timesteps"] is None
            np.testing.assert_allclose(one["sigmas"], [0.0659656, 0.9932432], rtol=1e-6)
            same = other.empty == "text" or one["text"] != ""
            assert np.allclose(one["l2"], two["l2"], rtol=1e-5) is same
    assert spec.store_config()["prediction"] == "flow"
    assert "empty" not in spec.store_config() and other.store_config()["empty"] == "zeros"


def test_compiled_forwards_have_one_shape(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the texts' lengths, and with the same predictions."""
    model, seen = models["PixArt-alpha"], list[Any]()
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    compiled = CompiledPredict(model, Batch(3))
    (real, predict) = (model.predict, lambda *given: seen.append(given[2]) or real(*given))
    compiled._compiled = predict
    for texts in (TEXTS, TEXTS[2:]):
        noised, condition = latents_of(model, len(texts)), model.encode_texts(texts)
        at = torch.full((len(texts),), 500)
        with torch.no_grad():
            found, expected = compiled(noised, at, condition), real(noised, at, condition)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert {tuple(given["hidden"].shape) for given in seen} == {(3, 120, families.WIDTH)}


@pytest.mark.parametrize("steps", [(0.0,), (1000.5,)])
def test_sigmas_that_are_none(folders: dict[str, Path], steps: tuple[float, ...]) -> None:
    spec = DiffusionSpec(resolve(str(folders["Sana"])), "", "snr", steps)
    with pytest.raises(InputError, match="is no noise of a flow model"):
        spec.build("cpu")


def test_another_resolution(folders: dict[str, Path]) -> None:
    """A flow transformer takes other sizes; the noise is of that shape."""
    model: Any = load_denoiser(resolve(str(folders["SD3"])))
    model.take_resolution(48)
    assert model.latent_shape == (16, 12, 12)
    with torch.no_grad():
        out = model.predict(latents_of(model, 1), torch.tensor([500.0]), model.encode_texts(["a"]))
    assert out.shape == (1, 16, 12, 12)
    with pytest.raises(InputError, match="resolution 36: this model takes multiples of 8 pixels"):
        model.take_resolution(36)
    with pytest.raises(InputError, match="has places for 128 pixels"):
        model.take_resolution(136)


def test_resolution_is_an_option_of_flow_models(folders: dict[str, Path]) -> None:
    """It is part of the scores' settings, where one is given."""
    source = settled(resolve(str(folders["Sana"])), resolution=64)
    spec = DiffusionSpec(source, "", "snr", (500.0,))
    assert spec.store_config()["resolution"] == 64
    assert spec.build("cpu").denoiser.latent_shape == (4, 32, 32)  # type: ignore[attr-defined]
    assert "resolution" not in DiffusionSpec(settled(source), "", "snr", (500.0,)).store_config()
    with pytest.raises(InputError, match="takes the images that it was trained on"):
        settled(resolve(str(folders["PixArt-alpha"])), resolution=64)


def test_no_prediction_type_of_a_flow_model(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"prediction_type epsilon: .* is a flow model"):
        settled(resolve(str(folders["SD3"])), "epsilon")


def test_the_guidance_is_that_of_networks_that_take_one(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """In a store's settings what the network is told."""
    for name, folder in folders.items():
        config = DiffusionSpec(settled(resolve(str(folder))), "", "snr", (500.0,)).store_config()
        told = getattr(models[name], "guidance", None)
        assert config.get("guidance") == told
        assert ("guidance" in config) is (name in GUIDED)


def test_a_distilled_model_says_so(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """FLUX by its family, in the log, the stores' settings and the report; turbo models by their name."""
    check_loadable(resolve(str(folders["FLUX.1-dev"])))
    assert "is distilled and was not trained without a text: its error of no text" in caplog.text
    spec = DiffusionSpec(resolve(str(folders["FLUX.1-dev"])), "", "snr", (500.0,))
    store = open_store(str(tmp_path), "flux", spec.store_config())
    assert evaluate({}, [store]).notes == [
        "flux is distilled and was not trained without a text: its normalised scores are less the error "
        "of no text anyway."
    ]
    assert store.config["unconditional"] is False
    digests = set[str]()
    caplog.clear()
    check_loadable(resolve(str(folders["SD3"])))
    assert "no text" not in caplog.text
    turbo = tmp_path / "sd3-turbo"
    turbo.symlink_to(folders["SD3"])
    check_loadable(resolve(str(turbo)))
    assert "is named as step-distilled ones are" in caplog.text
    spec = DiffusionSpec(resolve(str(turbo)), "", "snr", (500.0,))
    store = open_store(str(tmp_path), str(turbo), spec.store_config())
    assert "unconditional" not in store.config  # a name is not what scores depend on
    (note,) = evaluate({}, [store]).notes
    assert f"{turbo} is named as step-distilled ones are, which" in note
    index = Path(shutil.copytree(folders["FLUX.2-klein"], tmp_path / "klein")) / "model_index.json"
    for distilled in (False, True):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": distilled}))
        source = resolve(str(index.parent))
        store_config = DiffusionSpec(source, "", "snr", (500.0,)).store_config()
        assert store_config.get("unconditional", True) is not distilled
        digests.add(source.digest)
        model = load_denoiser(source)
        images = [model.generate("a", [5], 2, guidance)[0].tobytes() for guidance in (2.0, 9.0)]
        assert (images[0] == images[1]) is distilled  # a distilled one has no guidance
    assert len(digests) == 2


def test_timesteps_that_a_turbo_was_not_trained_at(caplog: pytest.LogCaptureFixture) -> None:
    """They are told, and nothing is where all were, or of models of other names."""
    tell_untrained("stabilityai/sdxl-turbo", (999, 749, 499, 249))
    tell_untrained("org/sd-turbine", (10, 110))
    assert not caplog.text
    tell_untrained("stabilityai/sd-turbo", (10, 249, 500))
    assert "2 of these 3 are others, such as 10 (--timestep-list 999 749 499 249)" in caplog.text


def test_a_guidance_that_settings_do_not_mention(folders: dict[str, Path], tmp_path: Path) -> None:
    """FLUX.2's network takes one then, FLUX.1's does not."""
    for name, expected in (("FLUX.2-dev", 1.0), ("FLUX.1-schnell", None)):
        folder = Path(shutil.copytree(folders[name], tmp_path / name))
        file = folder / "transformer" / "config.json"
        settings = json.loads(file.read_text())
        settings.pop("guidance_embeds")
        file.write_text(json.dumps(settings))
        source = settled(resolve(str(folder)))
        assert source.guidance == expected == load_denoiser(source).guidance  # type: ignore[attr-defined]


def test_weights_by_the_names_of_a_whole_language_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """As Z-Image's text encoder is published; what says the next word is left out."""
    folder = Path(shutil.copytree(folders["Z-Image"], tmp_path / "whole"))
    file = folder / "text_encoder" / "model.safetensors"
    plain = load_file(file)
    more = {f"model.{key}": value for key, value in plain.items()}
    more["lm_head.weight"] = plain["embed_tokens.weight"].clone()
    save_file(more, file, {"format": "pt"})
    check_loadable(resolve(str(folder)))
    one, two = (load_denoiser(resolve(str(f))) for f in (folder, folders["Z-Image"]))
    for key, value in one.encode_texts(TEXTS).items():
        assert torch.equal(value, two.encode_texts(TEXTS)[key])


def test_a_tokenizer_without_a_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["Z-Image"], tmp_path / "mute"))
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="its tokenizer has no chat_template"):
        check_loadable(resolve(str(folder)))


def test_a_vae_without_its_channels_means(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["Qwen-Image"], tmp_path / "three"))
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latents_std": [1.0, 0.5, 2.0]}))
    for check in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match=r"latents_std \[1.0, 0.5, 2.0\], not a number for"):
            check(resolve(str(folder)))


def lora_of(part: Any, ends: tuple[str, ...]) -> dict[str, Tensor]:
    """Of rank 2, of each module whose name ends so."""
    generator, found = torch.Generator().manual_seed(5), dict[str, Tensor]()
    for place, module in part.named_modules():
        if place.endswith(ends):
            down = torch.randn(2, module.in_features, generator=generator)
            up = torch.randn(module.out_features, 2, generator=generator)
            found |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    return found


@pytest.mark.parametrize("name", ["Qwen-Image", "Lumina2", "Z-Image", "FLUX.2-dev"])
def test_a_lora_of_the_transformer(
    name: str, folders: dict[str, Path], models: dict[str, Any], tmp_path: Path
) -> None:
    """In diffusers' format, merged to the weights of the pipeline's own."""
    pipeline, source = pipeline_of(folders[name]), resolve(str(folders[name]))
    network = lora_of(pipeline.transformer, ("to_q", "to_out.0", "add_k_proj", "to_add_out"))
    type(pipeline).save_lora_weights(tmp_path, transformer_lora_layers=network)
    check_loadable(source, [str(tmp_path)])
    merged: Any = load_denoiser(source, lora=str(tmp_path))
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    expected = pipeline.transformer.state_dict()
    expected = {key.replace(".base_layer", ""): value for key, value in expected.items()}
    plain = models[name].transformer.state_dict()
    for key, value in merged.transformer.state_dict().items():
        torch.testing.assert_close(value, expected[key])
        changed = key.removesuffix("weight") + "lora_A.weight" in network
        assert torch.equal(value, plain[key]) is not changed
    assert len(network) >= 8


@pytest.mark.parametrize("name", ["SD3", "FLUX.1-schnell"])
def test_a_lora_in_diffusers_format(
    name: str, folders: dict[str, Path], models: dict[str, Any], tmp_path: Path
) -> None:
    """Of the transformer and CLIP's text model, merged to the weights of the pipeline's own, and of the
    second text encoder; a U-Net takes none."""
    model, pipeline = models[name], pipeline_of(folders[name])
    network = lora_of(pipeline.transformer, ("to_q", "to_out.0", "add_k_proj", "to_add_out"))
    clip = lora_of(pipeline.text_encoder, ("q_proj",))
    second = lora_of(pipeline.text_encoder_2, ("q_proj", "SelfAttention.q"))
    type(pipeline).save_lora_weights(
        tmp_path, transformer_lora_layers=network, text_encoder_lora_layers=clip
    )
    source = resolve(str(folders[name]))
    check_loadable(source, [str(tmp_path)])
    merged: Any = load_denoiser(source, lora=str(tmp_path))
    pipeline.load_lora_weights(tmp_path)
    pipeline.fuse_lora()
    expected = pipeline.transformer.state_dict()
    expected = {k.replace(".base_layer", ""): v for k, v in expected.items()}
    plain = model.transformer.state_dict()
    for key, value in merged.transformer.state_dict().items():
        torch.testing.assert_close(value, expected[key])
        changed = key.removesuffix("weight") + "lora_A.weight" in network
        assert torch.equal(value, plain[key]) is not changed
    assert len(network) >= 10 and clip
    texts = merged.encode_texts(TEXTS[:1]), model.encode_texts(TEXTS[:1])
    assert not torch.allclose(*(text["pooled"] for text in texts))
    lora = next(tmp_path.glob("*.safetensors"))
    save_file(load_file(lora) | {f"text_encoder_2.{k}": v for k, v in second.items()}, lora)
    check_loadable(source, [str(tmp_path)])
    more: Any = load_denoiser(source, lora=str(tmp_path))
    before = model.text_encoders[1].state_dict()
    for key, value in more.text_encoders[1].state_dict().items():
        at = key.removesuffix("weight")
        if f"{at}lora_A.weight" in second:
            added = second[f"{at}lora_B.weight"] @ second[f"{at}lora_A.weight"]
            torch.testing.assert_close(value, before[key] + added)
        else:
            assert torch.equal(value, before[key])
    assert second
    with pytest.raises(InputError, match=r"LoRA of a transformer .* which a U-Net does not take"):
        check_loadable(resolve("shapes"), [str(tmp_path)])


def test_parts_of_two_models(folders: dict[str, Path], tmp_path: Path) -> None:
    """A T5 of another width is refused, before weights are loaded and when they are."""
    mixed = Path(shutil.copytree(folders["SD3"], tmp_path / "mixed"))
    shutil.rmtree(mixed / "text_encoder_3")
    shutil.copytree(folders["PixArt-alpha"] / "text_encoder", mixed / "text_encoder_3")
    for check in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match="texts are 32 wide, its transformer takes 64"):
            check(resolve(str(mixed)))


def test_a_scheduler_of_another_kind(folders: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders["SD3"], tmp_path / "other"))
    shutil.rmtree(other / "scheduler")
    shutil.copytree(folders["PixArt-alpha"] / "scheduler", other / "scheduler")
    for check in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match="is not that of a flow model"):
            check(resolve(str(other)))


@pytest.mark.parametrize("name", families.WRITERS)
def test_long_texts_are_counted(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """As many as the model itself says that it cuts."""
    texts = [*TEXTS[:2], "x" * 90, "y" * 200, "y" * 300, "z" * 700, " " * 90 + "X" * 30]
    cut = {text for text in texts if models[name].cuts(text)}
    assert texts[5] in cut and cut.isdisjoint(texts[:2])
    assert (texts[4] in cut) is (name not in READ_LONG)  # 302 tokens
    source = resolve(str(folders[name]))
    assert TextLimits(source).cut(texts) == cut
    assert tell_long_texts(source, texts) == len(cut)


@pytest.mark.parametrize("name", families.WRITERS)
def test_texts_that_are_the_same_to_a_model(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """In another case and with space around them, where its condition is the same."""
    texts = ["a Red cube ", "A red cube"]
    one, two = (models[name].encode_texts([text])["hidden"] for text in texts)
    same = one.shape == two.shape and torch.equal(one, two)
    assert same is (name.startswith(("PixArt", "Sana")) or "without" in name)
    read = TextLimits(resolve(str(folders[name]))).read(texts)
    assert (read[0] == read[1]) is same


@pytest.mark.parametrize("name", families.WRITERS)
def test_images_are_those_of_the_pipeline(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    """Diffusers' own, with this prompt, seeds, steps and guidance; each by its seed alone."""
    pipeline, model = pipeline_of(folders[name]), models[name]
    side, seeds = model.resolution, (5, 2**62 + 7)
    given = {"height": side, "width": side, "num_inference_steps": 3}
    given |= reference(name).asked | reference(name).guided
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    expected = pipeline(prompt=["a red Circle"] * 2, generator=generators, **given).images
    found = model.generate("a red Circle", seeds, steps=3, guidance=4.0)
    (alone,) = model.generate("a red Circle", seeds[1:], steps=3, guidance=4.0)
    pixels = [np.asarray(image, int) for image in (*found, alone)]
    for ours, theirs in zip(pixels, (*expected, expected[1]), strict=True):
        assert np.abs(ours - np.asarray(theirs, int)).max() <= 1
    assert np.abs(pixels[0] - pixels[1]).max() > 1
