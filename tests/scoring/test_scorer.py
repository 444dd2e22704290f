"""What an actor runs: rows of the pair table to rows of the score store; the cache of texts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from diffitm.core import images, outside
from diffitm.core.errors import InputError, Unavailable
from diffitm.core.schema import SCORES, PairRow
from diffitm.models import clip as clip_models
from diffitm.models.clip import resolve_clip
from diffitm.models.loading import resolve
from diffitm.models.stable_diffusion import StableDiffusion
from diffitm.scoring import batching
from diffitm.scoring import scorer as scorer_module
from diffitm.scoring.clip import ClipScorer
from diffitm.scoring.diffusion import DiffusionScorer, scaled
from diffitm.scoring.image_reader import ImageReader, Loaded, load_images
from diffitm.scoring.noise_plan import make_plan, standard_noise
from diffitm.scoring.pair_errors import pair_errors
from diffitm.scoring.scorer import similarity_lines
from diffitm.scoring.specs import ClipSpec, DiffusionSpec
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
    for name, value in {"batch_size": 3, "compiled": True}.items():
        assert DiffusionSpec(**{**vars(spec), name: value}).store_config() == config, name
    half = {**vars(spec), "dtype": "fp16"}
    compiled = DiffusionSpec(**{**half, "compiled": True})
    assert compiled.store_config() == {**DiffusionSpec(**half).store_config(), "compiled": True}


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


def test_a_spec_passes_everything_on(sd_folder: Path, root: Path) -> None:
    """What a score depends on, batch size and compiling; timesteps are checked against the model."""
    source = resolve(str(sd_folder))
    spec = DiffusionSpec(source, str(root), "paper", (3, 999), seed=4, dtype="bf16", resize="crop",
                         latent_seed=6, batch_size=12, compiled=True)  # fmt: skip
    built = spec.build("cpu")
    assert isinstance(built, DiffusionScorer)
    assert (built.root, built.resize, built.latent_seed) == (str(root), "crop", 6)
    assert (built.denoiser.dtype, built.timesteps, built.cost) == (torch.bfloat16, [3, 999], 2)
    assert [batch.size for batch in built.batches] == [12, 3, 12]
    assert built.compiled is not None and built.compiled.batch is built.batches[0]
    assert torch.equal(built.plan.noise, standard_noise(2, built.denoiser.latent_shape, 4))
    with pytest.raises(InputError, match="timestep 1000 is beyond the model's last, 999"):
        DiffusionSpec(source, str(root), "paper", (1000, 3)).build("cpu")


def test_the_fingerprint_of_a_clip(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, the images' root, and the preprocessing where it is not open_clip's."""
    source = resolve_clip("shapes")
    spec = ClipSpec(source, "s3://bucket/a?region=x", batch_size=3)
    monkeypatch.setattr(clip_models, "preprocessing", lambda _: {})
    config = spec.store_config()
    assert config == {
        "kind": "clip", "version": 1, "weights": source.digest, "root": "s3://bucket/a",
    }  # fmt: skip
    assert ClipSpec(source, "s3://bucket/b").store_config() != config
    assert ClipSpec(source, "s3://bucket/a", batch_size=9).store_config() == config
    monkeypatch.setattr(clip_models, "preprocessing", lambda _: {"image_mean": [0.1] * 3})
    assert spec.store_config() == config | {"preprocessing": {"image_mean": [0.1] * 3}}
    built = ClipSpec(source, str(root), 3).build("cpu")
    assert isinstance(built, ClipScorer)
    assert (built.root, [batch.size for batch in built.batches]) == (str(root), [3, 3])
    assert (spec.cost, built.cost) == (1, 1)


def test_pixels_are_scaled_to_minus_one_to_one() -> None:
    """Channels first, rows before columns."""
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[1, 2] = (255, 51, 0)
    found = scaled(pixels)
    assert (found.shape, found.dtype) == ((3, 2, 3), torch.float32)
    torch.testing.assert_close(found[:, 1, 2], torch.tensor([1.0, -0.6, -1.0]))
    assert (found[:, 0] == -1).all()


