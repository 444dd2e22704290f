"""Agreement of a score with ratings that have ties."""

from __future__ import annotations

import numpy as np


def pairwise_accuracy(ratings: np.ndarray, scores: np.ndarray) -> float:
    """The share of pairs that scores order as ratings do (Deutsch, Foster and Freitag 2023, "Ties matter").

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
    return float((found + kept).max() / (len(ratings) * (len(ratings) - 1) / 2))
