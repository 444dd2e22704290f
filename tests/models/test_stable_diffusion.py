"""Stable Diffusion folders: prediction types, dtypes, variants, and folders that are broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models import families, loading
from diffitm.models.denoiser import Denoiser, select
from diffitm.models.folder import Folder
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import PairErrors, pair_errors
from tests import tiny

TEXTS = ["a red circle", "a blue square", ""]
PAIRS = torch.cartesian_prod(torch.arange(2), torch.arange(3))


def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def all_errors(model: Denoiser) -> PairErrors:
    plan = make_plan([10, 400, 900], model.latent_shape)
    latents, condition = model.encode_images(pixels()), model.encode_texts(TEXTS)
    return pair_errors(model, latents, condition, plan, PAIRS)


def test_attributes(sd: StableDiffusion) -> None:
    assert (sd.latent_shape, sd.resolution) == ((4, 8, 8), 32)
    assert sd.schedule.timesteps == 1000
    assert sd.encode_images(pixels()).shape == (2, 4, 8, 8)
    assert sd.encode_texts(TEXTS)["hidden"].shape == (3, 16, 32)
    parts = (sd.unet, sd.vae, sd.text_encoder)
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_long_texts_are_cut(sd: StableDiffusion) -> None:
    """To the encoder's length, so that the words beyond do not matter."""
    long = "a red circle and " * 20
    assert sd.encode_texts([long])["hidden"].shape == (1, 16, 32)
    found = sd.encode_texts([long, long + "a blue square"])["hidden"]
    assert torch.equal(found[0], found[1])


def test_images_come_from_their_seed(sd: StableDiffusion) -> None:
    """The same image alone and beside others; another seed and another text give another one."""
    many = sd.generate("a red circle", [0, 1], steps=3, guidance=3.0)
    assert [image.size for image in many] == [(32, 32)] * 2
    alone = sd.generate("a red circle", [1], steps=3, guidance=3.0)[0]
    difference = np.abs(np.asarray(alone, int) - np.asarray(many[1], int))
    assert difference.max() <= 1
    other = sd.generate("a blue square", [1], steps=3, guidance=3.0)[0]
    assert np.abs(np.asarray(alone, int) - np.asarray(other, int)).max() > 1
    assert np.abs(np.asarray(many[0], int) - np.asarray(many[1], int)).max() > 1


def test_images_are_those_of_diffusers(sd: StableDiffusion, sd_folder: Path) -> None:
    """A stock pipeline with DPM-Solver++, this prompt, seeds, steps and guidance."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 7)]
    expected = pipeline(
        ["a red circle"] * 2, num_inference_steps=2, guidance_scale=4.0, generator=seeds
    ).images
    found = sd.generate("a red circle", [5, 7], steps=2, guidance=4.0)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1


def test_posterior_sample(sd: StableDiffusion) -> None:
    """The mean by default; with a seed one sample, with the same noise whatever the batch."""
    mean = sd.encode_images(pixels())
    sample = sd.encode_images(pixels(), seed=3)
    torch.testing.assert_close(sd.encode_images(pixels()[1:], seed=3), sample[1:])
    assert not torch.allclose(sample, mean)
    assert not torch.allclose(sample, sd.encode_images(pixels(), seed=4))
    posterior = sd.vae.encode(pixels()).latent_dist
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(mean, 0.5 * posterior.mean)
    torch.testing.assert_close(sample, 0.5 * (posterior.mean + posterior.std * noise))


def test_latents_become_pixels(sd: StableDiffusion) -> None:
    """Without the VAE's scale, and within the bounds of pixels."""
    latents = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = sd.vae.decode(latents / 0.5).sample
    assert plain.abs().max() > 1 > plain.abs().min()
    torch.testing.assert_close(sd.decode(latents), plain.clamp(-1, 1))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_true_target_makes_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prediction: str
) -> None:
    """A U-Net that knows the latents and answers as the scheduler's config demands is never wrong,
    and one that answers with the noise is wrong unless noise is what is asked for."""
    model = StableDiffusion(Folder(str(tiny.write_sd(tmp_path / "m", prediction))))
    assert model.schedule.prediction == prediction
    latents = model.encode_images(pixels())[:1]
    abar = model.schedule.signal.double() ** 2

    def oracle(noised: Tensor, steps: Tensor, hidden: Tensor, **_: Any) -> tuple[Tensor]:
        kept = abar[steps].view(-1, 1, 1, 1)
        noise = (noised.double() - kept.sqrt() * latents) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        clean = latents.double().expand_as(noise)
        answers = {"epsilon": noise, "v_prediction": velocity, "sample": clean}
        return (answers[answer].float(),)

    monkeypatch.setattr(model, "unet", oracle)
    plan = make_plan([10, 400, 900], model.latent_shape)
    condition = model.encode_texts(["a red circle"])
    for answer in ("epsilon", "v_prediction", "sample"):
        found = pair_errors(model, latents, condition, plan, torch.tensor([[0, 0]])).l2
        if answer == prediction:
            assert found.max() < 1e-3
        else:
            assert found.min() > 0.05


