"""Texts that are longer than a model's encoder reads, by its tokenizers alone."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import open_clip
from transformers import CLIPTokenizer

from diffitm.core.errors import InputError
from diffitm.models import clip, loading

log = logging.getLogger("diffitm")
MARKS = 2  # around a text's tokens
AT_ONCE = 10_000


def tell_long_texts(source: loading.ModelSource | clip.ClipSource, texts: Iterable[str]) -> int:
    """Say how many of the texts the model does not read to their end, and return that.

    Raises InputError for a tokenizer that cannot be loaded.
    """
    try:
        limits = _limits(source)
    except (OSError, ValueError) as error:
        field = "clip" if isinstance(source, clip.ClipSource) else source.field
        text = f"{source.name!r}: its tokenizer cannot be loaded: {error}"
        raise InputError(text, field) from error
    distinct = dict.fromkeys(texts)
    cut: set[str] = set()
    for tokenizer, most in limits:
        # A token is a byte or more: a short text needs no tokenizer.
        long = [text for text in distinct if len(text.encode()) + MARKS > most]
        for start in range(0, len(long), AT_ONCE):
            part = long[start : start + AT_ONCE]
            cut |= {t for t, n in zip(part, _lengths(tokenizer, part), strict=True) if n > most}
    if cut:
        first = next(text for text in distinct if text in cut)
        log.warning(
            "%s reads %s of %s texts not to their end, such as %r",
            source.name, f"{len(cut):,}", f"{len(distinct):,}", f"{first[:60]}..",
        )  # fmt: skip
    return len(cut)


def _limits(source: loading.ModelSource | clip.ClipSource) -> list[tuple[Any, int]]:
    """The model's tokenizers, each with the tokens that its encoder reads."""
    if isinstance(source, clip.ClipSource):
        tokenizer = open_clip.get_tokenizer(clip.on_machine(source)[0])
        return [(tokenizer, int(tokenizer.context_length))]
    location, revision = loading.on_machine(source)
    parts = loading.FAMILIES[source.family].parts
    tokenizers = [
        CLIPTokenizer.from_pretrained(location, subfolder=part, revision=revision)
        for part in parts
        if part.startswith("tokenizer")
    ]
    return [(tokenizer, int(tokenizer.model_max_length)) for tokenizer in tokenizers]


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, its marks among them."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return [len(tokenizer.encode(text)) + MARKS for text in texts]
    plain = getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps those of transformers
    return [len(ids) for ids in plain(texts).input_ids]
