"""DPT's score against its formulas, whatever the batch; what it depends on; where it is asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import diffitm
from diffitm.commands.models import find_sources
from diffitm.commands.score import ScoreConfig, run
from diffitm.commands.stages.sample import Sampling, samples_folder
from diffitm.core import images
from diffitm.core.errors import InputError
from diffitm.core.schema import SCORES, PairRow
from diffitm.evaluation.options import GdbenchConfig, check_models, check_options, dpt_names
from diffitm.models.dpt import DptAdapter, load_adapter
from diffitm.models.dpt_file import NAME, AdapterShape, find_adapter, save_adapter
from diffitm.models.dpt_sampling import Corrected
from diffitm.models.folder import Folder
from diffitm.models.loading import resolve
from diffitm.models.lora import add_lora, lora_weights, save_lora
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.dpt import DptScorer
from diffitm.scoring.noise_plan import standard_noise
from diffitm.scoring.specs import DiffusionSpec, DptSpec
from diffitm.store.score_store import open_store
from tests import plain_dpt, tiny

SHAPE = AdapterShape("up0", 64, tiny.WIDTH)
TEXTS = ["a red circle", "a blue square", "a green cross"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("adapter"))
    save_adapter(DptAdapter(SHAPE, 7).state_dict(), SHAPE, folder, tuned=False)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for i in range(3):
        tiny.write_image(folder / f"{i}.png", seed=i, size=(40 + i, 32))
    return folder


def works() -> list[PairRow]:
    return [PairRow(i, f"{i}.png", TEXTS[i % 2 :]) for i in range(3)]


def scorer(sd: StableDiffusion, adapter: str, root: Path, **options: Any) -> DptScorer:
    loaded = load_adapter(find_adapter(adapter, "dpt"), sd, "dpt")
    return DptScorer(sd, loaded, str(root), **options)


def found(made: DptScorer, rows: list[PairRow]) -> dict[tuple[str, str], float]:
    return {(line["image"], line["text"]): line["similarity"] for line in made.score(rows)}


def test_score_equals_the_formula(sd: StableDiffusion, adapter: str, root: Path) -> None:
    """One noise for all pairs, the first of the standard table; lines of the store with it alone."""
    made = scorer(sd, adapter, root, timestep=300)
    lines = made.score(works())
    table = pa.Table.from_pylist(lines, SCORES)
    assert table["l2"].null_count == len(lines) == 8 and table["similarity"].null_count == 0
    state, noise = dict(made.adapter.named_parameters()), standard_noise(1, sd.latent_shape)[0]
    signal, sigma = sd.schedule.signal[300], sd.schedule.sigma[300]
    for line in lines:
        pixels = images.to_pixels(images.load(str(root), line["image"])[0], 32, "squash")
        side = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            clean = sd.vae.encode(side).latent_dist.mean[0] * sd.vae.config.scaling_factor
            hidden, pooled = plain_dpt.encoded(sd, line["text"])
            noised = signal * clean + sigma * noise
            map, _ = plain_dpt.read(sd, "up0", noised, 300, hidden)
            expected = plain_dpt.score(state, map, 300, pooled)
        assert line["similarity"] == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_score_does_not_depend_on_the_split(sd: StableDiffusion, adapter: str, root: Path) -> None:
    """All rows at once, one by one and backwards, in batches of three; a broken image costs its own pairs."""
    whole = found(scorer(sd, adapter, root), works())
    apart = scorer(sd, adapter, root, batch_size=3)
    for row in reversed(works()):
        for pair, value in found(apart, [row]).items():
            assert value == pytest.approx(whole[pair], abs=1e-5)
    lost = scorer(sd, adapter, root).score([PairRow(9, "none.png", TEXTS), *works()])
    assert [line["failure"] for line in lost[:3]] == ["there is no such file"] * 3
    assert {(x["image"], x["text"]): x["similarity"] for x in lost[3:]} == pytest.approx(whole)


def test_each_timestep_and_seed_has_its_own(sd: StableDiffusion, adapter: str, root: Path) -> None:
    plain = found(scorer(sd, adapter, root), works())
    for options in ({"timestep": 499}, {"seed": 1}, {"resize": "crop"}, {"latent_seed": 0}):
        assert found(scorer(sd, adapter, root, **options), works()) != plain
    assert scorer(sd, adapter, root).cost == 1
    assert scorer(sd, adapter, root, batch_size=2).measure_rate() > 0
    with pytest.raises(ValueError, match="timestep 1000 is beyond the model's last, 999"):
        scorer(sd, adapter, root, timestep=1000)


def test_what_a_score_depends_on(sd_folder: Path, adapter: str, tmp_path: Path) -> None:
    """Each setting has a store of its own, the batch size none."""
    source, file = resolve(str(sd_folder)), find_adapter(adapter, "dpt")
    spec = DptSpec(source, file, "/data", 500)
    config = spec.store_config()
    assert (config["adapter"], config["map"], config["timestep"]) == (file.digest, "up0", 500)
    assert replace(spec, batch_size=3).store_config() == config
    changed: list[dict[str, Any]] = [
        {"timestep": 501}, {"seed": 1}, {"dtype": "bf16"}, {"resize": "crop"}, {"latent_seed": 0},
        {"root": "/other"}, {"variant": "fp16"}, {"source": replace(source, digest="x")},
        {"adapter": replace(file, digest="x")},
        {"adapter": replace(file, shape=replace(file.shape, map="mid"))},
    ]  # fmt: skip
    stores = [open_store(str(tmp_path), spec.label, config)]
    for values in changed:
        other = replace(spec, **values)
        stores.append(open_store(str(tmp_path), spec.label, other.store_config()))
    assert len({store.uri for store in stores}) == 1 + len(changed)
    assert {store.similarity for store in stores} == {"matching"}
    assert spec.label == f"{sd_folder} + DPT {adapter}"


def test_a_tuned_adapter_scores_with_its_lora(
    sd_folder: Path, adapter: str, root: Path, tmp_path: Path
) -> None:
    model = StableDiffusion(Folder(str(sd_folder)))
    for parameter in add_lora(model.unet, 2, 0):
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    save_lora(lora_weights(model.unet), str(tmp_path), 2)
    save_adapter(DptAdapter(SHAPE, 7).state_dict(), SHAPE, str(tmp_path), tuned=True)
    source = resolve(str(sd_folder))
    tuned, plain = (
        found(DptSpec(source, find_adapter(name, "dpt"), str(root), 500).build("cpu"), works())
        for name in (str(tmp_path), adapter)
    )
    expected = found(scorer(model, adapter, root), works())
    assert tuned == pytest.approx(expected, abs=1e-5)
    assert all(abs(tuned[pair] - plain[pair]) > 1e-4 for pair in plain)


def test_from_python(sd: StableDiffusion, sd_folder: Path, adapter: str, root: Path) -> None:
    """One score a pair, which compares images and texts alike."""
    made = diffitm.load_scorer(str(sd_folder), dpt=adapter, device="cpu", dpt_timestep=300)
    scores = made([root / f"{i}.png" for i in range(3)], TEXTS)
    known = found(scorer(sd, adapter, root, timestep=300), works())
    for (image, text), value in known.items():
        assert scores[int(image[0]), TEXTS.index(text)] == pytest.approx(value, abs=1e-5)
    assert scores.dtype == np.float32 and made.timesteps == ()
    with pytest.raises(InputError, match="has no errors by timestep"):
        made.errors([root / "0.png"], TEXTS)
    with pytest.raises(InputError, match="brings the LoRA that it was trained with"):
        diffitm.load_scorer(str(sd_folder), dpt=adapter, lora="lora.safetensors")
    with pytest.raises(InputError, match="dpt_timestep timestep 1000 is beyond"):
        diffitm.load_scorer(str(sd_folder), dpt=adapter, device="cpu", dpt_timestep=1000)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": []}, "--dpt is a score of diffusion models: give a --model"),
        ({"dpt": ["/none"]}, "--dpt '/none': there is no /none/dpt_adapter.safetensors"),
        ({"dpt_timestep": 1000}, "--dpt-timestep 1000: must be at most 999"),
        ({"lora": ["none"]}, "--lora is of the error score (an adapter brings"),
        ({"compile": True}, "--compile is of the error score"),
        ({"racing": 0.01}, "--racing is of the error score"),
        (
            {"text_encoders": "stage"},
            "--text-encoders stage: DPT's score reads texts with the encoder",
        ),
    ],
)
def test_problems_of_options(adapter: str, options: dict[str, Any], told: str) -> None:
    """Options of errors are refused where no error is asked for, and only there."""
    config = GdbenchConfig(**{"model": ["shapes"], "dpt": [adapter]} | options)
    assert any(told in problem for problem in check_models(config)), check_models(config)
    if "of the error score" in told:
        check_options(replace(config, dpt=["none", adapter]))


def test_options_of_dpt_where_nothing_is(adapter: str) -> None:
    """They would do nothing."""
    for dpt in ([], ["none"]):
        config = GdbenchConfig(model=["shapes"], dpt=dpt, dpt_timestep=300)
        assert check_models(config) == ["--dpt-timestep 300: is of DPT's score: give a --dpt"]
    for more in ({"dpt": [adapter]}, {"prompts": ["a red circle"]}):
        with pytest.raises(InputError, match="--dpt-correction 0: is of images by DPT"):
            check_options(GdbenchConfig(**{"model": ["shapes"], "dpt_correction": 0.0} | more))
    both: dict[str, Any] = {"dpt": [adapter], "prompts": ["a red circle"], "dpt_correction": 0.0}
    check_options(GdbenchConfig(model=["shapes"], dpt_timestep=300, **both))


def test_names() -> None:
    assert dpt_names(GdbenchConfig()) == [None]
    assert dpt_names(GdbenchConfig(dpt=["a", "none", "a"])) == ["a", None]
    assert find_sources(GdbenchConfig(model=["shapes"], dpt=["a"])).models[0].name == "shapes"


def test_score_takes_one(adapter: str, tmp_path: Path) -> None:
    config = ScoreConfig(
        model=["shapes"], dpt=["none", adapter], data=str(tmp_path / NAME), out=str(tmp_path)
    )
    with pytest.raises(InputError, match="score takes one model, --lora, --dpt and number"):
        run(config)


def test_images_by_self_correction(sd_folder: Path, adapter: str) -> None:
    """Generated with the adapter and the factor, which name their folder."""
    file = find_adapter(adapter, "dpt")
    spec = DptSpec(resolve(str(sd_folder)), file, "", 500, correction=0.5)
    painter = spec.painter("cpu")
    assert isinstance(painter, Corrected) and painter.factor == 0.5
    assert len(painter.generate("a red circle", [0, 1], 2, 1.0)) == 2
    how = Sampling(1, 2, 1.0)
    others = [spec, replace(spec, correction=0.0), replace(spec, adapter=replace(file, digest="x"))]
    sources = [replace(spec.source, prediction="sample"), replace(spec.source, resolution=512)]
    others += [replace(spec, source=source) for source in sources]
    plain = DiffusionSpec(spec.source, "", "diffusionitm", (500,))
    others += [plain, *(replace(plain, source=source) for source in sources)]
    assert len({samples_folder(one, ["x"], how) for one in others}) == len(others)
    assert samples_folder(replace(spec, timestep=1), ["x"], how) == samples_folder(spec, ["x"], how)
