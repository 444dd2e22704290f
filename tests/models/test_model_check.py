"""Folders of models whose parts are missing, broken or of two models: found before anything is scored."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffitm
from diffitm.core.errors import InputError
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.model_check import check_loadable, settled
from diffitm.models.parts import _check_merges
from diffitm.models.weight_files import read_shapes
from diffitm.scoring.specs import DiffusionSpec
from tests import tiny

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(tmp_path: Path, sd_folder: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(sd_folder, tmp_path / "model"))


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    return tiny.write_sdxl(tmp_path / "sdxl")


def change(file: Path, **settings: Any) -> None:
    """None takes a setting away."""
    values = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def only(folder: Path, *names: str) -> None:
    """Leave no other files in the folder."""
    for file in folder.iterdir():
        if file.name not in names:
            file.unlink()


def rewrite(file: Path, alter: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    save_file(alter(load_file(file)), file, metadata={"format": "pt"})


def without_bias(tensors: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tensors.items() if key != "conv_in.bias"}


UNET = "unet/diffusion_pytorch_model.safetensors"
BREAKS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no words": (lambda f: only(f / "tokenizer", "tokenizer_config.json"),
                 "tokenizer has neither tokenizer.json nor vocab.json with merges.txt"),
    "words of another model": (lambda f: change(f / "text_encoder" / "config.json", vocab_size=49408),
                               "text_encoder .*another shape: .*token_embedding|635 words"),
    "longer texts": (lambda f: change(f / "tokenizer" / "tokenizer_config.json", model_max_length=99),
                     "its tokenizer gives texts 99 tokens, its text encoder takes 16"),
    "words of nothing": (lambda f: (f / "tokenizer" / "tokenizer.json").write_text("{}"),
                         "its tokenizer cannot be read: KeyError: 'added_tokens'"),
    "pointer": (lambda f: (f / UNET).write_text(POINTER), "safetensors is a pointer of Git LFS"),
    "pointer of settings": (lambda f: (f / "unet" / "config.json").write_text(POINTER), "Git LFS"),
    "empty": (lambda f: (f / UNET).write_bytes(b""), "safetensors is empty"),
    "cut": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:999]), "is no whole safetensors"),
    "web page": (lambda f: (f / UNET).write_text("<html>"), "a page of a web site"),
    "no weights": (lambda f: (f / UNET).unlink(), "its unet has no weights"),
    "no settings": (lambda f: (f / "vae" / "config.json").unlink(), r"there is no .*vae/config\.json"),
    "broken settings": (lambda f: (f / "vae" / "config.json").write_text("{"), "is no JSON in UTF-8"),
    "byte order mark": (lambda f: (f / "vae" / "config.json").write_text(
        "\ufeff" + (f / "vae" / "config.json").read_text()), "begins with a byte order mark"),
    "a tensor less": (lambda f: rewrite(f / UNET, without_bias),
                      r"weights of its unet .*tensors 1 are missing: conv_in\.bias"),
    "another shape": (lambda f: rewrite(f / UNET, lambda t: t | {"conv_in.bias": torch.zeros(3)}),
                      r"1 have another shape: conv_in\.bias \[3\] instead of \[32\]"),
    "U-Net of another model": (lambda f: change(f / "unet" / "config.json", cross_attention_dim=48), "unet"),
    "other betas": (lambda f: change(f / "scheduler" / "scheduler_config.json",
                                     _class_name="FlowMatchEulerDiscreteScheduler"), "gives no betas"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_broken_folders(what: str, folder: Path) -> None:
    """The message names the part or the file; what loads the model refuses it, too."""
    harm, text = BREAKS[what]
    harm(folder)
    with pytest.raises(InputError, match=text) as raised:
        check_loadable(resolve(str(folder)))
    assert str(folder) in str(raised.value) and len(str(raised.value)) < 1000
    with pytest.raises(InputError):
        load_denoiser(resolve(str(folder)))


def fewer_merges(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_text("\n".join(merges.read_text().splitlines()[:20]))


def strange_merges(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    merges = folder / "tokenizer" / "merges.txt"
    merges.write_bytes(merges.read_bytes() + b"\xe9 \xe9\n")


WORDS, BETAS = "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"
# Taken as something else before, without a word, or a traceback of the check.
SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no blocks": ("vae/config.json", {"down_block_types": None}, "is down_block_types missing"),
    "no scale": ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor 'x', not a number above 0"),
    "shift": ("vae/config.json", {"shift_factor": 0.1}, r"shift_factor 0\.1, which is not supported"),
    "means": ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean .* is not supported"),
    "length 0": (WORDS, {"model_max_length": 0}, "gives model_max_length 0, not the number of tokens"),
    "length in words": (WORDS, {"model_max_length": "77"}, "gives model_max_length '77', not the number"),
    "negative length": (WORDS, {"model_max_length": -1}, "gives model_max_length -1, not the number"),
    "CogVideoX": (BETAS, {"_class_name": "CogVideoXDDIMScheduler"}, "CogVideoXDDIMScheduler gives no betas"),
    "shifted": (BETAS, {"snr_shift_scale": 3.0}, r"gives snr_shift_scale 3\.0"),
    "ScoreSde": (BETAS, {"_class_name": "ScoreSdeVeScheduler"}, "ScoreSdeVeScheduler gives no betas"),
    "beta above 1": (BETAS, {"beta_start": 1.5}, r"gives beta_start 1\.5, not a number between 0 and 1"),
    "few betas": (BETAS, {"trained_betas": [0.1, 0.2]}, "gives 2 betas for num_train_timesteps 1000"),
    "wild betas": (BETAS, {"trained_betas": [2.0] * 1000}, "betas are not all between 0 and 1"),
    "steps in words": (BETAS, {"num_train_timesteps": "1000"}, "num_train_timesteps '1000', not a number"),
    "x0": (BETAS, {"prediction_type": "x0"}, "prediction_type 'x0', which is not one of epsilon"),
}  # fmt: skip


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_mean_something_else(what: str, folder: Path) -> None:
    file, settings, text = SETTINGS[what]
    change(folder / file, **settings)
    with pytest.raises(InputError, match=text):
        check_loadable(resolve(str(folder)))
    with pytest.raises(InputError):
        load_denoiser(resolve(str(folder)))


def test_settings_that_are_null(folder: Path) -> None:
    """Are as if they were not there: the log says what is taken, and that is loaded."""
    expected: Any = load_denoiser(resolve(str(folder))).schedule  # type: ignore[attr-defined]
    file = folder / BETAS
    values = json.loads(file.read_text()) | {"prediction_type": None, "beta_start": None}
    file.write_text(json.dumps(values))
    source = settled(resolve(str(folder)))
    check_loadable(source)
    found: Any = load_denoiser(source).schedule  # type: ignore[attr-defined]
    assert found.prediction == "epsilon" and not torch.equal(found.sigma, expected.sigma)
    vae = folder / "vae" / "config.json"
    vae.write_text(json.dumps(json.loads(vae.read_text()) | {"scaling_factor": None}))
    with pytest.raises(InputError, match="scaling_factor None, not a number above 0"):
        check_loadable(source)


def test_a_scheduler_that_is_not_known(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder / BETAS, _class_name="MyScheduler")
    check_loadable(resolve(str(folder)))
    assert "its scheduler MyScheduler is not known here; DDPM's schedule" in caplog.text
    caplog.clear()
    change(folder / BETAS, _class_name="LCMScheduler")
    check_loadable(resolve(str(folder)))
    assert not caplog.text


def test_more_tensors_than_the_config_asks_for(folder: Path) -> None:
    """Are refused: a config of another model would go unseen. What is known to change nothing is not."""
    words = folder / "text_encoder" / "model.safetensors"
    litter = {"text_model.embeddings.position_ids": torch.zeros(1), "logit_scale": torch.zeros(1)}
    rewrite(words, lambda t: t | litter)
    check_loadable(resolve(str(folder)))
    settings = folder / "text_encoder" / "config.json"
    layers = json.loads(settings.read_text())["num_hidden_layers"]
    change(settings, num_hidden_layers=layers - 1)
    with pytest.raises(
        InputError, match=rf"text_encoder .* more are in the file: encoder\.layers\.{layers - 1}"
    ):
        check_loadable(resolve(str(folder)))
    change(settings, num_hidden_layers=layers)
    change(folder / "vae" / "config.json", use_quant_conv=False)
    with pytest.raises(InputError, match=r"its vae .* 2 more are in the file: quant_conv\."):
        check_loadable(resolve(str(folder)))


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (fewer_merges, r"merges\.txt makes .* in vocab\.json"),
        (strange_merges, r"merges\.txt is not in UTF-8"),
    ],
)
def test_merges_that_make_no_words(
    harm: Callable[[Path], None], text: str, folder: Path, tmp_path: Path
) -> None:
    """Gave other tokens before; whole ones are taken without a tokenizer.json."""
    whole = Path(shutil.copytree(folder, tmp_path / "whole"))
    (whole / "tokenizer" / "tokenizer.json").unlink()
    check_loadable(resolve(str(whole)))
    harm(folder)
    for call in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match=text):
            call(resolve(str(folder)))


def test_the_published_merges_make_the_published_words(tmp_path: Path) -> None:
    """Those of OpenAI's CLIP, as open_clip has them."""
    import open_clip

    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.encoder))
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    _check_merges(tmp_path)


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_a_tokenizer_without_words(part: str, sdxl: Path) -> None:
    """Scored with a vocabulary of three before; both of an SDXL count."""
    check_loadable(resolve(str(sdxl)))
    only(sdxl / part, "tokenizer_config.json", "special_tokens_map.json")
    for call in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match=rf"{part} has neither tokenizer\.json nor"):
            call(resolve(str(sdxl)))


