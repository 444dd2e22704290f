"""What an actor runs: rows of the pair table to rows of the score store; the cache of texts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from diffitm.core import images
from diffitm.core.schema import SCORES, PairRow
from diffitm.models.loading import resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import pair_errors
from diffitm.scoring.specs import DiffusionSpec
from diffitm.scoring.text_cache import TextCache
from tests import tiny

TEXTS = ["a red circle", "a blue square", ""]
STEPS = [10, 500, 900]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(4):
        tiny.write_image(tmp_path / "images" / f"{i}.png", seed=i, size=(40 + i, 32))
    return tmp_path


def scorer(sd: StableDiffusion, root: Path, **options: Any) -> DiffusionScorer:
    return DiffusionScorer(sd, make_plan(STEPS, sd.latent_shape), str(root), **options)


def works() -> list[PairRow]:
    return [PairRow(i, f"images/{i}.png", TEXTS[i % 2 :]) for i in range(4)]


def by_pair(lines: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {(line["image"], line["text"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def test_rows_of_the_store(sd: StableDiffusion, root: Path) -> None:
    """One row a pair, in the store's schema, with the errors that pair_errors gives."""
    lines = by_pair(scorer(sd, root).score(works()))
    assert set(lines) == {(work.image, text) for work in works() for text in work.texts}
    table = pa.Table.from_pylist(list(lines.values()), SCORES)
    assert (table.num_rows, table["l2"].null_count) == (10, 0)
    line = lines["images/2.png", "a blue square"]
    assert (line["row"], line["timesteps"], line["elements"]) == (2, STEPS, 256)
    assert (line["failure"], line["similarity"]) == (None, None)
    data = (root / "images" / "2.png").read_bytes()
    assert line["digest"] == hashlib.sha256(data).hexdigest()
    side = images.to_pixels(images.decode(data), 32, "squash").astype(np.float32) / 127.5 - 1
    latents = sd.encode_images(torch.from_numpy(side).permute(2, 0, 1)[None])
    condition, plan = sd.encode_texts(["a blue square"]), make_plan(STEPS, sd.latent_shape)
    expected = pair_errors(sd, latents, condition, plan, torch.tensor([[0, 0]]))
    for kind in ("l2", "l1", "huber"):
        np.testing.assert_allclose(line[kind], getattr(expected, kind)[0], rtol=1e-5)


def test_score_does_not_depend_on_the_split(sd: StableDiffusion, root: Path) -> None:
    """All rows at once, one by one, backwards, in other batches: the same errors."""
    expected = by_pair(scorer(sd, root).score(works()))
    one_by_one = scorer(sd, root, batch_size=5)
    apart = by_pair([line for work in reversed(works()) for line in one_by_one.score([work])])
    for pair, line in expected.items():
        np.testing.assert_allclose(apart[pair]["l2"], line["l2"], rtol=1e-5)


def test_unreadable_images_fail_alone(sd: StableDiffusion, root: Path) -> None:
    """Each pair of a bad image is a failure with a reason; the others get their scores."""
    (root / "images" / "empty.png").touch()
    (root / "images" / "page.png").write_text("<html>")
    rows = [
        PairRow(7, "images/none.png", ["x", ""]),
        *works()[:1],
        PairRow(8, "images/empty.png", ["x"]),
        PairRow(9, "images/page.png", ["x"]),
        PairRow(10, "images/0.png#xywh=500,0,5,5", ["x"]),
    ]
    lines = by_pair(scorer(sd, root).score(rows))
    reasons = {pair: line["failure"] for pair, line in lines.items() if line["failure"]}
    assert reasons["images/none.png", "x"] == "there is no such file"
    assert reasons["images/none.png", ""] == "there is no such file"
    assert "the file is empty" in reasons["images/empty.png", "x"]
    assert "not an image" in reasons["images/page.png", "x"]
    assert "outside of the image" in reasons["images/0.png#xywh=500,0,5,5", "x"]
    assert len(reasons) == 5
    assert lines["images/none.png", "x"]["row"] == 7
    good = by_pair(scorer(sd, root).score(works()[:1]))
    for pair, line in good.items():
        np.testing.assert_allclose(lines[pair]["l2"], line["l2"], rtol=1e-5)
    pa.Table.from_pylist(list(lines.values()), SCORES)


def test_only_unreadable_images(sd: StableDiffusion, root: Path) -> None:
    lines = scorer(sd, root).score([PairRow(0, "a.png", ["x"]), PairRow(1, "b.png", ["y"])])
    assert [line["failure"] for line in lines] == ["there is no such file"] * 2


