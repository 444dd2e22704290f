"""The credit of one decision. A tie gets its expected value, a score that is not finite gets none."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Credit(NamedTuple):
    """`value` in [0, 1]; `tied` when equal scores decided it; `finite` False when a score was not."""

    value: float
    tied: bool = False
    finite: bool = True


LOST = Credit(0.0, finite=False)


class Credits(NamedTuple):
    """Credits of many decisions, [n] each; `values` is NaN where a decision has none."""

    values: np.ndarray
    tied: np.ndarray
    finite: np.ndarray


def together(found: Sequence[Mapping[str, Credit]]) -> dict[str, Credits]:
    """The credits of decisions, each metric -> credit, by metric."""
    nothing = Credit(np.nan)
    columns = {}
    for name in dict.fromkeys(name for credits in found for name in credits):
        values, tied, finite = zip(*(credits.get(name, nothing) for credits in found), strict=True)
        columns[name] = Credits(np.array(values, float), np.array(tied), np.array(finite))
    return columns


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


def recalls(scores: np.ndarray, golds: np.ndarray, k: int) -> Credits:
    """`recall` of each of many decisions: scores [n, candidates], golds [n]."""
    finite = np.isfinite(scores).all(1)
    own = scores[np.arange(len(scores)), golds][:, None]
    above, tied = (scores > own).sum(1), (scores == own).sum(1)
    values = np.clip((k - above) / np.maximum(tied, 1), 0.0, 1.0)
    values = np.where(finite, values, LOST.value)
    return Credits(values, (values > 0.0) & (values < 1.0), finite)


def recall_chance(candidates: int, k: int) -> float:
    """Expected recall at k of a random order."""
    return min(k / candidates, 1.0)


def winoground(scores: np.ndarray) -> dict[str, Credit]:
    """Text, image and group credit of scores [2 images, 2 texts] (Thrush et al. 2022, section 3.2).

    text: each image prefers its own caption; image: each caption prefers its own image; group:
    both. Tied scores are put in every possible order, and the credit is the share of wins.
    """
    found = winogrounds(scores[None])
    return {
        name: Credit(float(c.values[0]), bool(c.tied[0]), bool(c.finite[0]))
        for name, c in found.items()
    }


def winogrounds(scores: np.ndarray) -> dict[str, Credits]:
    """`winoground` of each of many decisions: scores [n, 2 images, 2 texts]."""
    flat = scores.reshape(len(scores), 4)
    finite = np.isfinite(flat).all(1)
    orders = np.array(list(itertools.permutations(range(4))))
    wins = {}
    # Which of two scores has to be above the other; of tied ones the later in the order is.
    for a, b in ((0, 1), (3, 2), (0, 2), (3, 1)):
        above, level = flat[:, a] > flat[:, b], flat[:, a] == flat[:, b]
        wins[a, b] = above[:, None] | (level[:, None] & (orders[:, a] > orders[:, b]))
    text, image = wins[0, 1] & wins[3, 2], wins[0, 2] & wins[3, 1]
    columns = {}
    for name, won in (("text", text), ("image", image), ("group", text & image)):
        values = np.where(finite, won.mean(1), LOST.value)
        columns[name] = Credits(values, (values > 0) & (values < 1), finite)
    return columns


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


def winoground_chance() -> dict[str, float]:
    """Of independent continuous scores: 1/4, 1/4 and 1/6."""
    return {"text": 0.25, "image": 0.25, "group": 1 / 6}
