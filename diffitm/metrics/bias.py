"""Effect size of an association between groups of images and pleasant or unpleasant phrases."""

from __future__ import annotations

import numpy as np

from diffitm.metrics.intervals import BLOCK, RESAMPLES, ROUNDING, no_spread, percentiles


def association(scores: np.ndarray, pleasant: int) -> float:
    """phi(x): the mean score of an image's pleasant phrases less that of its unpleasant ones.

    scores [phrases], the first `pleasant` of them pleasant (Caliskan et al. 2017; Janghorbani and
    de Melo 2023). Whatever is added to all scores of an image, such as its unconditional error,
    cancels.
    """
    scores = scores.astype(float) - float(scores[0])  # so that a constant is exactly no association
    return float(scores[:pleasant].mean() - scores[pleasant:].mean())


def effect_size(x: np.ndarray, y: np.ndarray, pooled: np.ndarray | None = None) -> float:
    """(mean of x less mean of y) / deviation of `pooled`, which is x and y together unless given.

    x [n] and y [m] are associations of two groups; the deviation is the population's (ddof 0).
    Positive: x is nearer to the pleasant phrases. Nan where nothing deviates.
    """
    pooled = np.concatenate([x, y]) if pooled is None else pooled
    if no_spread(pooled):
        return float("nan")
    return float((x.mean() - y.mean()) / np.std(pooled))


def effect_interval(x: np.ndarray, y: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95% bootstrap interval of the effect size, images resampled within each group."""
    rng = np.random.default_rng(seed)
    first = rng.choice(x, size=(RESAMPLES, len(x)))
    second = rng.choice(y, size=(RESAMPLES, len(y)))
    std = np.concatenate([first, second], axis=1).std(1)
    difference = first.mean(1) - second.mean(1)
    valid = std > ROUNDING * np.abs(np.concatenate([x, y])).max()
    return percentiles(difference[valid] / std[valid])


def effect_p(x: np.ndarray, y: np.ndarray, seed: int = 0) -> float:
    """Two-sided permutation p of no difference between the groups: images exchange their group."""
    both = np.concatenate([x, y])
    observed, reached = abs(x.mean() - y.mean()), 0
    observed -= ROUNDING * np.abs(both).max()
    rng = np.random.default_rng(seed)
    for _ in range(RESAMPLES // BLOCK):
        shuffled = rng.permuted(np.tile(both, (BLOCK, 1)), axis=1)
        difference = shuffled[:, : len(x)].mean(1) - shuffled[:, len(x) :].mean(1)
        reached += int((np.abs(difference) >= observed).sum())
    return (reached + 1) / (RESAMPLES + 1)
