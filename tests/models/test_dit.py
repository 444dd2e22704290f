"""DiT against diffusers' own transformer, texts as classes, and pairs whose text is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.core.schema import PairRow
from diffitm.models.dit import Dit
from diffitm.models.folder import Folder
from diffitm.models.loading import DTYPES, load_denoiser, resolve
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.specs import DiffusionSpec
from diffitm.training.lora.objectives import Objective
from diffitm.training.lora.step import Tuner
from tests import tiny

CLASSES = len(tiny.LABELS)
REASON = "the text names no class of this model's id2label"
# Texts and the classes that they stand for; the last is the null class.
NAMED = {
    "a photo of a tench.": [0],
    "TINCA\ntinca": [0],
    "a tench, Tinca tinca": [0],
    "a tiger cat": [2],
    "a tiger and a cat": [1, 6],
    "a cat, a tiger cat": [1, 2],
    "white shark or Cat?": [1, 3],
    "a crane": [4, 5],
    "a cat, a cat and a tiger": [1, 6],
    "": [CLASSES],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return tiny.write_dit(tmp_path_factory.mktemp("dit") / "tiny")


@pytest.fixture(scope="module")
def dit(folder: Path) -> Dit:
    """Do not change it."""
    return Dit(Folder(str(folder)))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for i in range(3):
        tiny.write_image(tmp_path / "images" / f"{i}.png", seed=i)
    return tmp_path / "images"


def table_of(folder: Path, block: int = 0) -> Tensor:
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return weights[f"transformer_blocks.{block}.norm1.emb.class_embedder.embedding_table.weight"]


def noised(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, 8, 8, generator=generator), torch.linspace(5, 995, count).long()


def test_attributes(dit: Dit) -> None:
    assert (dit.latent_shape, dit.resolution) == ((4, 8, 8), 32)
    assert (dit.schedule.prediction, dit.schedule.timesteps) == ("epsilon", 1000)
    latents = dit.encode_images(torch.zeros(2, 3, 32, 32))
    assert latents.shape == (2, 4, 8, 8)
    assert dit.decode(latents).shape == (2, 3, 32, 32)
    parts = (dit.transformer, dit.vae)
    assert not any(part.training for part in parts)
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_texts_are_classes(folder: Path, dit: Dit) -> None:
    """Whole words, the longest label at a place, a label of several classes, the null class."""
    found, table = dit.encode_texts(list(NAMED))["hidden"], table_of(folder)
    assert (found.shape, len(table)) == ((len(NAMED), 1, 32), CLASSES + 1)
    for row, rows in zip(found, NAMED.values(), strict=True):
        torch.testing.assert_close(row[0], table[rows].mean(0))
    assert all(dit.refuses(text) is None for text in NAMED)


def test_the_longest_label_at_a_place(tmp_path: Path) -> None:
    """Wherever it stands among the labels, with signs that patterns have a meaning for."""
    labels = ("cat", "cat's eye (gem)", "cat's eye", "a.b", *("dog",) * 3)
    model = Dit(Folder(str(tiny.write_dit(tmp_path, labels))))
    expected = {"a cat's eye (gem).": 1, "a cat's eye": 2, "a cat eye": 0, "a.b": 3}
    for text, row in expected.items():
        assert torch.equal(model.encode_texts([text])["hidden"][0, 0], model.table[row])
    assert model.refuses("acb") == REASON


@pytest.mark.parametrize("text", ["a dog", "cats", "wildcat", " ", "Tinca"])
def test_texts_without_a_class(dit: Dit, text: str) -> None:
    """Are refused, and never stand for the null class."""
    assert dit.refuses(text) == REASON
    with pytest.raises(ValueError, match="names no class"):
        dit.encode_texts(["a cat", text])


def test_prediction_is_the_transformers(folder: Path, dit: Dit) -> None:
    """For every class and the null class, without the learned variance."""
    plain = DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    z, at = noised(CLASSES + 1)
    table = table_of(folder)
    with torch.no_grad():
        expected = plain(z, timestep=at, class_labels=torch.arange(CLASSES + 1)).sample
        found = dit.predict(z, at, {"hidden": table[:, None]})
        null = dit.predict(z[-1:], at[-1:], dit.encode_texts([""]))
        one = dit.predict(z[:1], at[:1], dit.encode_texts(["a tench"]))
    assert expected.shape[1] == 8
    torch.testing.assert_close(found, expected[:, :4])
    torch.testing.assert_close(torch.cat([one, null]), expected[[0, -1], :4])


def test_vectors_are_averaged(dit: Dit) -> None:
    """Any number of them, of any kind, stand for a class by their mean."""
    z, at = noised(2)
    tokens = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = dit.predict(z, at, {"hidden": tokens})
        mean = dit.predict(z, at, {"hidden": tokens.mean(1, keepdim=True)})
    torch.testing.assert_close(found, mean)
    assert not torch.allclose(found[0], found[1])


def test_gradients_reach_the_condition(folder: Path) -> None:
    """Each vector, the same with recomputed activations, of which fewer are kept."""
    model = Dit(Folder(str(folder)))
    condition = {"hidden": torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))}
    plain, kept = tiny.gradients(model, condition)
    model.checkpoint_gradients()
    saved, less = tiny.gradients(model, condition)
    assert plain["hidden"].abs().amax(2).min() > 0
    torch.testing.assert_close(saved, plain, atol=1e-6, rtol=1e-5)
    assert less < kept / 2
    assert not model.transformer.training
    assert all(p.grad is None for p in model.transformer.parameters())


def test_scores_do_not_depend_on_the_batch(folder: Path, root: Path) -> None:
    """Nor on refused texts beside them, which become failures with a reason."""
    texts = ["a tench", "", "a dog", "a crane"]
    rows = [PairRow(i, f"{i}.png", texts[i:]) for i in range(3)]
    rows += [PairRow(3, "none.png", ["a dog", "a cat"]), PairRow(4, "0.png", ["a dog"])]
    found = []
    for size in (64, 3):
        spec = DiffusionSpec(
            resolve(str(folder)), str(root), "diffusionitm", (10, 900), batch_size=size
        )
        lines = spec.build("cpu").score(rows)
        found.append({(line["row"], line["text"]): line for line in lines})
        assert len(lines) == len(found[-1]) == 12
    failed = {pair: line["failure"] for pair, line in found[0].items() if line["failure"]}
    assert failed == {
        **{(row, "a dog"): REASON for row in (0, 1, 2, 4)},
        **{(3, text): "there is no such file" for text in ("a dog", "a cat")},
    }
    assert all(found[0][pair]["l2"] is None for pair in failed)
    for pair, line in found[0].items():
        if pair not in failed:
            np.testing.assert_allclose(found[1][pair]["l2"], line["l2"], rtol=1e-5)
    assert not np.allclose(found[0][0, "a tench"]["l2"], found[0][0, ""]["l2"], rtol=1e-4)
    clean = spec.build("cpu").score([PairRow(0, "0.png", ["a tench", "", "a crane"])])
    for line in clean:
        np.testing.assert_allclose(line["l2"], found[0][0, line["text"]]["l2"], rtol=1e-5)


def test_each_text_is_asked_once(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an image with refused texts alone is not encoded."""
    scorer = DiffusionSpec(resolve(str(folder)), str(root), "diffusionitm", (10,)).build("cpu")
    assert isinstance(scorer, DiffusionScorer)
    asked: list[str] = []
    monkeypatch.setattr(scorer.denoiser, "refuses", lambda text: asked.append(text) or "no")
    monkeypatch.setattr(scorer.denoiser, "encode_images", None)
    lines = scorer.score([PairRow(i, f"{i}.png", ["a dog", "a cat"]) for i in range(3)])
    assert [line["failure"] for line in lines] == ["no"] * 6
    assert all(line["digest"] for line in lines)
    assert sorted(asked) == ["a cat", "a dog"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(folder: Path, dit: Dit, dtype: str) -> None:
    model: Any = load_denoiser(resolve(str(folder)), dtype)
    assert model.transformer.dtype == DTYPES[dtype]
    assert model.vae.dtype == torch.float32  # its config says force_upcast
    assert model.encode_images(torch.zeros(1, 3, 32, 32)).dtype == torch.float32
    z, at = noised(len(NAMED))
    with torch.no_grad():
        found = model.predict(z, at, model.encode_texts(list(NAMED)))
        expected = dit.predict(z, at, dit.encode_texts(list(NAMED)))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def test_published_config(copy: Path, dit: Dit) -> None:
    """The published folders name the transformer's class by its former name, with more settings."""
    file = copy / "transformer" / "config.json"
    former = {"_class_name": "Transformer2DModel", "cross_attention_dim": None}
    former |= {"num_vector_embeds": None, "only_cross_attention": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | former))
    z, at = noised(1)
    model = load_denoiser(resolve(str(copy)))
    with torch.no_grad():
        found = model.predict(z, at, model.encode_texts(["a cat"]))
        torch.testing.assert_close(found, dit.predict(z, at, dit.encode_texts(["a cat"])))


