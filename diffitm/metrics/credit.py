"""The credit of one decision. A tie gets its expected value, a score that is not finite gets none."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Credit(NamedTuple):
    """`value` in [0, 1]; `tied` when equal scores decided it; `finite` False when a score was not."""

    value: float
    tied: bool = False
    finite: bool = True


LOST = Credit(0.0, finite=False)


def recall(scores: np.ndarray, gold: int, k: int) -> Credit:
    """Recall at k of the candidate `gold` among scores [n], higher is better.

    Where others have the gold's score, every order of the tied ones is equally likely: the credit
    is the share of orders that put the gold among the first k.
    """
    if not np.isfinite(scores).all():
        return LOST
    above = int((scores > scores[gold]).sum())
    tied = int((scores == scores[gold]).sum())
    value = min(max((k - above) / tied, 0.0), 1.0)
    return Credit(value, tied=0.0 < value < 1.0)


def recall_chance(candidates: int, k: int) -> float:
    """Expected recall at k of a random order."""
    return min(k / candidates, 1.0)


def winoground(scores: np.ndarray) -> dict[str, Credit]:
    """Text, image and group credit of scores [2 images, 2 texts] (Thrush et al. 2022, section 3.2).

    text: each image prefers its own caption; image: each caption prefers its own image; group:
    both. Tied scores are put in every possible order, and the credit is the share of wins.
    """
    names = ("text", "image", "group")
    if not np.isfinite(scores).all():
        return dict.fromkeys(names, LOST)
    wins = []
    for order in itertools.permutations(range(4)):
        (s00, s01), (s10, s11) = _ranks(scores, order)
        text, image = s00 > s01 and s11 > s10, s00 > s10 and s11 > s01
        wins.append((text, image, text and image))
    values = np.mean(wins, axis=0)
    return {n: Credit(float(v), tied=bool(0 < v < 1)) for n, v in zip(names, values, strict=True)}


def raced_winoground(
    texts: Sequence[np.ndarray], images: Sequence[np.ndarray]
) -> dict[str, Credit]:
    """The same from comparisons of two that were raced, in each of which the higher score wins: of both
    texts for image i, of both images for text j. Each tie is a fair coin of its own."""
    shares = {
        "text": [recall(scores, gold, 1).value for gold, scores in enumerate(texts)],
        "image": [recall(scores, gold, 1).value for gold, scores in enumerate(images)],
    }
    found = {name: float(np.prod(values)) for name, values in shares.items()}
    found["group"] = found["text"] * found["image"]
    return {name: Credit(value, tied=0 < value < 1) for name, value in found.items()}


def _ranks(scores: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Ranks [2, 2] of the scores, ties broken by `order`."""
    return np.lexsort((np.array(order), scores.ravel())).argsort().reshape(2, 2)


def winoground_chance() -> dict[str, float]:
    """Of independent continuous scores: 1/4, 1/4 and 1/6."""
    return {"text": 0.25, "image": 0.25, "group": 1 / 6}