def test_a_tokenizer_without_settings(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Takes the text encoder's length, which is said."""
    plain = load_denoiser(resolve(str(folder))).encode_texts(["a red circle", ""])
    (folder / "tokenizer" / "tokenizer_config.json").unlink()
    source = resolve(str(folder))
    check_loadable(source)
    assert "has no tokenizer_config.json: texts have 16 tokens" in caplog.text
    found = load_denoiser(source).encode_texts(["a red circle", "", "a " * 100])
    assert found["hidden"].shape[1] == plain["hidden"].shape[1]


def test_what_a_tokenizer_does_not_say(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Is said as where there is no file of settings, and so is a length below the encoder's."""
    change(folder / WORDS, pad_token=None)
    check_loadable(resolve(str(folder)))
    assert "tokenizer_config.json does not say all, so there is taken: pad_token" in caplog.text
    (folder / WORDS).write_text("{}")
    check_loadable(resolve(str(folder)))
    assert "model_max_length 16" in caplog.text
    caplog.clear()
    change(folder / WORDS, model_max_length=8, pad_token="!")
    check_loadable(resolve(str(folder)))
    assert "model_max_length 8 tokens, its text encoder takes 16: texts are cut" in caplog.text
    assert "does not say all" not in caplog.text


def test_a_model_of_two(folder: Path, sdxl: Path) -> None:
    shutil.rmtree(folder / "unet")
    shutil.copytree(sdxl / "unet", folder / "unet")
    with pytest.raises(InputError, match="its texts are 32 wide, its U-Net takes 64: parts of two"):
        check_loadable(resolve(str(folder)))


def test_weights_that_a_gpu_has_no_room_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Are told before a byte of them is loaded, by what is free."""
    source = check_loadable(resolve(str(folder)))
    parts = ("unet", "vae", "text_encoder")
    loaded = load_denoiser(source)
    counts = {part: sum(p.numel() for p in getattr(loaded, part).parameters()) for part in parts}
    assert dict(source.sizes) == counts
    total = sum(counts.values())
    assert (source.memory("fp32"), source.memory("fp16")) == (4 * total, 2 * total)
    kept = replace(source, upcast=True)
    assert kept.memory("bf16") == 2 * total + 2 * counts["vae"]
    card = {"free": 2 * total - 1}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (card["free"], 80 * 10**9))
    with pytest.raises(
        InputError, match=r"are .* MB in fp16, of the GPU's 80\.0 GB .* MB are free"
    ):
        load_denoiser(source, "fp16", "cuda")
    card["free"] += 1
    with pytest.raises(InputError) as found:  # there is no GPU here
        load_denoiser(source, "fp16", "cuda")
    assert "are free" not in found.value.message
    # Of a model before this one, in the same process: torch keeps its memory, but not for it.
    card["free"] -= total
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * total)
    for held, fits in ((2 * total, True), (2 * total + 1, False)):
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _, held=held: held)
        with pytest.raises(InputError) as found:
            load_denoiser(source, "fp16", "cuda")
        assert ("are free" not in found.value.message) is fits


def test_a_model_of_inpainting(folder: Path) -> None:
    change(folder / "unet" / "config.json", in_channels=9)
    rewrite(folder / UNET, lambda t: t | {"conv_in.weight": torch.zeros(32, 9, 3, 3)})
    for call in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match=r"takes 9 channels, its VAE gives 4.*inpainting"):
            call(resolve(str(folder)))


def test_variants_of_some_parts(folder: Path, tmp_path: Path) -> None:
    """Each part's weights of the variant where it has some, else its plain ones, as diffusers does."""
    whole = load_denoiser(resolve(str(folder)))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    source = resolve(str(folder))
    for call in (check_loadable, load_denoiser):
        with pytest.raises(
            InputError, match="its unet has no weights without a variant: give --variant fp16"
        ):
            call(source)
        with pytest.raises(
            InputError, match="no part has weights of the variant bf16; there are: fp16"
        ):
            call(source, variant="bf16")
    check_loadable(source, variant="fp16")
    mixed = load_denoiser(source, variant="fp16")
    for name, value in whole.unet.state_dict().items():  # type: ignore[attr-defined]
        torch.testing.assert_close(mixed.unet.state_dict()[name], value)  # type: ignore[attr-defined]


def test_unused_files_are_not_opened(folder: Path) -> None:
    """A broken file that no option reads is no error."""
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"x")
    (folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"x")
    (folder / "notes.safetensors").write_bytes(b"")
    check_loadable(resolve(str(folder)))


def test_shards_and_pickles(folder: Path) -> None:
    """Are opened as well."""
    tensors = load_file(folder / UNET)
    (folder / UNET).unlink()
    torch.save(tensors, folder / "unet" / "diffusion_pytorch_model.bin")
    check_loadable(resolve(str(folder)))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_text(POINTER)
    with pytest.raises(InputError, match=r"model\.bin is a pointer of Git LFS"):
        check_loadable(resolve(str(folder)))


def test_embedded_and_other_families(sdxl: Path, tmp_path: Path) -> None:
    check_loadable(resolve("shapes"))
    check_loadable(resolve(str(tiny.write_dit(tmp_path / "dit"))))


def test_older_attention_of_a_vae(folder: Path) -> None:
    """Is renamed by diffusers, so it is no error."""
    names = {
        ".to_q.": ".query.",
        ".to_k.": ".key.",
        ".to_v.": ".value.",
        ".to_out.0.": ".proj_attn.",
    }

    def older(tensors: dict[str, Any]) -> dict[str, Any]:
        for new, old in names.items():
            tensors = {key.replace(new, old): value for key, value in tensors.items()}
        return tensors

    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", older)
    check_loadable(resolve(str(folder)))
    load_denoiser(resolve(str(folder)))


# What is no folder of diffusers' layout.


def test_a_folder_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--tiny"
    for commit in ("aaa", "bbb"):
        shutil.copytree(folder, cache / "snapshots" / commit)
    change(cache / "snapshots" / "aaa" / "scheduler" / "scheduler_config.json", beta_end=0.5)
    with pytest.raises(
        InputError, match="the Hub's cache with 2 commits, none of which is its main"
    ):
        resolve(str(cache))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    assert resolve(str(cache)).digest == resolve(str(folder)).digest
    load_denoiser(resolve(str(cache)))


def test_a_byte_order_mark_before_the_index(folder: Path, sdxl: Path) -> None:
    """Is no matter."""
    for model in (folder, sdxl):
        index = model / "model_index.json"
        index.write_text("\ufeff" + index.read_text())
        load_denoiser(resolve(str(model)))
        check_loadable(resolve(str(model)))


def test_an_index_that_was_not_fetched(folder: Path) -> None:
    (folder / "model_index.json").write_text(POINTER)
    with pytest.raises(InputError, match="a pointer of Git LFS"):
        resolve(str(folder))


@pytest.mark.parametrize("name", ["sd.safetensors", "sd.ckpt"])
def test_no_model_in_one_file(name: str, tmp_path: Path) -> None:
    """What is wrong with the file is said; of its folder, that the file can be given."""
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(InputError, match=rf"{name}' is|{name}': .*{name} is no"):
        resolve(str(tmp_path / name))
    with pytest.raises(InputError, match=rf"no model_index\.json .*but {name}: give that file"):
        resolve(str(tmp_path))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(InputError, match="is a pointer of Git LFS"):
        resolve(str(tmp_path / name))


def test_a_folder_above_or_of_a_clip(folder: Path) -> None:
    with pytest.raises(InputError, match="its model has one"):
        resolve(str(folder.parent))
    with pytest.raises(InputError, match="but a CLIP's open_clip_config"):
        resolve(str(SHAPES / "clip"))


# What a scheduler's config does not say.


@pytest.fixture
def silent(folder: Path) -> Path:
    """Without a prediction_type, as Stable Diffusion 1's published config is."""
    change(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    return folder


def test_no_prediction_type(silent: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = resolve(str(silent))
    check_loadable(settled(source))
    assert (
        "does not say all, so there is taken: prediction_type epsilon (--prediction-type"
        in caplog.text
    )
    caplog.clear()
    check_loadable(settled(source, "v_prediction"))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_no_betas(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = folder / "scheduler" / "scheduler_config.json"
    check_loadable(resolve(str(folder)))
    assert not caplog.text
    change(file, beta_start=None, beta_end=None, beta_schedule=None, num_train_timesteps=None)
    check_loadable(resolve(str(folder)))
    for text in ("beta_start 0.0001", "beta_end 0.02", "beta_schedule linear", "timesteps 1000"):
        assert text in caplog.text


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "attention_head_dim", "8"),
        ("vae", "scaling_factor", "0.18215"),
        ("text_encoder", "hidden_act", "quick_gelu"),
    ],
)
def test_what_no_shape_shows(
    part: str, key: str, value: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A default that would go unseen is said."""
    check_loadable(resolve(str(folder)))
    assert not caplog.text
    change(folder / part / "config.json", **{key: None})
    check_loadable(resolve(str(folder)))
    assert f"{part}/config.json does not say all, so there is taken: {key} {value}" in caplog.text


def test_no_size_of_latents(folder: Path) -> None:
    change(folder / "unet" / "config.json", sample_size=None)
    for call in (check_loadable, load_denoiser):
        with pytest.raises(InputError, match="gives sample_size None, not the side of its latents"):
            call(resolve(str(folder)))


def test_a_prediction_type_of_ones_own(silent: Path, tmp_path: Path) -> None:
    """Gives the model that a folder which says it gives, and is in a store's name only where it changes
    something."""
    other = Path(shutil.copytree(silent, tmp_path / "other"))
    change(other / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    source = resolve(str(silent))
    loaded: Any = load_denoiser(settled(source, "v_prediction"))
    expected: Any = load_denoiser(resolve(str(other)))
    assert loaded.schedule.prediction == expected.schedule.prediction == "v_prediction"
    assert loaded.sampler().config.prediction_type == "v_prediction"

    def config(given: str | None) -> dict[str, Any]:
        return DiffusionSpec(settled(source, given), "r", "paper", (1,)).store_config()

    assert config(None) == config("epsilon") and "prediction_type" not in config(None)
    assert config("v_prediction")["prediction_type"] == "v_prediction"


def test_a_prediction_type_from_python(silent: Path) -> None:
    import numpy as np

    image = np.zeros((32, 32, 3), np.uint8)
    plain, other = (
        diffitm.load_scorer(str(silent), timesteps=2, prediction_type=given)
        for given in (None, "v_prediction")
    )
    assert not np.allclose(plain.errors(image, "a cat"), other.errors(image, "a cat"))


# The dtype of the VAE.


@pytest.mark.parametrize("write", [tiny.write_sd, tiny.write_sdxl, tiny.write_dit])
@pytest.mark.parametrize("said", [True, False])
def test_a_vae_that_overflows(write: Callable[[Path], Path], said: bool, tmp_path: Path) -> None:
    """Stays in float32 where its config says so, in every family; its scores have a store of their own,
    except for SDXL, which never was otherwise."""
    folder = write(tmp_path / "model")
    change(folder / "vae" / "config.json", force_upcast=said)
    source = settled(resolve(str(folder)))
    model: Any = load_denoiser(source, "bf16")
    assert model.vae.dtype == (torch.float32 if said else torch.bfloat16)
    assert model.encode_images(torch.zeros(1, 3, 32, 32)).isfinite().all()

    def config(dtype: str) -> dict[str, Any]:
        return DiffusionSpec(source, "r", "paper", (1,), dtype=dtype).store_config()

    assert ("vae" in config("bf16")) == (said and write is not tiny.write_sdxl)
    assert "vae" not in config("fp32")


def test_images_of_a_model_in_half_precision(folder: Path) -> None:
    """The pipeline's VAE is in float32, its U-Net is not."""
    model = load_denoiser(resolve(str(folder)), "bf16")
    assert model.generate("a cat", [0], 2, 5.0)[0].size == (32, 32)


def test_files_beside_the_weights_that_nothing_loads(folder: Path) -> None:
    """As the Hub's VAEs have their older form beside them, or a Mac its notes."""
    digest = resolve(str(folder)).digest
    (folder / "vae" / "sdxl_vae.safetensors").write_bytes(b"other names")
    (folder / "text_encoder" / "openvino_model.bin").write_bytes(b"no pickle")
    (folder / "unet" / "diffusion_pytorch_model (1).safetensors").write_bytes(b"a copy")
    (folder / "unet" / "._config.json").write_bytes(b"\0\5\x16\7")
    source = resolve(str(folder))
    check_loadable(source)
    load_denoiser(source)
    assert source.digest == digest


def test_a_variant_in_the_older_format_is_what_is_checked_and_named(folder: Path) -> None:
    """diffusers takes fp16.bin before a plain .safetensors, so its content is what scores depend on."""
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    half = unet.with_name("diffusion_pytorch_model.fp16.bin")
    tensors = {key: value.half() for key, value in load_file(unet).items()}
    torch.save(tensors, half)
    first = resolve(str(folder), variant="fp16")
    check_loadable(first, variant="fp16")
    torch.save({key: value * 0 for key, value in tensors.items()}, half)
    second = resolve(str(folder), variant="fp16")
    assert first.digest != second.digest
    assert not load_denoiser(second, variant="fp16").unet.conv_in.weight.any()
    half.write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.fp16\.bin"):
        check_loadable(resolve(str(folder), variant="fp16"), variant="fp16")


def test_settings_that_begin_with_errors(folder: Path) -> None:
    """Are no page of a web site that says there was one."""
    file = folder / "tokenizer" / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({"errors": "replace", **settings}))
    check_loadable(resolve(str(folder)))


def test_the_config_of_a_whole_clip(folder: Path) -> None:
    file = folder / "text_encoder" / "config.json"
    inner = json.loads(file.read_text())
    file.write_text(json.dumps({"model_type": "clip", "text_config": inner}))
    check_loadable(resolve(str(folder)))


def test_a_header_whose_length_reads_as_a_tag(tmp_path: Path) -> None:
    """15,392 bytes of header are b' <' to the eye, and no page of a web site."""
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, file, metadata={"about": "x" * 15_392})
    more = int.from_bytes(file.read_bytes()[:8], "little") - 15_392
    save_file({"w": torch.ones(2)}, file, metadata={"about": "x" * (15_392 - more)})
    assert file.read_bytes()[:2] == b" <"
    assert read_shapes(file) == {"w": (2,)}
