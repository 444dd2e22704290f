"""CLIP through open_clip: names, local checkpoints, and cosines against plain open_clip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.models.clip import resolve_clip
from diffitm.models.embedded import SHAPES
from diffitm.scoring.clip import ClipScorer
from diffitm.scoring.specs import ClipSpec
from tests import tiny

TEXTS = ["a red circle", "a blue square above a green cross"]
SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        tiny.write_image(tmp_path / f"{i}.png", seed=i)
    return tmp_path


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Two small configs known to open_clip by name, with the same form of weights."""
    configs = {"small-clip": SMALL, "small-clip-quickgelu": {**SMALL, "quick_gelu": True}}
    known = {**open_clip.factory._MODEL_CONFIGS, **configs}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    return "small-clip"


@pytest.fixture
def checkpoint(tmp_path: Path, small: str) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(open_clip.create_model(small).state_dict(), tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def cosines(model_name: str, pretrained: str | None, root: Path) -> np.ndarray:
    """What open_clip's README does, an image and a text at a time."""
    model, _, preprocess = open_clip.create_model_and_transforms(model_name, pretrained=pretrained)
    tokenizer = open_clip.get_tokenizer(model_name)
    model.eval()
    out = np.zeros((3, len(TEXTS)))
    with torch.no_grad():
        for i in range(3):
            image = model.encode_image(preprocess(Image.open(root / f"{i}.png"))[None])[0]
            for j, text in enumerate(TEXTS):
                words = model.encode_text(tokenizer([text]))[0]
                out[i, j] = torch.cosine_similarity(image, words, dim=0)
    return out


def scored(scorer: ClipScorer) -> np.ndarray:
    lines = scorer.score([PairRow(i, f"{i}.png", TEXTS) for i in range(3)])
    assert [line["failure"] for line in lines] == [None] * 6
    assert [(line["row"], line["text"]) for line in lines] == [
        (i, t) for i in range(3) for t in TEXTS
    ]
    return np.array([line["similarity"] for line in lines]).reshape(3, 2)


def test_shapes_clip_equals_plain_open_clip(root: Path) -> None:
    """The embedded CLIP, through resolve and the scorer, in batches of another size."""
    source = resolve_clip("shapes")
    expected = cosines(f"local-dir:{SHAPES / 'clip'}", None, root)
    found = scored(ClipScorer(source, str(root), batch_size=2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 1e-3
    assert (np.abs(found) <= 1 + 1e-6).all()


def test_spec_builds_the_scorer(root: Path) -> None:
    spec = ClipSpec(resolve_clip("shapes"), str(root))
    scorer = spec.build("cpu")
    assert (spec.cost, scorer.cost, spec.image_cost) == (1, 1, scorer.image_cost)
    assert scorer.measure_rate() > scorer.image_cost
    np.testing.assert_allclose(
        scored(scorer), scored(ClipScorer(spec.source, str(root))), atol=1e-6
    )
    assert spec.store_config()["kind"] == "clip"
    assert spec.store_config()["weights"] == spec.source.digest


def test_texts_are_encoded_once(root: Path) -> None:
    scorer = ClipScorer(resolve_clip("shapes"), str(root))
    scored(scorer)
    scored(scorer)
    assert scorer.texts.encoded == len(TEXTS)


def test_unreadable_images_fail_alone(root: Path) -> None:
    (root / "bad.png").write_text("<html>")
    scorer = ClipScorer(resolve_clip("shapes"), str(root))
    rows = [
        PairRow(5, "none.png", TEXTS),
        PairRow(6, "1.png", TEXTS[:1]),
        PairRow(7, "bad.png", TEXTS[:1]),
    ]
    lines = scorer.score(rows)
    assert [line["row"] for line in lines] == [5, 5, 6, 7]
    assert lines[0]["failure"] == lines[1]["failure"] == "there is no such file"
    assert "not an image" in lines[3]["failure"]
    assert lines[2]["failure"] is None
    assert lines[2]["similarity"] == pytest.approx(scored(scorer)[1, 0], abs=1e-6)


def test_checkpoint_file(checkpoint: Path, root: Path) -> None:
    """NAME:FILE.pt loads the file's weights into the named architecture."""
    source = resolve_clip(f"small-clip:{checkpoint}")
    assert (source.model, source.pretrained) == ("small-clip", str(checkpoint))
    found = scored(ClipScorer(source, str(root)))
    np.testing.assert_allclose(found, cosines("small-clip", str(checkpoint), root), atol=1e-5)


def test_checkpoint_of_another_architecture_is_another_model(checkpoint: Path, root: Path) -> None:
    """The same file under QuickGELU gives other cosines, so its scores must not share a store."""
    plain = resolve_clip(f"small-clip:{checkpoint}")
    quick = resolve_clip(f"small-clip-quickgelu:{checkpoint}")
    first, second = (scored(ClipScorer(source, str(root))) for source in (plain, quick))
    assert not np.allclose(first, second, atol=1e-6)
    assert plain.digest != quick.digest


def test_digest_follows_the_weights(checkpoint: Path) -> None:
    before = resolve_clip(f"small-clip:{checkpoint}").digest
    torch.save(open_clip.create_model("small-clip").state_dict(), checkpoint)
    assert resolve_clip(f"small-clip:{checkpoint}").digest != before


@pytest.mark.parametrize("content", [b"", b"<html>"])
def test_unreadable_checkpoint(checkpoint: Path, root: Path, content: bytes) -> None:
    checkpoint.write_bytes(content)
    source = resolve_clip(f"small-clip:{checkpoint}")
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        ClipScorer(source, str(root))
    assert str(checkpoint) in str(raised.value)


def test_checkpoint_that_does_not_fit(checkpoint: Path, root: Path) -> None:
    torch.save({"visual.proj": torch.zeros(3, 3)}, checkpoint)
    with pytest.raises(InputError, match="cannot be loaded"):
        ClipScorer(resolve_clip(f"small-clip:{checkpoint}"), str(root))


def test_local_folder(tmp_path: Path, root: Path) -> None:
    """A folder with open_clip_config.json, wherever it lies; its digest follows its weights."""
    folder = Path(shutil.copytree(SHAPES / "clip", tmp_path / "my-clip"))
    source, embedded = resolve_clip(str(folder)), resolve_clip("shapes")
    assert source.digest == embedded.digest
    np.testing.assert_allclose(
        scored(ClipScorer(source, str(root))), scored(ClipScorer(embedded, str(root))), atol=1e-6
    )
    weights = folder / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert resolve_clip(str(folder)).digest != embedded.digest


def test_truncated_local_folder(tmp_path: Path, root: Path) -> None:
    folder = Path(shutil.copytree(SHAPES / "clip", tmp_path / "my-clip"))
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded") as raised:
        ClipScorer(resolve_clip(str(folder)), str(root))
    assert str(folder) in str(raised.value)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no open_clip_config\.json") as raised:
        resolve_clip(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ViT-L-14-336x:openai", "unknown model; did you mean 'ViT-L-14-336'?"),
        ("shaeps", "unknown model"),
        ("ViT-L-14:opneai", "'opneai' is no file and no tag; did you mean 'openai'?"),
        ("ViT-L-14:/none/at/all.pt", "'/none/at/all.pt' is no file and no tag"),
        ("ViT-L-14", "'' is no file and no tag"),
    ],
)
def test_unknown_names(name: str, text: str) -> None:
    """The nearest known model or tag is suggested."""
    with pytest.raises(InputError) as raised:
        resolve_clip(name)
    assert f"clip {name!r}" in str(raised.value)
    assert text in str(raised.value)


def test_published_tag_needs_no_weights_yet() -> None:
    """Resolving is cheap; the tag names the weights."""
    source = resolve_clip("ViT-B-32:openai")
    assert (source.model, source.pretrained) == ("ViT-B-32", "openai")
    assert source.digest == "ViT-B-32:openai"
    assert json.loads(json.dumps(vars(source))) == vars(source)
