"""Weights of the Hub: the driver fetches what is read, once; workers elsewhere read its mirror."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file

from diffitm.commands import weights
from diffitm.core import outside, storage
from diffitm.core.errors import InputError, Unavailable
from diffitm.distributed import session
from diffitm.models import clip, hub_weights
from diffitm.models.causal_lm import LanguageModel, resolve_language_model
from diffitm.models.embedded import SHAPES
from diffitm.models.hub_weights import needed
from diffitm.models.loading import load_denoiser, resolve
from tests import tiny_language
from tests.hub import COMMIT, REPO, TEMPLATE, Hub

SD = [
    "model_index.json", "README.md", "v1.safetensors",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/config.json", "text_encoder/model.fp16.safetensors",
    "text_encoder/model.safetensors", "text_encoder/flax_model.msgpack",
    "vae/config.json", "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.fp16.bin",
    "tokenizer/merges.txt", "safety_checker/model.safetensors",
]  # fmt: skip
LLM = [
    "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "model.safetensors.index.fp16.json",
    "model.fp16-00001-of-00001.safetensors", "tokenizer.json", "original/consolidated.00.pth",
]  # fmt: skip


def test_what_is_read_of_a_repository() -> None:
    """No copies in other formats or precisions, nothing of parts that are not used."""
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    assert sorted(needed(SD, parts)) == [
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/merges.txt",
        "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json", "vae/diffusion_pytorch_model.bin",
    ]  # fmt: skip
    assert sorted(n for n in needed(SD, parts, "fp16") if "model" in n) == [
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.bin",
    ]
    assert sorted(needed(LLM, ("",))) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json",
    ]  # fmt: skip
    assert [n for n in needed(LLM, ("",), "fp16") if "safetensors" in n] == [
        "model.safetensors.index.fp16.json",
        "model.fp16-00001-of-00001.safetensors",
    ]


def move_away(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on this is another machine: the Hub is not to be asked, its cache is empty."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    shutil.rmtree(constants.HF_HUB_CACHE)
    served.asked.clear()


def test_a_diffusion_model(
    served: Hub, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetched once, loaded from its mirror, with the same digest and the same output; a second mirror
    copies nothing."""
    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    (served.folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"not read")
    monkeypatch.setattr(session, "other_nodes", lambda: {"id": "another"})
    source = weights.share(resolve(REPO), str(tmp_path / "work"))
    assert (source.digest, source.revision) == (COMMIT, COMMIT)
    assert source.weights is not None and source.weights.mirror is not None
    names = {
        p.relative_to(source.weights.mirror).as_posix()
        for p in Path(source.weights.mirror).rglob("*")
    }
    assert "unet/diffusion_pytorch_model.safetensors" in names
    assert "unet/diffusion_pytorch_model.bin" not in names
    gets = [line for line in served.asked if line.startswith("GET") and "unet" in line]
    assert len([line for line in gets if line.endswith(".safetensors")]) == 1
    times = {p: p.stat().st_mtime_ns for p in Path(source.weights.mirror).rglob("*")}
    assert weights.share(source, str(tmp_path / "work")) == source
    assert {p: p.stat().st_mtime_ns for p in Path(source.weights.mirror).rglob("*")} == times
    move_away(served, monkeypatch)
    there, here = load_denoiser(source), load_denoiser(resolve(str(sd_folder)))
    assert not served.asked
    torch.testing.assert_close(there.encode_texts(["a cat"]), here.encode_texts(["a cat"]))


