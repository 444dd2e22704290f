"""A CLIP written for open_clip and for transformers is the same model in the stock loaders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load, save_file
from timm.models import VisionTransformer
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipModel,
    SiglipVisionModel,
)

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.clip import ClipSource, load_clip, preprocessing, resolve_clip
from diffitm.models.clip_export import (
    stock_name,
    stock_preprocessing,
    write_open_clip,
    write_transformers,
)
from diffitm.models.embedded import SHAPES
from diffitm.models.weight_cache import content_digest
from tests import tiny_clip

TEXTS = ["a red circle", "two blue squares above a green cross"]
OPENAI = ClipSource("tiny", "ViT-B-32", "file.pt", "")  # has open_clip's default tokenizer


def trained(name: str) -> tuple[Any, ClipSource]:
    """A loaded model whose weights then moved away from the source's."""
    source = resolve_clip(name)
    model = load_clip(source)[0]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.visual.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=generator)
    return model, source


def pixels(model: Any) -> Tensor:
    return torch.randn(2, 3, *model.visual.image_size, generator=torch.Generator().manual_seed(2))


def words(model: Any) -> Tensor:
    """Any tokens: pooling must agree on every place, not just on what a tokenizer makes."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(model.vocab_size, (4, model.context_length), generator=generator)


def assert_same(found: Any, model: Any) -> None:
    """Two open_clip models in eval mode embed alike."""
    with torch.no_grad():
        for name, given in (("encode_image", pixels(model)), ("encode_text", words(model))):
            ours, theirs = getattr(model, name)(given), getattr(found.eval(), name)(given)
            assert ours.std() > 1e-3
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def assert_transformers_same(folder: Path, model: Any, kind: Any = CLIPModel) -> Any:
    """The whole model's embeddings, scale and bias are those of the open_clip model."""
    found, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    image, text = pixels(model), words(model)
    with torch.no_grad():
        ours = model.encode_image(image), model.encode_text(text)
        assert min(part.std() for part in ours) > 1e-3
        theirs = found.get_image_features(image), found.get_text_features(text)
        logits = found(pixel_values=image, input_ids=text).logits_per_image
        expected = model.get_logits(image, text)[0]
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other.pooler_output, mine, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    return found


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Tiny configs that open_clip knows by name."""
    configs: dict[str, Any] = {
        "tiny-clip": tiny_clip.vit_config(),
        "tiny-clip-quickgelu": tiny_clip.vit_config(quick_gelu=True),
        "tiny-siglip": tiny_clip.siglip_config(text={"hf_tokenizer_name": str(SHAPES / "clip")}),
    }
    known = {**open_clip.factory._MODEL_CONFIGS, **configs}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    return configs


def weights_of(config: dict[str, Any], folder: Path) -> Path:
    save_file(tiny_clip.build(config).state_dict(), folder / "tuned.safetensors")
    return folder / "tuned.safetensors"


@pytest.mark.parametrize(
    ("config", "preprocess"),
    [
        (None, {}),
        (tiny_clip.vit_config(), {"interpolation": "bilinear", "mean": [0.1, 0.2, 0.3]}),
        (tiny_clip.vit_config(quick_gelu=True, custom_text=True), {}),
        (tiny_clip.siglip_config(), tiny_clip.HALF),
    ],
    ids=["shapes", "gelu", "custom-text", "siglip"],
)
def test_open_clip_folder(
    tmp_path: Path, config: dict[str, Any] | None, preprocess: dict[str, Any]
) -> None:
    """Weights in memory, preprocessing and tokenizer come back through both loaders."""
    name = "shapes"
    if config:
        name = str(tiny_clip.write(tmp_path / "in", config, **preprocess))
    (model, source), out = trained(name), tmp_path / "out"
    write_open_clip(model, source, str(out))
    stock, _, transform = open_clip.create_model_and_transforms(f"local-dir:{out}")
    ours, ours_transform, tokenizer = load_clip(resolve_clip(str(out)))
    assert_same(stock, model)
    assert_same(ours, model)
    assert stock.visual.preprocess_cfg == model.visual.preprocess_cfg
    image = picture(50, 40)
    before = load_clip(source)
    assert torch.equal(transform(image), before[1](image))
    assert torch.equal(ours_transform(image), before[1](image))
    assert torch.equal(tokenizer(TEXTS), before[2](TEXTS))
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS), before[2](TEXTS))


def test_weights_alone_load_by_name(tmp_path: Path, named: dict[str, Any]) -> None:
    """QuickGELU that only the tag knew of is in the written config, and in the name to load by."""
    file = weights_of(named["tiny-clip"], tmp_path)
    source = ClipSource("tiny-clip:quick", "tiny-clip", str(file), "", quick_gelu=True)
    model, out = load_clip(source)[0], tmp_path / "out"
    write_open_clip(model, source, str(out))
    assert json.loads((out / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"]
    assert_same(open_clip.create_model_and_transforms(f"local-dir:{out}")[0], model)
    made = str(out / "open_clip_model.safetensors")
    assert stock_name(source) == "tiny-clip-quickgelu"
    found = open_clip.create_model_and_transforms("tiny-clip-quickgelu", pretrained=made)[0]
    assert_same(found, model)
    wrong = open_clip.create_model_and_transforms("tiny-clip", pretrained=made)[0].eval()
    assert (wrong.encode_image(pixels(model)) - model.encode_image(pixels(model))).std() > 1e-4


def test_every_published_tag_has_a_stock_name() -> None:
    assert stock_name(resolve_clip("ViT-L-14:openai")) == "ViT-L-14-quickgelu"
    assert stock_name(resolve_clip("ViT-L-14:laion2b_s32b_b82k")) == "ViT-L-14"
    assert stock_name(resolve_clip("shapes")) is None
    for model, tag in open_clip.list_pretrained():
        source = resolve_clip(f"{model}:{tag}")
        config = open_clip.get_model_config(stock_name(source))
        assert bool(config.get("quick_gelu")) >= source.quick_gelu


def test_a_weights_file_is_preprocessed_as_what_is_published(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """SigLIP's own constants; a warning where the published weights have several."""
    siglip = ClipSource("x", "ViT-SO400M-14-SigLIP", "x.pt", "")
    half = [0.5, 0.5, 0.5]
    given = {"mean": half, "std": half, "interpolation": "bicubic", "resize_mode": "squash"}
    assert preprocessing(siglip) == {f"image_{key}": value for key, value in given.items()}
    assert preprocessing(replace(siglip, pretrained="webli")) == {}
    assert preprocessing(ClipSource("x", "ViT-L-14-CLIPA", "x.pt", "")) == {
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_interpolation": "bilinear",
        "image_resize_mode": "squash",
    }
    assert caplog.text == ""
    found = preprocessing(ClipSource("mine.pt", "ViT-L-14", "mine.pt", ""))
    assert found.keys() == {"image_interpolation", "image_resize_mode"}
    assert "clip mine.pt: mean differs among the published weights of ViT-L-14" in caplog.text


