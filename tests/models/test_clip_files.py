"""CLIP by NAME:FILE: what a weights file does not say, what it may hold, and what is said of others."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from diffitm.core.errors import InputError
from diffitm.models.clip import check_clip, load_clip, resolve_clip
from diffitm.models.embedded import SHAPES
from diffitm.scoring.specs import ClipSpec

SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
TAG = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """An architecture that open_clip knows as small and small-quickgelu; its tags, to be filled."""
    configs = {"small": SMALL, "small-quickgelu": {**SMALL, "quick_gelu": True}}
    known = {**open_clip.factory._MODEL_CONFIGS, **configs}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", known)
    tags: dict[str, dict[str, Any]] = {}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tags)
    return tags


@pytest.fixture
def state(small: object) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return dict(open_clip.create_model("small").state_dict())


@pytest.fixture
def file(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "tuned.pt")
    return tmp_path / "tuned.pt"


def activation(name: str) -> str:
    return type(
        load_clip(resolve_clip(name)).model.visual.transformer.resblocks[0].mlp.gelu
    ).__name__


def test_activation_of_all_published_weights(
    small: dict[str, Any], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Is a file's, is said, and is part of what its scores depend on; as it is for diva, which loads the
    same source."""
    small |= {"openai": TAG | {"quick_gelu": True}, "other": TAG | {"quick_gelu": True}}
    caplog.set_level(logging.INFO, "diffitm")
    source = resolve_clip(f"small:{file}")
    assert source.quick_gelu and activation(source.name) == "QuickGELU"
    assert "QuickGELU is taken, as all published weights of small have" in caplog.text
    assert ClipSpec(source, "data").store_config()["quick_gelu"] is True
    tagged = ClipSpec(resolve_clip("small:openai"), "data").store_config()
    assert "quick_gelu" not in tagged  # its tag says it, and older stores stay


