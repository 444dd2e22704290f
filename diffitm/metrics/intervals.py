"""95% intervals of a mean credit, and paired tests of two."""

from __future__ import annotations

import numpy as np
from scipy import stats

RESAMPLES = 5000
BLOCK = 500  # resamples at a time, so that memory stays small
SIGNS = 2**22  # of clusters, at a time
DENSE = 16  # numbers of clusters an example, up to which a table of them is made
LEVEL = 0.95
NORMAL = float(stats.norm.ppf((1 + LEVEL) / 2))
ROUNDING = 1e-12  # relative: what sums in another order differ by
MCNEMAR, PERMUTATION = "McNemar", "permutation"


def interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of values [n] in [0, 1], clusters [n] labels.

    Wilson's. Where clusters hold several examples, n is the effective number of them, from the
    variance between clusters, and Student's t replaces the normal quantile (Korn and Graubard 1998,
    Dean and Pagano 2015); where clusters do not differ at all, n is the number of clusters. One
    cluster of several says nothing: (0, 1). Raises ValueError without values.
    """
    if len(values) == 0:
        raise ValueError("an interval needs at least one value")
    sums, counts = _by_cluster(values, clusters)
    n, number, share = len(values), len(sums), float(values.mean())
    if number == n:
        return wilson(share * n, n)
    if number == 1:
        return 0.0, 1.0
    variance = number / (number - 1) * ((sums - share * counts) ** 2).sum() / n**2
    effective = min(n, share * (1 - share) / variance) if variance > ROUNDING else number
    effective = max(effective, 1.0)
    return wilson(share * effective, effective, _student(number - 1))


def macro_interval(
    values: np.ndarray, clusters: np.ndarray, groups: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of the mean over groups of each group's mean, resampling whole clusters.

    values, clusters and groups are [n]. A resample counts the groups that it holds.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    shape = (cluster.max() + 1, group.max() + 1)
    place = np.ravel_multi_index((cluster, group), shape)
    sums, counts = (
        np.bincount(place, weights, shape[0] * shape[1]).reshape(shape)
        for weights in (values, np.ones(len(values)))
    )
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // BLOCK):
        times = rng.multinomial(shape[0], np.full(shape[0], 1 / shape[0]), size=BLOCK).astype(float)
        total, held = times @ sums, times @ counts
        share = np.divide(total, held, out=np.full_like(total, np.nan), where=held > 0)
        means.append(np.nanmean(share, axis=1))
    resampled = np.concatenate(means)
    if no_spread(resampled):
        return wilson(float(resampled[0]) * shape[0], shape[0])
    return percentiles(resampled)


def difference_interval(
    first: np.ndarray, second: np.ndarray, clusters: np.ndarray
) -> tuple[float, float]:
    """The 95% interval of the mean difference of paired values [n] in [0, 1].

    Agresti and Min's (2005), who add half an example to each cell of the table of pairs, which is
    two examples that differ by +-1/sqrt(2); with clusters, two clusters of average size that do,
    the variance between clusters, and Student's t. One cluster says nothing: (-1, 1).
    """
    sums, counts = _by_cluster(first - second, clusters)
    number, size = len(sums), counts.mean()
    if number == 1:
        return -1.0, 1.0
    sums = np.append(sums, [size / np.sqrt(2), -size / np.sqrt(2)])
    counts = np.append(counts, [size, size])
    centre = sums.sum() / counts.sum()
    error = np.sqrt(((sums - centre * counts) ** 2).sum()) / counts.sum()
    half = _student(number - 1) * error
    return max(-1.0, float(centre - half)), min(1.0, float(centre + half))


def mean_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of any values [n], by Student's t over two or more clusters."""
    sums, counts = _by_cluster(values, clusters)
    number, centre = len(sums), values.mean()
    variance = number / (number - 1) * ((sums - centre * counts) ** 2).sum()
    half = _student(number - 1) * np.sqrt(variance) / len(values)
    return float(centre - half), float(centre + half)


def jackknife(without: np.ndarray, least: float, most: float) -> tuple[float, float]:
    """The 95% interval of a statistic by its values [number] without each cluster: Student's t around their
    mean. All that it can be where one of them is not finite, none makes a difference or there is one cluster.
    """
    number = len(without)
    if number < 2 or not np.isfinite(without).all() or no_spread(without):
        return least, most
    centre = float(without.mean())
    error = np.sqrt((number - 1) / number * ((without - centre) ** 2).sum())
    half = _student(number - 1) * float(error)
    return max(least, centre - half), min(most, centre + half)


def no_spread(values: np.ndarray) -> bool:
    """Whether the values are the same but for rounding."""
    return bool(np.ptp(values) <= ROUNDING * np.abs(values).max(initial=0))


def percentiles(resampled: np.ndarray) -> tuple[float, float]:
    """The 2.5% and 97.5% quantiles of resampled statistics [R]."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return float(low), float(high)


def wilson(successes: float, n: float, quantile: float = NORMAL) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    share, weight = successes / n, quantile**2 / n
    centre = (share + weight / 2) / (1 + weight)
    half = quantile / (1 + weight) * np.sqrt(share * (1 - share) / n + weight / (4 * n))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _student(freedom: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom))


def paired_p(first: np.ndarray, second: np.ndarray, clusters: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of equal mean credit for the same examples, [n] each.

    McNemar's exact test where examples are independent and each is right or wrong; else a
    permutation test that exchanges the two within whole clusters.
    """
    difference = first - second
    sums, _ = _by_cluster(difference, clusters)
    if paired_test(first, second, clusters) == MCNEMAR:
        won, lost = int((difference > 0).sum()), int((difference < 0).sum())
        return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    rng = np.random.default_rng(seed)
    observed, reached = abs(sums.sum()), 0
    block = max(1, min(BLOCK, SIGNS // len(sums)))
    for start in range(0, RESAMPLES, block):
        signs = rng.choice((-1.0, 1.0), size=(min(block, RESAMPLES - start), len(sums)))
        reached += int((np.abs(signs @ sums) >= observed - 1e-12).sum())
    return (reached + 1) / (RESAMPLES + 1)


def paired_test(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> str:
    """Which test `paired_p` uses for these values [n]."""
    independent = len(np.unique(clusters)) == len(clusters)
    decided = np.isin(first - second, (-1.0, 0.0, 1.0)).all()
    return MCNEMAR if independent and decided else PERMUTATION


def _by_cluster(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if np.issubdtype(clusters.dtype, np.integer) and len(clusters):
        low, high = int(clusters.min()), int(clusters.max())
        if low >= 0 and high < DENSE * len(clusters):  # the same without sorting
            counts = np.bincount(clusters)
            sums, there = np.bincount(clusters, weights=values), counts > 0
            return sums[there], counts[there].astype(float)
    _, place = np.unique(clusters, return_inverse=True)
    return np.bincount(place, weights=values), np.bincount(place).astype(float)