def test_weights_alone_need_their_preprocessing(tmp_path: Path, named: dict[str, Any]) -> None:
    model = tiny_clip.build(named["tiny-clip"], **tiny_clip.HALF)
    file, image = weights_of(named["tiny-clip"], tmp_path), picture(50, 40)
    wanted = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), False)
    arguments = stock_preprocessing(model)
    assert arguments["image_resize_mode"] == "squash" and arguments["image_mean"] == (0.5,) * 3
    make = partial(open_clip.create_model_from_pretrained, "tiny-clip", str(file))
    assert torch.equal(make(**arguments)[1](image), wanted(image))
    assert not torch.equal(make()[1](image), wanted(image))
    plain = tiny_clip.build(named["tiny-clip"])
    assert stock_preprocessing(plain) == {}
    other: dict[str, Any] = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    assert stock_preprocessing(tiny_clip.build(named["tiny-clip"], **other)) == {
        "image_mean": (0.1, 0.2, 0.3),
        "image_std": (0.4, 0.5, 0.6),
    }


def test_a_tokenizer_from_elsewhere_is_written(tmp_path: Path, named: dict[str, Any]) -> None:
    """open_clip takes a folder's tokenizer from the folder, as SigLIP's config names one."""
    source = resolve_clip(f"tiny-siglip:{weights_of(named['tiny-siglip'], tmp_path)}")
    model, _, tokenizer = load_clip(source)
    write_open_clip(model, source, str(tmp_path / "out"))
    found = load_clip(resolve_clip(str(tmp_path / "out")))
    assert_same(found[0], model)
    assert torch.equal(found[2](TEXTS), tokenizer(TEXTS))
    assert write_transformers(model, source, str(tmp_path / "hf")) is None
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    padded = theirs(TEXTS, padding="max_length", max_length=16, return_tensors="pt")
    assert torch.equal(padded.input_ids, tokenizer(TEXTS))


