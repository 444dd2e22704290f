"""ARO's four perturbations of a caption's word order, each a pure function of (caption, seed).

The published code draws them from an unseeded generator, can return the caption itself, and puts a
space before each comma of a foil alone; none of that is here.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

MOST_WORDS = 30
NOUNS = ("NN", "NP")  # prefixes of the British National Corpus' tags
ADJECTIVES = ("AJ",)
TRIES = 50
REDRAWS = 20  # of a kind that draws an order which another kind drew


def clean(caption: str) -> str:
    """ARO's cleaning: lower case, without .!"()*#:;~, one space between words, at most 30 words."""
    words = re.sub(r"[.!\"()*#:;~]", " ", caption.lower()).split()
    return " ".join(words[:MOST_WORDS])


def foils(caption: str, seed: int = 0) -> tuple[str, ...]:
    """The caption's words in other orders: nouns and adjectives shuffled, all others shuffled,
    words shuffled inside trigrams, trigrams shuffled.

    None is the caption itself, and no two are the same; a kind without an order of its own left is
    left out.
    """
    return tuple(orders(caption, seed).values())


def orders(caption: str, seed: int = 0, taken: Sequence[str] = ()) -> dict[str, str]:
    """The foils by their kind; none is one of `taken` either."""
    words, found = caption.split(), dict[str, str]()
    for kind, shuffle in KINDS.items():
        rng = generator(kind, caption, seed)
        for _ in range(REDRAWS):
            other = shuffle(words, rng)
            if other is None:
                break
            if (text := " ".join(other)) not in {*found.values(), *taken}:
                found[kind] = text
                break
    return found


def generator(kind: str, caption: str, seed: int) -> np.random.Generator:
    """Seeded by the content, so that neither the machine nor the order of captions matters."""
    digest = hashlib.sha256(f"{seed}\n{kind}\n{caption}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


@functools.cache
def _tagger() -> Any:
    """The Hannover tagger: its English model is part of the package."""
    from HanTa.HanoverTagger import HanoverTagger

    return HanoverTagger("morphmodel_en.pgz")


def tags(words: Sequence[str]) -> list[str]:
    """Part-of-speech tag of each word; punctuation at a word's ends does not count."""
    bare = [word.strip(",.'?-&") or word for word in words]
    return [tag for _, _, tag in _tagger().tag_sent(bare)]


def places(words: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
    """Positions of the nouns, of the adjectives and of all other words."""
    found = tags(words)
    nouns = [i for i, tag in enumerate(found) if tag.startswith(NOUNS)]
    adjectives = [i for i, tag in enumerate(found) if tag.startswith(ADJECTIVES)]
    rest = [i for i in range(len(words)) if i not in {*nouns, *adjectives}]
    return nouns, adjectives, rest


def _within(
    words: Sequence[str], groups: Sequence[list[int]], rng: np.random.Generator
) -> list[str] | None:
    """The words shuffled inside each group of positions, None if no other order exists."""
    if all(len({words[i] for i in group}) < 2 for group in groups):
        return None
    out = list(words)
    while out == list(words):
        for group in groups:
            for i, j in zip(group, rng.permutation(np.array(group, int)), strict=True):
                out[i] = words[j]
    return out


def _nouns_and_adjectives(words: Sequence[str], rng: np.random.Generator) -> list[str] | None:
    """Nouns change places with nouns, adjectives with adjectives."""
    nouns, adjectives, _ = places(words)
    return _within(words, [nouns, adjectives], rng)


def _all_but_those(words: Sequence[str], rng: np.random.Generator) -> list[str] | None:
    return _within(words, [places(words)[2]], rng)


def _in_trigrams(words: Sequence[str], rng: np.random.Generator) -> list[str] | None:
    everywhere = list(range(len(words)))
    return _within(words, [everywhere[i : i + 3] for i in range(0, len(words), 3)], rng)


def _trigrams(words: Sequence[str], rng: np.random.Generator) -> list[str] | None:
    groups = [list(words[i : i + 3]) for i in range(0, len(words), 3)]
    orders = [rng.permutation(len(groups)).tolist() for _ in range(TRIES)]
    # If no exchange of neighbours changes the words, no order of the trigrams does.
    for k in range(len(groups) - 1):
        order = list(range(len(groups)))
        order[k], order[k + 1] = order[k + 1], order[k]
        orders.append(order)
    for order in orders:
        out = list(itertools.chain.from_iterable(groups[i] for i in order))
        if out != list(words):
            return out
    return None


KINDS: dict[str, Callable[[Sequence[str], np.random.Generator], list[str] | None]] = {
    "nouns and adjectives": _nouns_and_adjectives,
    "all but nouns and adjectives": _all_but_those,
    "within trigrams": _in_trigrams,
    "trigrams": _trigrams,
}
