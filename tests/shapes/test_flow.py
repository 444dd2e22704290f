"""The embedded flow transformer: found by name, through SD3's own code, and better than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

import diffitm
from diffitm.models.embedded import FLOW, SHAPES, SHARED, UNET, folder_of
from diffitm.models.families import ONE_CLIP
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.model_check import check_loadable
from diffitm.models.sd3 import StableDiffusion3

MAX_WEIGHTS = 6e6
AWAY = [f"{part}_{number}" for part in ("text_encoder", "tokenizer") for number in (2, 3)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Do not change it."""
    return load_denoiser(resolve(FLOW))


def test_the_package_holds_once_what_both_models_have() -> None:
    own = SHAPES / "flow"
    assert {path.name for path in own.iterdir()} == {"model_index.json", "scheduler", "transformer"}
    assert sum(path.stat().st_size for path in own.rglob("*") if path.is_file()) <= MAX_WEIGHTS


def test_found_by_name(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an SD3 with one CLIP; its folder is put together once a machine."""
    monkeypatch.setenv("DIFFITM_CACHE", str(tmp_path))
    source = resolve(FLOW)
    assert (source.location, source.family) == (FLOW, ONE_CLIP)
    check_loadable(source)
    folder = folder_of(FLOW)
    assert folder.is_relative_to(tmp_path)
    time = folder.stat().st_mtime_ns
    assert (folder_of(FLOW), folder.stat().st_mtime_ns) == (folder, time)
    for part in SHARED:
        files = sorted((folder_of(UNET) / part).iterdir())
        assert [file.name for file in sorted((folder / part).iterdir())] == [f.name for f in files]
        for file in files:
            assert (folder / part / file.name).read_bytes() == file.read_bytes()
    assert type(model) is StableDiffusion3
    assert (model.resolution, model.latent_shape) == (32, (4, 8, 8))


def test_plain_diffusers_draws_with_it(model: Any) -> None:
    """Given the embeddings, as its pipeline reads texts with two CLIPs alone; up to the latents, as it
    decodes those of a VAE that has a shift alone."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder_of(FLOW), **dict.fromkeys(AWAY))
    pipeline.set_progress_bar_config(disable=True)
    text, none = model.encode_texts(["a red square"]), model.encode_texts([""])
    latents = pipeline(
        prompt_embeds=text["hidden"], pooled_prompt_embeds=text["pooled"],
        negative_prompt_embeds=none["hidden"], negative_pooled_prompt_embeds=none["pooled"],
        height=32, width=32, num_inference_steps=10, guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).images  # fmt: skip
    red, green, blue = model.decode(latents)[0]
    assert red.shape == (32, 32)
    assert ((red > 0.2) & (green < -0.1) & (blue < -0.1)).float().mean() > 0.03


def test_better_than_chance() -> None:
    """On scenes that training had none of: where 50, 25 and 16.7 are chance."""
    table = diffitm.evaluate(FLOW, ["vg_relation", "winoground"], scenes=30)
    whole = table[table.group == "all"]  # normalised figures come after the conditional ones
    found = dict(zip(zip(whole.task, whole.metric, strict=True), whole.value, strict=True))
    assert found["vg_relation", "accuracy"] > 0.85
    assert found["winoground", "text"] > 0.6
    assert found["winoground", "group"] > 0.4