def test_everything_is_encoded_once(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images once, texts once over all rows and calls, and no forward beyond the pairs."""
    counts = {"images": 0, "forwards": 0}
    texts: list[str] = []
    encode_images, encode_texts, predict = sd.encode_images, sd.encode_texts, sd.predict

    def counted_images(pixels: torch.Tensor, seed: int | None = None) -> torch.Tensor:
        counts["images"] += len(pixels)
        return encode_images(pixels, seed)

    def counted_texts(batch: Sequence[str]) -> dict[str, torch.Tensor]:
        texts.extend(batch)
        return encode_texts(batch)

    def counted_predict(noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        counts["forwards"] += len(noised)
        return predict(noised, *rest)

    monkeypatch.setattr(sd, "encode_images", counted_images)
    monkeypatch.setattr(sd, "encode_texts", counted_texts)
    monkeypatch.setattr(sd, "predict", counted_predict)
    found = scorer(sd, root)
    pairs = len(found.score(works()[:3])) + len(found.score(works()[3:]))
    assert pairs == 10
    assert counts == {"images": 4, "forwards": pairs * found.cost}
    assert sorted(texts) == sorted(TEXTS)


def test_resize_and_posterior_sample_matter(sd: StableDiffusion, root: Path) -> None:
    """Both are options of a score; a seeded sample is the same each time."""
    work = works()[1:2]
    plain = scorer(sd, root).score(work)[0]["l2"]
    assert not np.allclose(scorer(sd, root, resize="crop").score(work)[0]["l2"], plain, rtol=1e-4)
    first, again = (scorer(sd, root, latent_seed=5).score(work)[0]["l2"] for _ in range(2))
    assert not np.allclose(first, plain, rtol=1e-4)
    np.testing.assert_array_equal(first, again)


def test_rate_is_measured(sd: StableDiffusion, root: Path) -> None:
    assert scorer(sd, root, batch_size=4).measure_rate() > 0


def test_spec_builds_the_same_scorer(sd: StableDiffusion, sd_folder: Path, root: Path) -> None:
    """What travels to a worker; its store names all that a score depends on."""
    source = resolve(str(sd_folder))
    spec = DiffusionSpec(source, str(root), "diffusionitm", tuple(STEPS))
    assert spec.cost == 3
    built = by_pair(spec.build("cpu").score(works()[:1]))
    for pair, line in by_pair(scorer(sd, root).score(works()[:1])).items():
        np.testing.assert_allclose(built[pair]["l2"], line["l2"], rtol=1e-5)
    config = spec.store_config()
    assert config["weights"] == source.digest
    changed = {
        "protocol": "paper", "timesteps": (1, 2), "seed": 1, "dtype": "bf16", "resize": "crop",
        "latent_seed": 0, "variant": "fp16", "root": "/elsewhere",
    }  # fmt: skip
    for name, value in changed.items():
        other = DiffusionSpec(**{**vars(spec), name: value})
        assert other.store_config() != config, name
    assert DiffusionSpec(**{**vars(spec), "batch_size": 3}).store_config() == config


def test_lora_and_its_scale_are_in_the_fingerprint(tmp_path: Path, sd_folder: Path) -> None:
    """Other weights, or another lora_alpha in the config beside them, start another store."""
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    source, found = resolve(str(sd_folder)), []
    for weights, alpha in ((b"one", 4), (b"two", 4), (b"two", 8)):
        file.write_bytes(weights)
        beside.write_text(f'{{"r": 4, "lora_alpha": {alpha}}}')
        spec = DiffusionSpec(source, "/data", "diffusionitm", tuple(STEPS), lora=str(file))
        found.append(spec.store_config()["lora"])
    assert len(set(found)) == 3


class Encoder:
    """Encodes a text as 16 bytes that hold its length; remembers what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.batches.append(list(texts))
        values = torch.tensor([[float(len(text))] * 4 for text in texts])
        return {"hidden": values}


def test_cache_encodes_each_text_once() -> None:
    """In batches of the given size, and gives rows in the order asked for."""
    encoder = Encoder()
    cache = TextCache(encoder, limit_bytes=10**6, batch=2)
    found = cache(["a", "bbb", "cc"])["hidden"]
    assert found[:, 0].tolist() == [1, 3, 2]
    assert cache(["cc", "dddd", "a"])["hidden"][:, 0].tolist() == [2, 4, 1]
    assert encoder.batches == [["a", "bbb"], ["cc"], ["dddd"]]
    assert cache.encoded == 4


def test_cache_is_bounded_and_drops_the_least_recent() -> None:
    """Three texts of 16 bytes fit in 48; what was used last stays."""
    encoder = Encoder()
    cache = TextCache(encoder, limit_bytes=48, batch=8)
    cache(["a", "bb", "ccc"])
    cache(["a"])
    cache(["dddd"])
    assert list(cache.kept) == ["ccc", "a", "dddd"]
    assert cache.used == 48
    cache(["bb"])
    assert encoder.batches[-1] == ["bb"]
    assert list(cache.kept) == ["a", "dddd", "bb"]
    assert cache.used == 48


def test_cache_smaller_than_one_call() -> None:
    """A call of more texts than fit is answered whole."""
    cache = TextCache(Encoder(), limit_bytes=20, batch=3)
    texts = ["x" * n for n in range(1, 8)]
    assert cache(texts)["hidden"][:, 0].tolist() == list(range(1, 8))
    assert len(cache.kept) == 1
    assert cache.used == 16


def test_cached_rows_do_not_keep_their_batch_alive() -> None:
    cache = TextCache(Encoder(), limit_bytes=10**6, batch=64)
    cache([str(i) for i in range(50)])
    assert all(v["hidden"].untyped_storage().nbytes() == 16 for v in cache.kept.values())