def test_prediction_type_of_a_folder_with_another_sampler(tmp_path: Path) -> None:
    """The settings of PNDM, as Stable Diffusion's own folders have them, are none of DDPM's."""
    folder = tiny.write_sd(tmp_path / "m")
    file = folder / "scheduler" / "scheduler_config.json"
    pndm = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | pndm))
    model = StableDiffusion(Folder(str(folder)))
    table = model.scheduler.alphas_cumprod
    model.take_prediction("v_prediction")
    assert model.schedule.prediction == model.sampler().config.prediction_type == "v_prediction"
    torch.testing.assert_close(model.scheduler.alphas_cumprod, table, rtol=0, atol=0)


def test_prediction_type_changes_the_error_only(tmp_path: Path, sd: StableDiffusion) -> None:
    """The same weights under v-prediction: other errors, the same latents and texts."""
    other = StableDiffusion(Folder(str(tiny.write_sd(tmp_path / "v", "v_prediction"))))
    assert torch.equal(other.encode_images(pixels()), sd.encode_images(pixels()))
    assert not torch.allclose(all_errors(other).l2, all_errors(sd).l2, rtol=1e-2)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(sd_folder: Path, sd: StableDiffusion, dtype: str) -> None:
    """Weights in half precision, errors still float32 and close to the whole one's."""
    model = loading.load_denoiser(loading.resolve(str(sd_folder)), dtype)
    assert next(model.unet.parameters()).dtype == loading.DTYPES[dtype]
    assert model.encode_images(pixels()).dtype == torch.float32
    found, expected = all_errors(model), all_errors(sd)
    for kind in ("l2", "l1", "huber"):
        value = getattr(found, kind)
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        torch.testing.assert_close(value, getattr(expected, kind), rtol=0.02, atol=0)
    # Norms near 16 are kept finer than fp16's steps of 1/64 there.
    assert len(found.l2.unique()) == found.l2.numel()


def test_variant_files(tmp_path: Path, sd_folder: Path, sd: StableDiffusion) -> None:
    """A folder that holds .fp16. files alone: loaded as that variant, refused without it."""
    folder = tiny.write_sd(tmp_path / "half", variant="fp16")
    names = {p.name for p in folder.rglob("*.safetensors")}
    assert names == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}
    source = loading.resolve(str(folder))
    model = loading.load_denoiser(source, "fp32", variant="fp16")
    torch.testing.assert_close(all_errors(model).l2, all_errors(sd).l2, rtol=0.01, atol=0)
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_denoiser(source)
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_denoiser(loading.resolve(str(sd_folder)), variant="fp16")


def test_digest_is_of_the_weights(tmp_path: Path, sd_folder: Path) -> None:
    """The same wherever the folder lies; another for other weights or another scheduler."""
    digest = loading.resolve(str(sd_folder)).digest
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    assert loading.resolve(str(copy)).digest == digest
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("epsilon", "v_prediction"))
    assert loading.resolve(str(copy)).digest != digest
    other = tiny.write_sd(tmp_path / "other", seed=1)
    assert loading.resolve(str(other)).digest != digest


def test_digest_is_of_what_is_loaded(tmp_path: Path, sd_folder: Path) -> None:
    """Notes, a system's files and weights of another variant or format change nothing; a vocabulary does."""
    digest = loading.resolve(str(sd_folder)).digest
    copy = Path(shutil.copytree(sd_folder, tmp_path / "copy"))
    for name in (
        "README.md",
        "unet/.DS_Store",
        "unet/README.md",
        "unet/._config.json",
        "vae/LICENSE.txt",
        "unet/notes.txt",
        "scheduler/config (copy).json",
        "vae/lora.safetensors",
    ):
        (copy / name).write_text("x")
    unet = copy / "unet" / "diffusion_pytorch_model.safetensors"
    half = unet.with_name("diffusion_pytorch_model.fp16.safetensors")
    half.write_bytes(b"half")
    unet.with_name("diffusion_pytorch_model.bin").write_bytes(b"other")
    assert loading.resolve(str(copy)).digest == digest
    assert loading.resolve(str(copy), variant="fp16").digest != digest
    before = loading.resolve(str(copy), variant="fp16").digest
    half.write_bytes(b"changed")
    assert loading.resolve(str(copy)).digest == digest
    assert loading.resolve(str(copy), variant="fp16").digest != before
    (copy / "tokenizer" / "merges.txt").write_text("#version: 0.2\nx y")
    assert loading.resolve(str(copy)).digest != digest


@pytest.fixture
def broken(tmp_path: Path, sd_folder: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "broken"))


def test_folder_without_index(broken: Path) -> None:
    (broken / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"no model_index\.json") as raised:
        loading.resolve(str(broken))
    assert str(broken) in str(raised.value)