def test_digest_names_the_clip_only(tmp_path: Path) -> None:
    """What a run leaves beside the CLIP is no part of it; each file that open_clip reads is."""
    (model, source), out = trained("shapes"), tmp_path / "out"
    write_open_clip(model, source, str(out))
    before = resolve_clip(str(out)).digest
    assert before != resolve_clip("shapes").digest
    assert write_transformers(model, source, str(out / "transformers")) is None
    (out / "train").mkdir()
    for name in ("train/weights.safetensors", "averaged.safetensors", "log.jsonl", "config.json"):
        (out / name).write_bytes(b"{}")
    assert resolve_clip(str(out)).digest == before
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "vocab.json"):
        other = Path(shutil.copytree(out, tmp_path / name))
        (other / name).write_bytes((out / name).read_bytes() + b" ")
        assert resolve_clip(str(other)).digest != before


def test_digest_of_the_embedded_clip_is_that_of_all_its_files() -> None:
    files = sorted(path for path in (SHAPES / "clip").rglob("*") if path.is_file())
    assert len(files) == 5
    assert resolve_clip("shapes").digest == content_digest(files)


def test_weights_where_open_clip_does_not_look(tmp_path: Path) -> None:
    (model, source), out = trained("shapes"), tmp_path / "out"
    write_open_clip(model, source, str(out))
    (out / "train").mkdir()
    (out / "open_clip_model.safetensors").rename(out / "train" / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="has no weights"):
        resolve_clip(str(out))


def test_uri(tmp_path: Path) -> None:
    """Both forms reach an object store whole."""
    model, source = trained("shapes")
    write_open_clip(model, source, "memory://export/clip")
    assert write_transformers(model, source, "memory://export/clip/transformers") is None
    for path in storage.files("memory://export/clip", recursive=True):
        local = tmp_path / path.partition("export/")[2]
        local.parent.mkdir(parents=True, exist_ok=True)
        local.write_bytes(storage.read_bytes(f"memory://{path.lstrip('/')}"))
    assert_same(load_clip(resolve_clip(str(tmp_path / "clip")))[0], model)
    assert_transformers_same(tmp_path / "clip" / "transformers", model)


@pytest.mark.parametrize(
    ("config"),
    [
        tiny_clip.vit_config(quick_gelu=True),
        tiny_clip.vit_config(head_width=8, image_size=40, text={"layers": 1, "context_length": 9}),
        tiny_clip.vit_config(quick_gelu=True, custom_text=True, vision={"mlp_ratio": 2.5}),
        tiny_clip.vit_config(text={"pool_type": "eos", "eos_id": 320, "vocab_size": 330}),
        tiny_clip.vit_config(text={"act_kwargs": {"approximate": "tanh"}}, embed_dim=32),
    ],
    ids=["quickgelu", "sizes", "custom-text", "eos", "tanh"],
)
def test_transformers_clip(tmp_path: Path, config: dict[str, Any]) -> None:
    model = tiny_clip.build(config)
    assert write_transformers(model, OPENAI, str(tmp_path)) is None
    assert_transformers_same(tmp_path, model)


