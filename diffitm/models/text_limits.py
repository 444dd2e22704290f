"""Texts that are longer than a model's encoder reads, by its tokenizers alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import open_clip
from transformers import PreTrainedTokenizerBase

from diffitm.core import registry
from diffitm.core.errors import InputError
from diffitm.models import clip, loading
from diffitm.models.denoiser import Denoiser
from diffitm.models.families import FAMILIES

log = logging.getLogger("diffitm")
MARKS = 2  # around a text's tokens
AT_ONCE = 10_000


class TextLimits:
    """How far a model reads texts: its tokenizers, each with the tokens that its encoder reads.

    `most` is the least of these numbers, the marks of begin and end among them; 0 of a model that reads no
    texts, such as DiT. Raises InputError for a tokenizer that cannot be loaded.
    """

    def __init__(self, source: loading.ModelSource | clip.ClipSource) -> None:
        try:
            self._limits = _limits(source)
        except (OSError, ValueError) as error:
            field = "clip" if isinstance(source, clip.ClipSource) else source.field
            text = f"{source.name!r}: its tokenizer cannot be loaded: {error}"
            raise InputError(text, field) from error
        self._templated: Callable[[str, Any], str] = lambda text, _: text
        if isinstance(source, loading.ModelSource):
            self._templated = _kind(source).templated
        self.most = min((most for _, most in self._limits), default=0)

    def cut(self, texts: Iterable[str]) -> set[str]:
        """Those of the texts that are not read to their end."""
        distinct, cut = dict.fromkeys(texts), set[str]()
        for tokenizer, most in self._limits:
            given = {text: self._templated(text, tokenizer) for text in distinct}
            # A token is a byte or more: a short text needs no tokenizer.
            long = [text for text, plain in given.items() if len(plain.encode()) + MARKS > most]
            for start in range(0, len(long), AT_ONCE):
                part = long[start : start + AT_ONCE]
                lengths = _lengths(tokenizer, [given[text] for text in part])
                cut |= {text for text, n in zip(part, lengths, strict=True) if n > most}
        return cut

    def read(self, texts: Sequence[str]) -> list[tuple[tuple[int, ...], ...]]:
        """What is read of each text: the encoders' inputs. Texts that have the same are one to the model."""
        columns = [
            _inputs(tokenizer, [self._templated(text, tokenizer) for text in texts], most)
            for tokenizer, most in self._limits
        ]
        return list(zip(*columns, strict=True))


def tell_long_texts(source: loading.ModelSource | clip.ClipSource, texts: Iterable[str]) -> int:
    """Say how many of the texts the model does not read to their end, and return that.

    Raises InputError for a tokenizer that cannot be loaded.
    """
    limits, distinct = TextLimits(source), dict.fromkeys(texts)
    cut = limits.cut(distinct)
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
    family = FAMILIES[source.family]
    parts = [part for part in source.parts if part.startswith("tokenizer")]
    if not parts:
        return []
    name = "unet" if "unet" in family.parts else "transformer"
    network = registry.load(str(family.parts[name]))
    settings = network.load_config(location, subfolder=name, revision=revision)
    given = _kind(source).lengths_of(settings)
    found = []
    for part in [part for part in parts if part in given] or parts:
        kind = registry.load(str(family.parts[part]))
        tokenizer = kind.from_pretrained(location, subfolder=part, revision=revision)
        found.append((tokenizer, int(given.get(part) or tokenizer.model_max_length)))
    return found


def _kind(source: loading.ModelSource) -> type[Denoiser]:
    kind: type[Denoiser] = registry.load(FAMILIES[source.family].denoiser)
    return kind


def _lengths(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text, its marks among them."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        return [len(tokenizer.encode(text)) + MARKS for text in texts]
    return [len(ids) for ids in _plain(tokenizer)(texts).input_ids]


def _inputs(tokenizer: Any, texts: list[str], most: int) -> list[tuple[int, ...]]:
    """What an encoder is given of each text."""
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        given = tokenizer(texts, truncation=True, max_length=most).input_ids
    else:
        given = tokenizer(texts).tolist()
    return [tuple(ids) for ids in given]


def _plain(tokenizer: Any) -> Any:
    return getattr(tokenizer, "tokenizer", tokenizer)  # open_clip wraps those of transformers