@pytest.mark.parametrize("index", ["{", "{}", "[]"])
def test_folder_with_a_bad_index(broken: Path, index: str) -> None:
    (broken / "model_index.json").write_text(index)
    with pytest.raises(InputError, match="names no _class_name") as raised:
        loading.resolve(str(broken))
    assert str(broken) in str(raised.value)


def test_folder_that_lacks_parts(broken: Path) -> None:
    shutil.rmtree(broken / "vae")
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(InputError, match="lacks vae, tokenizer") as raised:
        loading.resolve(str(broken))
    assert str(broken) in str(raised.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("harm", ["cut", "empty", "missing"])
def test_broken_weights(broken: Path, part: str, harm: str) -> None:
    """A download that broke off: an error with the folder's path, not a traceback."""
    (file,) = (broken / part).glob("*.safetensors")
    if harm == "missing":
        file.unlink()
    else:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2] if harm == "cut" else b"")
    source = loading.resolve(str(broken))
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        loading.load_denoiser(source)
    assert str(broken) in str(raised.value)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor(broken: Path, part: str) -> None:
    """Nothing is filled in at random."""
    (file,) = (broken / part).glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[len(tensors) // 2]
    tensors[f"{name}_renamed"] = tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_denoiser(loading.resolve(str(broken)))


def test_weights_of_another_shape(broken: Path) -> None:
    """A config that does not fit its weights is an error too."""
    config = broken / "unet" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "cross_attention_dim": 48}))
    with pytest.raises(InputError, match="cannot be loaded"):
        loading.load_denoiser(loading.resolve(str(broken)))


@pytest.mark.parametrize("name", ["shaeps", "./none", "/none/at/all", "a b/c", "~/none"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(InputError, match="neither a folder nor a Hub id") as raised:
        loading.resolve(name)
    assert repr(name) in str(raised.value)


def test_hub_that_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, an id that is not in the cache."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(InputError, match=r"'org/none': no such folder.* no connection"):
        loading.resolve("org/none")


def test_hub_commit_is_the_digest(
    tmp_path: Path, sd_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's snapshot folder is named by the commit, which identifies the weights."""
    import huggingface_hub

    commit = Path(shutil.copytree(sd_folder, tmp_path / "snapshots" / "c0ffee"))
    found = str(commit / "model_index.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: found)
    source = loading.resolve("org/name")
    assert (source.revision, source.digest) == ("c0ffee", "c0ffee")
    assert source.family == "StableDiffusionPipeline"


def rename_family(folder: Path, name: str) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", name))


def test_unknown_family(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be run is listed, before anything is hashed; of a Hub id, too."""
    rename_family(broken, "StableDifusionPipeline")
    text = (
        "unknown kind of diffusion model 'StableDifusionPipeline'; did you mean "
        "'StableDiffusionPipeline'"
    )
    with pytest.raises(InputError, match=text):
        loading.resolve(str(broken))
    monkeypatch.setattr(loading, "from_hub", lambda *_: broken / "model_index.json")
    with pytest.raises(InputError, match=f"--teacher 'org/name': {text}"):
        loading.resolve("org/name", "--teacher")


def test_a_family_of_ones_own(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line tells which class runs it and of which parts a score depends; other weights are another
    model."""
    rename_family(broken, "OurPipeline")
    family = families.Family("tests.tiny:Ours", dict.fromkeys(("unet", "vae")))
    monkeypatch.setitem(families.FAMILIES, "OurPipeline", family)
    monkeypatch.setattr(tiny, "Ours", StableDiffusion, raising=False)
    first = loading.resolve(str(broken))
    assert isinstance(loading.load_denoiser(first), StableDiffusion)
    (broken / "vae" / "config.json").write_text("{}")
    assert loading.resolve(str(broken)).digest != first.digest
    shutil.rmtree(broken / "vae")
    with pytest.raises(InputError, match="the folder lacks vae"):
        loading.resolve(str(broken))


def test_unknown_dtype(sd_folder: Path) -> None:
    with pytest.raises(InputError, match="dtype 'int8' is not one of fp32, bf16, fp16"):
        loading.load_denoiser(loading.resolve(str(sd_folder)), "int8")


def test_select() -> None:
    """Rows of a condition with several tensors stay together."""
    whole = {"hidden": torch.arange(6.0).view(3, 2), "pooled": torch.arange(3.0).view(3, 1)}
    chosen = select(whole, torch.tensor([2, 0, 2]))
    assert chosen["pooled"].flatten().tolist() == [2, 0, 2]
    assert chosen["hidden"].tolist() == [[4, 5], [0, 1], [4, 5]]


def test_predict_takes_the_condition(sd: StableDiffusion) -> None:
    """The U-Net sees the text: two texts give two predictions for one latent."""
    noised = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(2, 1, 1, 1)
    with torch.inference_mode():
        out = sd.predict(noised, torch.tensor([500, 500]), sd.encode_texts(TEXTS[:2]))
    assert out.shape == (2, 4, 8, 8)
    assert not torch.allclose(out[0], out[1])