def test_parts_of_transformers_clip(tmp_path: Path) -> None:
    """What others load of the folder: the image tower with and without projection, the text tower."""
    model, source = trained("shapes")
    assert write_transformers(model, source, str(tmp_path)) is None
    given = pixels(model)
    with torch.no_grad():
        pooled = CLIPVisionModel.from_pretrained(tmp_path)(given)
        image = CLIPVisionModelWithProjection.from_pretrained(tmp_path)(given).image_embeds
        text = CLIPTextModelWithProjection.from_pretrained(tmp_path)(words(model)).text_embeds
        layers = model.visual.forward_intermediates(given, output_fmt="NLC")["image_intermediates"]
        expected, said = model.encode_image(given), model.encode_text(words(model))
    torch.testing.assert_close(pooled.last_hidden_state[:, 1:], layers[-1], atol=1e-5, rtol=0)
    projected = pooled.pooler_output @ model.visual.proj
    for found, wanted in ((projected, expected), (image, expected), (text, said)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh"])
def test_transformers_siglip(tmp_path: Path, act: str) -> None:
    model = tiny_clip.siglip()
    model.visual.trunk = VisionTransformer(
        img_size=40, patch_size=8, embed_dim=32, depth=3, num_heads=4, mlp_ratio=3.3, num_classes=0,
        class_token=False, global_pool="map", act_layer=act,
    ).eval()  # fmt: skip
    model.visual.image_size = (40, 40)
    assert write_transformers(model, OPENAI, str(tmp_path)) is None
    assert_transformers_same(tmp_path, model, SiglipModel)
    with torch.no_grad():
        image = SiglipVisionModel.from_pretrained(tmp_path)(pixels(model))
        features = model.visual.trunk.forward_features(pixels(model))
        embedded = model.encode_image(pixels(model))
    torch.testing.assert_close(image.last_hidden_state, features, atol=1e-5, rtol=0)
    torch.testing.assert_close(image.pooler_output, embedded, atol=1e-5, rtol=0)


def picture(width: int, height: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("config", "preprocess"),
    [
        (tiny_clip.vit_config(), {"interpolation": "bilinear"}),
        (tiny_clip.siglip_config(), tiny_clip.HALF),
    ],
    ids=["shortest", "squash"],
)
def test_processor(tmp_path: Path, config: dict[str, Any], preprocess: dict[str, Any]) -> None:
    """Equal without resizing; else to 2 levels, and equal if transformers resizes PIL images, too."""
    source = resolve_clip(str(tiny_clip.write(tmp_path / "in", config, **preprocess)))
    model, transform, _ = load_clip(source)
    assert write_transformers(model, source, str(tmp_path / "out")) is None
    found = AutoImageProcessor.from_pretrained(tmp_path / "out")
    exact = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    level = 1 / 255 / min(model.visual.preprocess_cfg["std"])
    for size, near in (((32, 32), 1e-6), ((100, 60), 2.01 * level)):
        wanted = transform(picture(*size))
        for processor, tolerance in ((found, near), (exact, 1e-6)):
            made = processor(picture(*size), return_tensors="pt").pixel_values[0]
            torch.testing.assert_close(made, wanted, atol=tolerance, rtol=0)


def test_tokenizer_of_openai(tmp_path: Path) -> None:
    """The same ids up to the end token, and with transformers' padding the same embeddings."""
    model = tiny_clip.vit()
    assert write_transformers(model, OPENAI, str(tmp_path)) is None
    ours = open_clip.get_tokenizer("ViT-B-32")(TEXTS, context_length=16)
    theirs = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, padding=True, return_tensors="pt")
    kept = ours[:, : theirs.input_ids.shape[1]]
    assert torch.equal(theirs.input_ids[kept != 0], kept[kept != 0])
    assert theirs.input_ids[0, -1] == 49407
    found = CLIPModel.from_pretrained(tmp_path)
    with torch.no_grad():
        texts = found.get_text_features(**theirs).pooler_output
        torch.testing.assert_close(texts, model.encode_text(ours), atol=1e-5, rtol=0)


RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 32}
TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_clip.vit_config(vision=RESNET), "ModifiedResNet"),
        (tiny_clip.vit_config(vision={"pool_type": "avg"}), "pools by its class token"),
        (tiny_clip.vit_config(vision={"attentional_pool": True}), "attn_pool"),
        (tiny_clip.vit_config(vision={"no_ln_pre": True}), "pre_layrnorm"),
        (tiny_clip.vit_config(vision={"ls_init_value": 0.1}), "ls_1"),
        (tiny_clip.vit_config(text={"pool_type": "eos"}), "end token 2"),
        (tiny_clip.vit_config(text={"pool_type": "last"}), "pools by 'last'"),
        (tiny_clip.vit_config(custom_text=True, text={"no_causal_mask": True}), "text tower gives"),
        (tiny_clip.vit_config(custom_text=True, text={"proj_bias": True}), "has a bias"),
        (tiny_clip.siglip_config(vision=TIMM), "not SigLIP's"),
        (tiny_clip.siglip_config(vision={"timm_proj": "linear"}), "not SigLIP's"),
        (tiny_clip.siglip_config(text={"no_causal_mask": False}), "text tower gives"),
        (tiny_clip.siglip_config(text={"proj_type": "none", "width": 32}), "text_model.head"),
    ],
)
def test_no_form(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    told = write_transformers(tiny_clip.build(config), OPENAI, str(tmp_path / "out"))
    assert told is not None
    assert reason in told
    assert not (tmp_path / "out").exists()


def test_no_form_of_preprocessing(tmp_path: Path) -> None:
    model = tiny_clip.build(tiny_clip.vit_config(), resize_mode="longest")
    assert "'longest'" in str(write_transformers(model, OPENAI, str(tmp_path / "out")))


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    """In training, in bf16: the written weights are float32, the model's are untouched."""
    model = tiny_clip.vit().bfloat16().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert write_transformers(model, OPENAI, str(tmp_path)) is None
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    written = load((tmp_path / "model.safetensors").read_bytes())
    assert {value.dtype for value in written.values()} == {torch.float32}
