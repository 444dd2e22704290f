"""Agreement of a score with ratings that have ties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffitm.metrics.intervals import jackknife

BLOCK = 256  # rows of a table of pairs at a time


def pairwise_accuracy(ratings: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The share of pairs that scores order as ratings do (Deutsch, Foster and Freitag 2023, "Ties matter"),
    and the threshold of it.

    Scores that differ by no more than a threshold are a tie; of all thresholds it is the one of the highest
    share, which is tuned on the same pairs. Of n items all n (n - 1) / 2 pairs count.

    Args:
        ratings: [n].
        scores: [n], finite.
    """
    tied, right = [np.zeros(0)], [np.zeros(0)]
    for i in range(len(ratings) - 1):
        order, gap = ratings[i + 1 :] - ratings[i], scores[i + 1 :] - scores[i]
        tied.append(np.abs(gap[order == 0]))
        right.append(np.abs(gap[order * gap > 0]))
    equal, ordered = np.sort(np.concatenate(tied)), np.sort(np.concatenate(right))
    thresholds = np.concatenate([[0.0], equal])
    found = np.searchsorted(equal, thresholds, "right")
    kept = len(ordered) - np.searchsorted(ordered, thresholds, "right")
    best = int((found + kept).argmax())
    pairs = len(ratings) * (len(ratings) - 1) / 2
    return float((found + kept)[best] / pairs), float(thresholds[best])


def agreement_intervals(
    ratings: np.ndarray, scores: np.ndarray, clusters: np.ndarray, threshold: float
) -> tuple[tuple[float, float], ...]:
    """The 95% intervals of Kendall's tau-b, Pearson's r and the pairwise accuracy at a threshold, which is
    not tuned again: the jackknife over whole clusters.

    Args:
        ratings: [n].
        scores: [n], finite.
        clusters: [n], labels.
    """
    _, cluster, sizes = np.unique(clusters, return_inverse=True, return_counts=True)

    def without(table: Callable[[slice], np.ndarray]) -> np.ndarray:
        """The sum of a table over pairs, without each cluster."""
        return _without_each(table, cluster, len(sizes))

    def gaps(values: np.ndarray) -> Callable[[slice], np.ndarray]:
        return lambda rows: values[rows, None] - values[None]

    order, gap = gaps(ratings), gaps(scores)
    left = len(ratings) - sizes
    pairs = left * (left - 1) / 2
    concordant = without(lambda rows: np.sign(order(rows)) * np.sign(gap(rows)))
    untied = [pairs - without(lambda rows, of=of: of(rows) == 0) for of in (order, gap)]  # type: ignore[misc]
    with np.errstate(invalid="ignore", divide="ignore"):
        kendall = concordant / np.sqrt(untied[0] * untied[1])
        pearson = _pearson_without_each(ratings, scores, cluster, len(sizes))

    def right(rows: slice) -> np.ndarray:
        tie = np.abs(gap(rows)) <= threshold
        found: np.ndarray = np.where(order(rows) == 0, tie, ~tie & (order(rows) * gap(rows) > 0))
        return found

    bounds = ((kendall, -1.0), (pearson, -1.0), (without(right) / pairs, 0.0))
    return tuple(jackknife(values, low, 1.0) for values, low in bounds)


def _without_each(
    table: Callable[[slice], np.ndarray], cluster: np.ndarray, count: int
) -> np.ndarray:
    """[count]: sums of a symmetric table [n, n], of which rows are made at a time, over pairs of two items
    that are not of a cluster."""
    n, total = len(cluster), 0.0
    touching, inside = np.zeros(count), np.zeros(count)
    for start in range(0, n, BLOCK):
        rows = slice(start, min(start + BLOCK, n))
        values = table(rows).astype(float)
        place = np.arange(rows.stop - start)
        values[place, start + place] = 0  # an item with itself
        same = cluster[rows, None] == cluster[None]
        touching += np.bincount(cluster[rows], values.sum(1), count)
        inside += np.bincount(cluster[rows], (values * same).sum(1), count) / 2
        total += values.sum() / 2
    return total - touching + inside


def _pearson_without_each(
    x: np.ndarray, y: np.ndarray, cluster: np.ndarray, count: int
) -> np.ndarray:
    """[count]: Pearson's r without each cluster."""
    x, y = x - x.mean(), y - y.mean()
    n, sx, sy, sxx, syy, sxy = (
        len(x) - np.bincount(cluster, minlength=count) if values is None
        else values.sum() - np.bincount(cluster, values, count)
        for values in (None, x, y, x * x, y * y, x * y)
    )  # fmt: skip
    covariance, of_x, of_y = sxy - sx * sy / n, sxx - sx**2 / n, syy - sy**2 / n
    found: np.ndarray = covariance / np.sqrt(of_x * of_y)
    return found
