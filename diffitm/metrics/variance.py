"""How much of an error's variance is due to the image, to the text and to both together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

from diffitm.metrics.intervals import LEVEL, no_spread

NAMES = ("image", "text", "interaction")


class Share(NamedTuple):
    """A share of the variance with its 95% interval, all in [0, 1]."""

    value: float
    low: float
    high: float


def shares(errors: np.ndarray) -> dict[str, Share]:
    """Variance shares of errors [images, texts], every image with every text.

    Components of the two-way random-effects analysis of variance without replication (expected mean
    squares, negative ones set to 0); what is left is the interaction, the part that can tell a right
    pair from a wrong one. Intervals are the delete-one jackknife over images and texts.
    Raises ValueError for fewer than three of either, or where nothing varies.
    """
    if min(errors.shape) < 3:
        raise ValueError(f"variance shares need 3 images and 3 texts or more, got {errors.shape}")
    found = _components(errors)
    if no_spread(errors):
        raise ValueError("all errors are the same: there is no variance to share out")
    value = found / found.sum()
    squares = np.zeros(3)
    for axis, count in enumerate(errors.shape):
        left = np.array([_shares(np.delete(errors, i, axis)) for i in range(count)])
        squares += (count - 1) / count * ((left - left.mean(0)) ** 2).sum(0)
    half = stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(squares)
    low, high = np.clip(value - half, 0, 1), np.clip(value + half, 0, 1)
    return {name: Share(*map(float, (value[i], low[i], high[i]))) for i, name in enumerate(NAMES)}


def _shares(errors: np.ndarray) -> np.ndarray:
    found = _components(errors)
    return found / found.sum() if found.sum() > 0 else np.full(3, 1 / 3)


def _components(errors: np.ndarray) -> np.ndarray:
    """Variance components [image, text, interaction]."""
    images, texts = errors.shape
    by_image, by_text, grand = errors.mean(1), errors.mean(0), errors.mean()
    left = errors - by_image[:, None] - by_text[None, :] + grand
    square = (left**2).sum() / ((images - 1) * (texts - 1))
    image = by_image.var(ddof=1) - square / texts
    text = by_text.var(ddof=1) - square / images
    return np.array([max(0.0, image), max(0.0, text), square])