def test_blocks_with_tables_of_their_own(copy: Path) -> None:
    """One vector cannot stand for a class then."""
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    weights[name][3, 0] += 1
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="different class tables"):
        load_denoiser(resolve(str(copy)))


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (None, "has no id2label"),
        ({"0": " , "}, "has no id2label"),
        ({"7": "dog"}, "'7' is not one of 7 classes"),
        ({"dog": "0"}, "'dog' is not one of 7 classes"),
    ],
)
def test_folder_with_bad_labels(copy: Path, labels: Any, reason: str) -> None:
    tiny.write_index(copy, id2label=labels)
    with pytest.raises(InputError, match=reason) as raised:
        load_denoiser(resolve(str(copy)))
    assert str(copy) in str(raised.value)


def test_folder_that_lacks_parts(copy: Path) -> None:
    shutil.rmtree(copy / "transformer")
    shutil.rmtree(copy / "vae")
    with pytest.raises(InputError, match="lacks transformer, vae"):
        resolve(str(copy))


def test_digest_follows_the_labels(copy: Path) -> None:
    """Scores depend on them; not on their order in the file."""
    digest = resolve(str(copy)).digest
    labels = {str(i): names for i, names in enumerate(tiny.LABELS)}
    tiny.write_index(copy, id2label=dict(reversed(labels.items())))
    assert resolve(str(copy)).digest == digest
    tiny.write_index(copy, id2label=labels | {"1": "dog"})
    assert resolve(str(copy)).digest != digest


def test_what_a_dit_does_not_do(folder: Path, dit: Dit, tmp_path: Path) -> None:
    """LoRA, tuning, images for prompts."""
    save_file({"x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="a Dit takes no LoRA"):
        load_denoiser(resolve(str(folder)), lora=str(tmp_path / "a.safetensors"))
    with pytest.raises(InputError, match="takes no LoRA"):
        Tuner(dit, Objective("no-neg"))
    with pytest.raises(InputError, match="Dit generates no images"):
        dit.generate("a cat", [0], 2, 3.0)
