"""Models in one file."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils
from PIL import Image
from safetensors.torch import load_file, save_file

import diffitm
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.loading import load_denoiser, on_machine, resolve
from diffitm.models.single_file import ENDINGS
from tests import hub, objects, single_file, tiny


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[objects.Objects]:
    with objects.serve(tmp_path / "served") as served, objects.reachable(served):
        yield served


def write_sd2(folder: Path) -> Path:
    """As SD 2.x: open_clip's text encoder, a velocity."""
    tiny.write_sd(folder, prediction="v_prediction")
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "gelu"}))
    return folder


def write_sdxl(folder: Path) -> Path:
    """Text encoders are told from each other by their widths; the second's pooled output is as wide."""
    return tiny.write_sdxl(folder, second=(48, 48))


WRITERS = {"sd": tiny.write_sd, "sd2": write_sd2, "sdxl": write_sdxl}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFITM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def bare(folder: Path, to: Path) -> Path:
    """A folder without its weights, as a Hub id's configs are fetched."""
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors")))


def outputs(model: Any) -> list[torch.Tensor]:
    """Latents, texts and a prediction of a model."""
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)
    latents = model.encode_images(pixels)
    texts = model.encode_texts(["a red cross", "a blue circle"])
    return [latents, model.predict(latents, torch.tensor([500, 20]), texts)]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("family", WRITERS)
