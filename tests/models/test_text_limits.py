"""Texts that a model reads not to their end are counted once a run, by each kind of tokenizer."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest

from diffitm.models.clip import load_clip, resolve_clip
from diffitm.models.loading import load_denoiser, resolve
from diffitm.models.text_limits import TextLimits, tell_long_texts

TEXTS = ["a red circle", *(f"{'a red circle ' * n}number {n}" for n in range(2, 60, 3))]


def test_a_diffusion_model(caplog: pytest.LogCaptureFixture) -> None:
    """As many as the model itself says that it cuts."""
    source = resolve("shapes")
    denoiser = load_denoiser(source, "fp32", "cpu")
    expected = sum(denoiser.cuts(text) for text in TEXTS)
    assert 0 < expected < len(TEXTS)
    with caplog.at_level(logging.WARNING, "diffitm"):
        assert tell_long_texts(source, TEXTS * 2) == expected
    assert f"shapes reads {expected} of {len(TEXTS)} texts not to their end" in caplog.text
    caplog.clear()
    assert tell_long_texts(source, TEXTS[:1]) == 0
    assert not caplog.text


def test_a_clip() -> None:
    source = resolve_clip("shapes")
    tokenizer = load_clip(source).tokenizer
    length = tokenizer.context_length
    lengths = [len(tokenizer.tokenizer(text).input_ids) for text in TEXTS]
    expected = sum(n > length for n in lengths)
    assert 0 < expected < len(TEXTS)
    assert tell_long_texts(source, TEXTS) == expected


def test_a_model_without_texts() -> None:
    """DiT has classes and no tokenizer: nothing is cut."""
    source = replace(resolve("shapes"), family="DiTPipeline")
    assert tell_long_texts(source, TEXTS) == 0
    assert (TextLimits(source).cut(TEXTS), TextLimits(source).most) == (set(), 0)


@pytest.mark.parametrize(
    "source", [resolve("shapes"), resolve_clip("shapes")], ids=["U-Net", "CLIP"]
)
def test_texts_that_are_the_same_to_a_model(source: Any) -> None:
    """Those that differ behind what is read, and no others."""
    limits = TextLimits(source)
    start = "a red circle and " * limits.most
    same, other = [f"{start}a square", f"{start}a cross"], f"a blue {start}"
    assert limits.cut([*same, other, "a square"]) == {*same, other}
    read = limits.read([*same, other, "a square", "a cross"])
    assert read[0] == read[1]
    assert len(set(read)) == 4