def test_without_other_machines_nothing_is_mirrored(
    served: Hub, sd_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    source = weights.share(resolve(REPO), str(tmp_path / "work"))
    assert source.weights is not None and source.weights.mirror is None
    assert not (tmp_path / "work").exists()
    served.asked.clear()
    load_denoiser(source)
    assert not served.asked


def test_a_mirror_that_was_changed(
    served: Hub, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Is refused where it is copied from."""
    from pyarrow import fs

    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    root = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    local = storage.filesystem
    monkeypatch.setattr(
        storage, "filesystem", lambda u: (root, u[7:]) if u.startswith("mock://") else local(u)
    )
    source = weights.share(resolve(REPO), "mock://work")
    (file,) = tmp_path.rglob("work/weights/*/vae/config.json")
    file.write_text("{}")
    move_away(served, monkeypatch)
    with pytest.raises(InputError, match="changed while the run was going on"):
        load_denoiser(source)


def test_a_hub_that_is_busy(served: Hub, sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is asked again; one that stays so is no bad input."""
    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    monkeypatch.setattr(outside, "DELAYS", (0.01, 0.01))
    source = resolve(REPO)
    served.refusals = 1
    assert source.fetched().weights is not None

    def refuse(*_: object, **__: object) -> None:
        error = OSError("503 Server Error")
        error.response = SimpleNamespace(status_code=503)  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(Unavailable, match="model 'org/tiny': its weights cannot be fetched"):
        source.fetched()


def test_a_clip_of_the_hub(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SHAPES / "clip", served.folder, dirs_exist_ok=True)
    monkeypatch.setattr(session, "other_nodes", lambda: {"id": "another"})
    source = weights.share(clip.resolve_clip(f"hf-hub:{REPO}"), str(tmp_path / "work"))
    move_away(served, monkeypatch)
    there, here = clip.load_clip(source), clip.load_clip(clip.resolve_clip("shapes"))
    torch.testing.assert_close(dict(there.model.state_dict()), dict(here.model.state_dict()))
    assert str(there.preprocess) == str(here.preprocess)
    assert there.tokenizer(["a cat"]).tolist() == here.tokenizer(["a cat"]).tolist()
    assert not served.asked


@pytest.mark.parametrize("tag", ["openai", "laion2b_s34b_b79k"])
def test_a_tag(tag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file alone makes the model and the preprocessing that open_clip makes of the tag."""
    small = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    }
    small["text_cfg"] = {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 32,
        "heads": 1,
        "layers": 1,
    }
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", small)
    file = tmp_path / "weights.pt"
    torch.save(open_clip.create_model("ViT-B-32").state_dict(), file)
    config = dict(open_clip.get_pretrained_cfg("ViT-B-32", tag)) | {"file": str(file)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-32"], tag, config)
    source = clip.resolve_clip(f"ViT-B-32:{tag}")
    fetched = source.fetched()
    assert fetched.weights == hub_weights.Weights(f"ViT-B-32:{tag}", str(tmp_path), ("weights.pt",))
    assert replace(fetched, weights=None) == source
    by_tag, by_file = clip.load_clip(source), clip.load_clip(fetched)
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    torch.testing.assert_close(by_tag.preprocess(image), by_file.preprocess(image))
    pixels = by_tag.preprocess(image)[None]
    torch.testing.assert_close(
        by_tag.model.encode_image(pixels), by_file.model.encode_image(pixels)
    )


def test_a_language_model(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_language.write_llama(served.folder, ["a cat and a dog"])
    monkeypatch.setattr(session, "other_nodes", lambda: {"id": "another"})
    source = weights.share(resolve_language_model(REPO), str(tmp_path / "work"))
    move_away(served, monkeypatch)
    there = LanguageModel(source, "fp32", "cpu", max_new_tokens=5).answer(["a cat"])
    here = resolve_language_model(str(served.folder))
    assert there == LanguageModel(here, "fp32", "cpu", max_new_tokens=5).answer(["a cat"])
    assert not served.asked


@pytest.fixture(params=["refuses", "is silent"])
def gone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a Hub that a machine without network does not reach: at once, or in no time."""
    monkeypatch.setattr(hub_weights, "ANSWERS_WITHIN", 0.3)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if request.param == "is silent":
            listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_no_network(
    served: Hub,
    gone: str,
    sd_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A model in the cache is taken from there after one try, which is said; of another there is an error,
    as soon. The Hub's own client would try for minutes."""
    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    source = resolve(REPO).fetched()
    monkeypatch.setattr(constants, "ENDPOINT", gone)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", gone + TEMPLATE)
    start = time.monotonic()
    assert resolve(REPO).fetched() == source
    assert caplog.text.count("does not answer: from now on only what the Hub's cache") == 1
    with pytest.raises(InputError, match="'org/other': no such folder, and the Hub gave none"):
        resolve("org/other")
    assert time.monotonic() - start < 5
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # of the processes that are started from here


def test_a_variant_that_only_some_have(served: Hub, sd_folder: Path, tmp_path: Path) -> None:
    """What a repository has is said before anything is fetched."""
    shutil.copytree(sd_folder, served.folder, dirs_exist_ok=True)
    file = served.folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.fp16.safetensors"))
    source = resolve(REPO)
    with pytest.raises(
        InputError, match=r"'org/tiny': its unet has no weights .*give --variant fp16"
    ):
        source.fetched()
    assert not [line for line in served.asked if line.startswith("GET") and "safetensors" in line]
    load_denoiser(resolve(REPO, variant="fp16").fetched(), variant="fp16")


def test_a_clip_with_transformers_weights_beside_its_own(served: Hub) -> None:
    """open_clip's own are fetched, though those of transformers are safetensors; the others are not."""
    shutil.copytree(SHAPES / "clip", served.folder, dirs_exist_ok=True)
    own = served.folder / "open_clip_model.safetensors"
    torch.save(load_file(own), served.folder / "open_clip_pytorch_model.bin")
    own.rename(served.folder / "model.safetensors")
    (served.folder / "model.safetensors").write_bytes(b"transformers'")
    source = clip.resolve_clip(f"hf-hub:{REPO}").fetched()
    assert source.weights is not None
    assert "open_clip_pytorch_model.bin" in source.weights.files
    assert "model.safetensors" not in source.weights.files
    clip.check_clip(source)
    clip.load_clip(source)