def test_the_folder_that_it_was_made_of(family: str, ending: str, tmp_path: Path) -> None:
    """Every number is that of the folder; it is made once, also for another process of the machine."""
    folder = WRITERS[family](tmp_path / "folder")
    file = single_file.write(folder, tmp_path / f"model{ending}")
    config = str(bare(folder, tmp_path / "configs"))
    source = resolve(str(file), single_file_config=config)
    assert (source.name, source.family) == (str(file), resolve(str(folder)).family)
    ours, theirs = load_denoiser(source), load_denoiser(resolve(str(folder)))
    for one, other in zip(outputs(ours), outputs(theirs), strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def sd(tmp_path: Path) -> tuple[Path, str]:
    """A Stable Diffusion in one file, and the folder of its configs."""
    folder = tiny.write_sd(tmp_path / "folder")
    file = single_file.write(folder, tmp_path / "model.safetensors")
    return file, str(bare(folder, tmp_path / "configs"))


def test_it_is_made_once(
    sd: tuple[Path, str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And again where the file or its configs are others; so on another machine, which has no such cache."""
    file, config = sd
    caplog.set_level(logging.INFO, "diffitm")
    source = resolve(str(file), single_file_config=config)
    assert resolve(str(file), single_file_config=config) == source
    assert caplog.text.count("made a folder of diffusers once") == 1
    shutil.rmtree(cache)
    there = Path(on_machine(source)[0])
    assert (there / "model_index.json").is_file()
    assert caplog.text.count("made a folder of diffusers once") == 2
    scheduler = Path(config, "scheduler", "scheduler_config.json")
    scheduler.write_text(scheduler.read_text().replace("0.012", "0.013"))
    other = resolve(str(file), single_file_config=config)
    weights = load_file(file)
    save_file(weights | {"model.diffusion_model.out.2.bias": torch.ones(4)}, file)
    third = resolve(str(file), single_file_config=config)
    assert len({source.digest, other.digest, third.digest}) == 3


def test_paths_of_another_folder(
    sd: tuple[Path, str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor runs somewhere else than the driver, on a machine that has made no folder yet."""
    monkeypatch.chdir(tmp_path)
    source = resolve(sd[0].name, single_file_config=Path(sd[1]).name)
    shutil.rmtree(cache)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert Path(on_machine(source)[0], "unet").is_dir()


def test_half_precision(tmp_path: Path) -> None:
    """Weights are those of the file, in whatever precision they are scored."""
    folder = tiny.write_sd(tmp_path / "folder")
    file = single_file.write(folder, tmp_path / "half.safetensors", torch.float16)
    model: Any = load_denoiser(resolve(str(file), single_file_config=str(folder)))
    whole: Any = load_denoiser(resolve(str(folder)))
    for name, tensor in whole.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor.half().float())
    assert model.unet.dtype == torch.float32


@pytest.mark.parametrize("told", [True, False], ids=["told", "by its weights"])
def test_configs_of_the_hub(
    told: bool, served: hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weights are fetched, and what diffusers tells by the weights is said."""
    folder = tiny.write_sd(tmp_path / "folder")
    shutil.copytree(folder, served.folder, dirs_exist_ok=True)
    known = {"v1": {"pretrained_model_name_or_path": hub.REPO}}
    monkeypatch.setattr(single_file_utils, "DIFFUSERS_DEFAULT_PIPELINE_PATHS", known)
    file = single_file.write(folder, tmp_path / "model.safetensors")
    ours = load_denoiser(resolve(str(file), single_file_config=hub.REPO if told else None))
    for one, other in zip(outputs(ours), outputs(load_denoiser(resolve(str(folder)))), strict=True):
        assert torch.equal(one, other)
    assert served.asked and not [line for line in served.asked if "safetensors" in line]


def test_a_uri(sd: tuple[Path, str], bucket: objects.Objects) -> None:
    file, config = sd
    uri = bucket.uri("models/model.safetensors")
    storage.upload(str(file), uri)
    there, here = (resolve(name, single_file_config=config) for name in (uri, str(file)))
    assert there.digest == here.digest
    assert Path(on_machine(there)[0], "unet").is_dir()


def test_files_that_are_no_whole_model(sd: tuple[Path, str], tmp_path: Path) -> None:
    """What lacks is said, and nothing is left in the cache."""
    file, config = sd
    save_file({"lora_unet_mid.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    with pytest.raises(
        InputError, match=r"model '.*lora\.safetensors' holds no whole .* --lora takes"
    ):
        resolve(str(tmp_path / "lora.safetensors"), single_file_config=config)
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"cut\.safetensors is no whole safetensors"):
        resolve(str(tmp_path / "cut.safetensors"), single_file_config=config)
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if not k.startswith("cond_stage")}, file)
    with pytest.raises(InputError, match=r"does not go with the configs .*CLIP"):
        resolve(str(file), single_file_config=config)
    assert not list(Path(os.environ["DIFFITM_CACHE"]).glob("models/single-file-*"))


def test_a_pickle_that_runs_code(sd: tuple[Path, str], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path(tmp_path, "exploded").touch, ()

    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Bomb()}, tmp_path / "bad.ckpt")
    with pytest.raises(InputError, match=r"bad\.ckpt"):
        resolve(str(tmp_path / "bad.ckpt"), single_file_config=sd[1])
    assert not Path(tmp_path, "exploded").exists()


def test_configs_that_do_not_fit(sd: tuple[Path, str], tmp_path: Path) -> None:
    """The option is named, and what is wrong with it."""
    file, _ = sd
    with pytest.raises(InputError, match=r"single_file_config .*has no model_index"):
        resolve(str(file), single_file_config=str(tmp_path))
    with pytest.raises(InputError, match=r"single_file_config 'nowhere' is neither a folder nor"):
        resolve(str(file), single_file_config="nowhere")
    wide = bare(write_sdxl(tmp_path / "xl"), tmp_path / "wide")
    with pytest.raises(InputError, match=r"single_file_config .*does not go with the configs of"):
        resolve(str(file), single_file_config=str(wide))


def test_scores_of_a_file(sd: tuple[Path, str], tmp_path: Path) -> None:
    """By the Python interface, as of the folder that it was made of."""
    file, config = sd
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    with pytest.raises(InputError, match=r"single_file_config .*: no model is in one file"):
        diffitm.load_scorer(str(tmp_path / "folder"), single_file_config=config)
    scores = [
        diffitm.load_scorer(name, single_file_config=told, timesteps=2)([image], ["a cat"])
        for name, told in ((str(file), config), (str(tmp_path / "folder"), None))
    ]
    assert np.array_equal(*map(np.asarray, scores))