def test_the_rate_is_that_of_the_second_round(
    sd: StableDiffusion, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four forwards in two seconds, after a warm-up of five; of a slow model the first must do."""
    times = iter([100.0, 105.0, 105.0, 107.0, 200.0, 208.0])
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    found = scorer(sd, root, batch_size=4)
    assert (found.measure_rate(), found.measure_rate()) == (2.0, 0.5)


class Picky(tiny.Fixed):
    """Refuses the texts that begin with a dash."""

    def refuses(self, text: str) -> str | None:
        return f"no class {text}" if text.startswith("-") else None


def test_refused_texts_fail_alone(root: Path) -> None:
    """Each pair has its own reason, an unreadable image before a refused text; the rest is scored."""
    model = Picky(tiny.schedule())
    found = DiffusionScorer(model, make_plan(STEPS, model.latent_shape), str(root), batch_size=2)
    assert [batch.size for batch in found.batches] == [2, 1, 2]
    rows = [
        PairRow(5, "images/0.png", ["a", "-b", ""]),
        PairRow(6, "none.png", ["-b", "a"]),
        PairRow(7, "images/1.png", ["-b"]),
        PairRow(8, "images/1.png", ["c", "a"]),
    ]
    lines = found.score(rows)
    assert sorted((line["row"], line["text"], line["failure"]) for line in lines if line["failure"]) == [
        (5, "-b", "no class -b"),
        (6, "-b", "there is no such file"),
        (6, "a", "there is no such file"),
        (7, "-b", "no class -b"),
    ]  # fmt: skip
    good = [(line["row"], line["text"]) for line in lines if line["failure"] is None]
    assert good == [(5, "a"), (5, ""), (8, "c"), (8, "a")]
    assert all(len(line["l2"]) == 3 for line in lines if line["failure"] is None)
    assert {line["digest"] is None for line in lines if line["row"] in (5, 7)} == {False}
    assert len(found.score(rows[2:3])) == 1, "nothing is left to score"


def test_whatever_a_decoder_raises_is_that_images_failure(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PIL raises a SyntaxError for some broken PNGs, and an error of its own for bombs."""
    real = images.opened
    raised: dict[str, Exception] = {
        "images/1.png": SyntaxError("broken PNG"),
        "images/2.png": images.Image.DecompressionBombError("too large"),
    }

    def opened(data: bytes, name: str) -> Any:
        if name in raised:
            raise raised[name]
        return real(data, name)

    monkeypatch.setattr(images, "opened", opened)
    found = load_images(works(), str(root), lambda image: image.size)
    assert [item.value for item in found] == [(40, 32), None, None, (43, 32)]
    assert [item.failure for item in found] == [
        None, "unreadable image: SyntaxError: broken PNG",
        "unreadable image: DecompressionBombError: too large", None,
    ]  # fmt: skip
    assert [item.outside for item in found] == [False] * 4
    digests = [hashlib.sha256((root / work.image).read_bytes()).hexdigest() for work in works()]
    assert [item.digest for item in found] == [digests[0], None, None, digests[3]]
    assert load_images([], str(root), lambda image: image) == []
    (alone,) = load_images(works()[1:2], str(root), lambda image: image)
    assert alone.failure == "unreadable image: SyntaxError: broken PNG"


def test_what_is_away_is_waited_for_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images away end the attempt; one alone, or one that is broken, is its own failure."""
    monkeypatch.setattr(outside, "DELAYS", (0.0, 0.0))
    asked = list[str]()
    broken: dict[str, Exception] = {}

    def load(folder: str, name: str) -> Any:
        asked.append(name)
        raise broken.get(name) or ConnectionError("no route")

    monkeypatch.setattr(images, "read", load)
    rows = works()
    with pytest.raises(
        Unavailable, match=r"none of 4 images could be read, such as images/0\.png: un"
    ):
        load_images(rows, str(root), lambda image: image, threads=1)
    assert [asked.count(row.image) for row in rows] == [3, 1, 1, 1]
    (alone,) = load_images(rows[:1], str(root), lambda image: image)
    assert alone == Loaded(None, None, "unreadable image: ConnectionError: no route", True)
    broken["images/3.png"] = ValueError("torn")
    found = load_images(rows, str(root), lambda image: image)
    assert [item.outside for item in found] == [True, True, True, False]
    with pytest.raises(Unavailable, match="there is no folder /no/where here"):
        load_images(rows[3:], "/no/where", lambda image: image)
    with pytest.raises(Unavailable, match="nowhere://"):
        load_images(rows[3:], "nowhere://a", lambda image: image)


def test_lines_of_similarities() -> None:
    """A value a text, in order; an image that failed fails each of its texts."""
    rows = [PairRow(4, "a", ["x", "y"]), PairRow(5, "b", ["z", "x"]), PairRow(6, "c", ["w"])]
    loaded = [Loaded(1, "d1", None), Loaded(None, "d2", "torn"), Loaded(1, "d3", None)]
    values = [np.array([0.25, 0.5], np.float32), None, np.array([-1.0], np.float32)]
    lines = similarity_lines(rows, loaded, values)
    keys = ("row", "image", "text", "similarity", "digest", "failure")
    assert [tuple(line[key] for key in keys) for line in lines] == [
        (4, "a", "x", 0.25, "d1", None),
        (4, "a", "y", 0.5, "d1", None),
        (5, "b", "z", None, "d2", "torn"),
        (5, "b", "x", None, "d2", "torn"),
        (6, "c", "w", -1.0, "d3", None),
    ]
    assert {line["l2"] for line in lines} == {None}
    assert pa.Table.from_pylist(lines, SCORES).num_rows == 5


def test_cosines_of_clip_by_hand(root: Path) -> None:
    """Unit embeddings, each image with its own texts, also behind one that failed."""
    found = ClipScorer(resolve_clip("shapes"), str(root))
    rows = [PairRow(9, "none.png", ["a red circle"]), *works()]
    lines = by_pair(found.score(rows))
    assert lines["none.png", "a red circle"]["failure"] == "there is no such file"
    assert found.measure_rate() > 0
    for work in works():
        image, _ = images.load(str(root), work.image)
        pixels = found.preprocess(image)[None]
        with torch.inference_mode():
            left = found.model.encode_image(pixels)[0]
            right = found.model.encode_text(found.tokenizer(work.texts))
        cosines = torch.nn.functional.cosine_similarity(right, left[None])
        for text, value in zip(work.texts, cosines.tolist(), strict=True):
            assert lines[work.image, text]["similarity"] == pytest.approx(value, abs=1e-5)


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


class Watched(tiny.Fixed):
    """Writes down what it is asked to do, and calls `first` before it encodes the first images."""

    def __init__(self) -> None:
        super().__init__(tiny.schedule())
        self.calls: list[tuple[str, int]] = []
        self.first = lambda: None

    def encode_posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.first()
        self.first = lambda: None
        self.calls.append(("images", len(pixels)))
        return super().encode_posterior(pixels)

    def encode_texts(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        self.calls.append(("texts", len(texts)))
        return super().encode_texts(texts)

    def predict(self, noised: torch.Tensor, *rest: Any) -> torch.Tensor:
        self.calls.append(("forwards", len(noised)))
        return super().predict(noised, *rest)


def watched(root: Path, batch_size: int) -> tuple[DiffusionScorer, Watched]:
    model = Watched()
    plan = make_plan(STEPS, model.latent_shape)
    return DiffusionScorer(model, plan, str(root), batch_size=batch_size), model


def six() -> list[PairRow]:
    """Six parts of four images."""
    return [PairRow(i, f"images/{i % 4}.png#xywh=0,0,{9 + i},9", TEXTS) for i in range(6)]


def test_the_next_images_are_read_while_these_are_scored(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no more than them: the first are not encoded before the third is asked for, and those behind it
    wait."""
    monkeypatch.setattr(scorer_module, "THREADS", 2)
    found, model = watched(root, 8)
    rows, asked, third, real = six(), list[str](), threading.Event(), images.read

    def load(folder: str, name: str) -> Any:
        asked.append(name)
        if name == rows[2].image:
            third.set()
        return real(folder, name)

    def first() -> None:
        assert third.wait(60), "the third image is read only once the first are scored"
        assert set(asked) <= {row.image for row in rows[:4]}

    monkeypatch.setattr(images, "read", load)
    model.first = first
    assert len(found.score(rows)) == 18
    assert sorted(asked) == sorted(row.image for row in rows)


def test_texts_are_encoded_while_the_first_images_are_read(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, model = watched(root, 8)
    begun, encoded, real = threading.Event(), threading.Event(), images.read

    def load(folder: str, name: str) -> Any:
        begun.set()
        assert encoded.wait(60), "texts wait for images"
        return real(folder, name)

    def encode(texts: Sequence[str]) -> dict[str, torch.Tensor]:
        assert begun.wait(60), "images wait for texts"
        encoded.set()
        return tiny.Fixed.encode_texts(model, texts)

    monkeypatch.setattr(images, "read", load)
    found.texts.encode = encode
    assert {line["failure"] for line in found.score(six())} == {None}


def test_batches_fill_over_all_images(root: Path) -> None:
    """Images come two at a time: the VAE's batches; those of forwards are as if they came at once."""
    found, model = watched(root, 8)
    found.score(six())
    assert [count for what, count in model.calls if what == "images"] == [2, 2, 2]
    forwards = [count for what, count in model.calls if what == "forwards"]
    assert forwards == [8] * 6 + [6]
    assert model.calls[:4] == [("texts", 3), ("images", 2), ("forwards", 8), ("forwards", 8)]


def test_images_some_at_a_time_give_the_same_bits(sd: StableDiffusion, root: Path) -> None:
    rows = six()
    for size in (4, 8, 64):
        apart = scorer(sd, root, batch_size=size)
        whole = load_images(rows, str(root), apart.prepare)
        together = by_pair(scorer(sd, root, batch_size=size).score_loaded(rows, [whole]))
        for pair, line in by_pair(apart.score(rows)).items():
            for kind in ("l2", "l1", "huber"):
                np.testing.assert_array_equal(line[kind], together[pair][kind])


def test_errors_are_fetched_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fetch makes a GPU wait: one a block, however many batches and images."""
    found, model = watched(root, 8)
    fetched, real = list[int](), torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        fetched.append(len(model.calls))
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    found.score(six())
    assert fetched == [len(model.calls)]
    clip = ClipScorer(resolve_clip("shapes"), str(root), batch_size=2)
    clip.score(works())
    assert len(fetched) == 2


def test_a_block_of_which_all_images_are_away(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the attempt after the last of them; one that can be read later on makes the others failures.
    Only the first is waited for."""
    monkeypatch.setattr(outside, "DELAYS", (0.0, 0.0))
    monkeypatch.setattr(scorer_module, "THREADS", 1)
    asked, there, real = list[str](), set[str](), images.read

    def load(folder: str, name: str) -> Any:
        asked.append(name)
        if name not in there:
            raise ConnectionError("no route")
        return real(folder, name)

    monkeypatch.setattr(images, "read", load)
    rows = six()
    for batch_size in (4, 8, 64):
        found, model = watched(root, batch_size)
        with pytest.raises(Unavailable, match=r"none of 6 images could be read, such as images/0"):
            found.score(rows)
        assert [asked.count(row.image) for row in rows] == [3, 1, 1, 1, 1, 1]
        asked.clear()
        assert [what for what, _ in model.calls] == ["texts"]
    there.add(rows[5].image)
    found, _ = watched(root, 4)
    lines = found.score(rows)
    assert [line["row"] for line in lines if line["failure"] is None] == [5, 5, 5]
    assert [asked.count(row.image) for row in rows] == [3, 1, 1, 1, 1, 1]


def test_time_in_which_images_are_waited_for(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds up since it was last asked for, each time of a clock that moves while one is read."""
    found, _ = watched(root, 64)
    clock, real = [0.0], images.read

    def load(folder: str, name: str) -> Any:
        clock[0] += 2.0
        return real(folder, name)

    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    read = load_images(works(), str(root), found.prepare)
    found.score_loaded(works(), [read])
    assert found.loading.spent() == 0, "nothing was waited for"
    waits = found.load(works(), 4)
    monkeypatch.setattr(ImageReader, "take", lambda reader, count: load(str(root), "images/0.png"))
    next(iter(waits))
    assert [found.loading.spent(), found.loading.spent()] == [2.0, 0.0]


def test_a_read_that_hangs_does_not_hold_up_an_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not begun is not read any more."""
    released, asked = threading.Event(), list[str]()

    def load(folder: str, name: str) -> Any:
        asked.append(name)
        released.wait(60)
        raise ValueError("late")

    monkeypatch.setattr(images, "read", load)
    with pytest.raises(KeyError), ImageReader(works(), str(root), str, 4, threads=1) as reader:
        raise KeyError
    released.set()
    reader.pool.shutdown()
    assert asked in ([], [works()[0].image])