def test_activation_where_published_weights_differ(
    small: dict[str, Any], file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """GELU, with a warning that says how to have the other; which then needs no guess."""
    small |= {"openai": TAG | {"quick_gelu": True}, "other": TAG}
    assert activation(f"small:{file}") == "GELU"
    assert "openai have QuickGELU): GELU is taken" in caplog.text
    assert "give small-quickgelu:FILE" in caplog.text
    assert "quick_gelu" not in ClipSpec(resolve_clip(f"small:{file}"), "data").store_config()
    caplog.clear()
    assert activation(f"small-quickgelu:{file}") == "QuickGELU"
    assert "activation" not in caplog.text


@pytest.mark.parametrize("name", ["RN50", "RN101", "RN50x4", "ViT-L-14-336", "ViT-H-14-378"])
def test_architectures_of_quick_gelu(name: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_bytes(b"not read yet")
    assert resolve_clip(f"{name}:{file}").quick_gelu
    assert not resolve_clip(f"{name}-quickgelu:{file}").quick_gelu  # its config has it


def test_longer_text_positions(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """As Long-CLIP's 248 are refused, not stretched; under either of open_clip's names."""
    state["positional_embedding"] = torch.zeros(26, 8)
    torch.save(state, tmp_path / "long.pt")
    with pytest.raises(
        InputError, match="has 26 text positions, small has 8: they are for another"
    ):
        load_clip(resolve_clip(f"small:{tmp_path / 'long.pt'}"))


def test_numbers_beside_the_tensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A training checkpoint's numpy numbers and settings are read."""
    checkpoint = {
        "epoch": np.int64(3),
        "loss": np.float32(0.5),
        "history": np.zeros(2),
        "args": argparse.Namespace(lr=np.float64(0.1)),
        "state_dict": {f"module.{k}": v for k, v in state.items()},
    }
    torch.save(checkpoint, tmp_path / "epoch_3.pt")
    loaded = load_clip(resolve_clip(f"small:{tmp_path / 'epoch_3.pt'}")).model
    torch.testing.assert_close(dict(loaded.state_dict()), state)


class Strange:
    """What reading a file must not import."""


def test_other_objects_beside_the_tensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Are named, with what helps."""
    torch.save({"state_dict": state, "extra": Strange()}, tmp_path / "odd.pt")
    with pytest.raises(
        InputError, match=r"odd\.pt holds more .*\.Strange\).*save its tensors alone"
    ):
        load_clip(resolve_clip(f"small:{tmp_path / 'odd.pt'}"))


@pytest.fixture
def program(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The weights as OpenAI published its CLIPs, in an archive of torch.jit."""
    model = open_clip.create_model("small-quickgelu")
    model.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (torch.zeros(1, 3, 16, 16), torch.zeros(1, 8, dtype=torch.long))
        traced = torch.jit.trace(model.eval(), inputs, check_trace=False)
        torch.jit.save(traced, tmp_path / "small.pt")
    return tmp_path / "small.pt"


def test_torchscript(program: Path) -> None:
    """An archive is a program: not run, but how to have its tensors is said."""
    with pytest.raises(InputError, match=r"small\.pt is a TorchScript archive.*torch\.jit\.load"):
        load_clip(resolve_clip(f"small:{program}"))


def test_torchscript_of_openai(
    small: dict[str, Any], program: Path, state: dict[str, torch.Tensor]
) -> None:
    """Its own files are known by their content, and have QuickGELU whatever the other tags have."""
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    small |= {"openai": TAG | {"url": f"https://host/{digest}/small.pt"}, "other": TAG}
    source = resolve_clip(f"small:{program}")
    assert source.quick_gelu
    check_clip(source)
    torch.testing.assert_close(dict(load_clip(source).model.state_dict()), state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {f"model.{k}": v for k, v in s.items()}, "are missing: .* are unknown: model"),
        (lambda s: {k: v for k, v in s.items() if "ln_post" not in k}, "2 are missing: visual.ln_p"),
        (lambda s: s | {"head.weight": torch.zeros(2)}, "1 are unknown: head.weight"),
        (lambda s: s | {"visual.proj": torch.zeros(3, 3)}, r"visual.proj \[3, 3\] instead of \[16, 8\]"),
        (lambda s: {"model": s}, "holds its tensors under 'model'"),
        (lambda s: [1], "holds no tensors by name, but list"),
    ],
)  # fmt: skip
def test_weights_of_something_else(
    change: Any, text: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """In one line, however many tensors do not fit, before the model is made."""
    told = refusal(change(state), text, tmp_path)
    assert len(told.splitlines()) == 1 and len(told) < 1000


def refusal(found: Any, text: str, folder: Path) -> str:
    """What the check says of a file that holds `found`, with its name."""
    file = folder / "weights.pt"
    torch.save(found, file)
    with pytest.raises(InputError, match=text) as raised:
        check_clip(resolve_clip(f"small:{file}"))
    assert str(file) in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: {k: v.to(torch.int8) for k, v in s.items()}, "is of int8: quantised weights are not read"),
        (lambda s: {k: v.to(torch.float8_e4m3fn) for k, v in s.items()}, "is of float8_e4m3fn: quantised"),
        (lambda s: s | {"logit_bias": torch.ones(())}, "1 are unknown: logit_bias. A logit_bias is of a"),
        (lambda s: s | {"epoch": 3, "note": "x"}, "2 are unknown: epoch, note"),
        (lambda s: s | {"attn_mask": torch.ones(8, 8)}, "1 are unknown: attn_mask"),
        (lambda s: s | {"text.position_ids": torch.ones(8)}, r"1 are unknown: text\.position_ids"),
        (lambda s: {"state_dict": None}, "holds under 'state_dict' no tensors by name, but NoneType"),
        (lambda s: {1: torch.ones(2)}, "has 1 where the name of a tensor should be"),
        (lambda s: {"lr": 1}, "holds no tensors by name, but dict of lr"),
        (lambda s: s | {"text_model.x": torch.ones(2)}, "Its names are those of transformers"),
    ],
)  # fmt: skip
def test_what_open_clip_would_take_or_refuse_late(
    change: Any, text: str, state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Is refused by the check, with the name of what is wrong."""
    refusal(change(state), text, tmp_path)


def test_quantised_safetensors(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({k: v.to(torch.bfloat16) for k, v in state.items()}, file)
    load_clip(resolve_clip(f"small:{file}"))
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, file)
    with pytest.raises(InputError, match="is of float8_e4m3fn: quantised weights are not read"):
        check_clip(resolve_clip(f"small:{file}"))


def test_weights_of_a_training_that_diverged(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    torch.save(state | {"visual.proj": state["visual.proj"] * torch.nan}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"visual\.proj holds NaN or infinite values"):
        load_clip(resolve_clip(f"small:{tmp_path / 'weights.pt'}"))


def test_a_shape_of_ones_own_architecture(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The architecture that is refused is not what is suggested."""
    torch.save(state | {"ln_final.weight": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=r"ln_final\.weight \[3\] instead of \[8\]") as raised:
        check_clip(resolve_clip(f"small:{tmp_path / 'weights.pt'}"))
    assert "Its shapes are those of" not in str(raised.value)


def test_files_that_are_named_or_written_otherwise(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    save_file(state, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", **{key: value.numpy() for key, value in state.items()})
    today = {"when": datetime.date(2026, 1, 1), "state_dict": state}
    torch.save(today, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    for name, text in (
        ("a.pt", r"a\.pt is a safetensors file by its content"),
        ("b.npz", r"b\.npz is an archive of numpy's, .*; small has none"),
        ("c.pt", r"c\.pt holds more than tensors and numbers \(datetime\.date\)"),
    ):
        with pytest.raises(InputError, match=text):
            check_clip(resolve_clip(f"small:{tmp_path / name}"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "a page of a web site"),
        (b"PK\x03\x04 nothing", "is no whole"),
    ],
)  # fmt: skip
def test_what_stands_in_the_place_of_weights(
    content: bytes, text: str, suffix: str, small: object, tmp_path: Path
) -> None:
    file = tmp_path / f"weights.{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=text) as raised:
        check_clip(resolve_clip(f"small:{file}"))
    assert str(file) in str(raised.value)


def test_a_folder_is_checked_too(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHAPES / "clip", tmp_path / "clip"))
    check_clip(resolve_clip(str(folder)))
    save_file({"visual.proj": torch.zeros(2, 2)}, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match="does not fit its config"):
        check_clip(resolve_clip(str(folder)))


def test_a_folder_that_says_nothing_of_its_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(SHAPES / "clip", tmp_path / "clip"))
    resolve_clip(str(folder))
    assert not caplog.text
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["preprocess_cfg"]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    resolve_clip(str(folder))
    assert "does not say all, so there is taken: mean (0.48" in caplog.text
    for content, text in (("{", "is no JSON"), ("{}", "has no model_cfg of both towers")):
        (folder / "open_clip_config.json").write_text(content)
        with pytest.raises(InputError, match=text):
            resolve_clip(str(folder))


def test_a_file_without_name(tmp_path: Path) -> None:
    """The architecture that its shapes have is suggested, and not all there are."""
    with torch.device("meta"):
        shapes = open_clip.create_model("ViT-S-32", load_weights=False, device="meta").state_dict()
    state = {k: torch.zeros(()).expand(v.shape) for k, v in shapes.items()}
    torch.save(state, tmp_path / "tuned.pt")
    with pytest.raises(
        InputError, match=r"such as ViT-S-32:.*Its shapes are those of ViT-S-32"
    ) as raised:
        resolve_clip(str(tmp_path / "tuned.pt"))
    assert len(str(raised.value)) < 500
    with pytest.raises(InputError) as raised:
        resolve_clip("ViT-L14:openai")
    assert "did you mean 'ViT-L-14'" in str(raised.value) and len(str(raised.value)) < 300
    for name in ("vit-b-32", "ViT-B/32"):
        with pytest.raises(InputError, match="unknown model; did you mean 'ViT-B-32'"):
            resolve_clip(f"{name}:openai")
