"""Intervals and paired tests against closed forms and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from diffitm.metrics.intervals import (
    difference_interval,
    interval,
    macro_interval,
    mean_interval,
    paired_p,
    wilson,
)

Z = 1.959963984540054


def alone(count: int) -> np.ndarray:
    """Every example its own cluster."""
    return np.array([str(i) for i in range(count)])


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (37, 100), (1, 1)])
def test_wilson_closed_form(wins: int, n: int) -> None:
    p, scale = wins / n, 1 + Z**2 / n
    centre = (p + Z**2 / (2 * n)) / scale
    half = Z / scale * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert wilson(wins, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_independent_wins_and_losses_use_wilson() -> None:
    values = np.array([1.0] * 7 + [0.0] * 13)
    assert interval(values, alone(20)) == wilson(7, 20)


def test_fractional_credit_varies_at_most_like_a_proportion() -> None:
    """A tie among independent examples never narrows the interval."""
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], 400)
    assert interval(values, alone(400)) == wilson(values.sum(), 400)
    tied = interval(np.array([1.0] * 14 + [0.5]), alone(15))
    assert tied[0] < interval(np.ones(15), alone(15))[0]


def test_correlated_clusters_widen_the_interval() -> None:
    """20 clusters whose 10 members agree hold as much as 20 examples, not 200."""
    wins = np.random.default_rng(1).random(20) < 0.5
    values, clusters = np.repeat(wins, 10).astype(float), np.repeat(np.arange(20), 10)
    low, high = interval(values, clusters)
    naive_low, naive_high = wilson(values.sum(), 200)
    assert 2.2 < (high - low) / (naive_high - naive_low) < 4.2  # sqrt(10) for large samples
    assert low < naive_low < naive_high < high


def test_clusters_that_are_all_alike_claim_no_certainty() -> None:
    """At least as wide as that many independent examples, not a point."""
    values, clusters = np.ones(12), np.repeat(np.arange(3), 4)
    assert interval(values, clusters)[0] < wilson(3, 3)[0]
    low, high = interval(np.full(8, 0.5), alone(8))
    assert low < 0.25
    assert high > 0.75


def plain_wilson(share: float, n: float, quantile: float) -> tuple[float, float]:
    """The roots of |share - p| = quantile sqrt(p (1 - p) / n)."""
    a, b, c = 1 + quantile**2 / n, 2 * share + quantile**2 / n, share**2
    root = np.sqrt(b**2 - 4 * a * c)
    return (b - root) / (2 * a), (b + root) / (2 * a)


@pytest.mark.parametrize(
    ("clusters", "effective"),
    [
        # Share 5/9. Sums less share x size: 4/3, -11/9, -1/9; variance 3/2 x 266/81 / 81.
        ([[1, 1, 1], [1, 0, 0, 0], [0, 1]], (20 / 81) / (1.5 * (144 + 121 + 1) / 81 / 81)),
        # Share 1/2, sums that differ by less than chance has it: no more than there are.
        ([[1, 0]] * 7 + [[1, 1, 0, 0, 1, 0, 1]] + [[1, 0, 0]], 24),
        ([[1, 0]] * 3, 3),  # no difference at all: the clusters
        ([[1] * 5, [0] * 5], 1),  # at least one
    ],
)
def test_effective_number_by_hand(clusters: list[list[int]], effective: float) -> None:
    values = np.array([float(v) for members in clusters for v in members])
    labels = np.array([i for i, members in enumerate(clusters) for _ in members])
    quantile = stats.t.ppf(0.975, len(clusters) - 1)
    expected = plain_wilson(values.mean(), effective, quantile)
    assert interval(values, labels) == pytest.approx(expected, abs=1e-9)


def test_intervals_of_means_and_differences_by_hand() -> None:
    """Two clusters, of sums 3 and -1 over 2 and 4 examples."""
    values, labels = np.array([1.0, 2.0, 0.0, -1.0, 1.0, -1.0]), np.array([0, 0, 1, 1, 1, 1])
    centre, t = 2 / 6, stats.t.ppf(0.975, 1)
    off = [3 - centre * 2, -1 - centre * 4]
    half = t * np.sqrt(2 * (off[0] ** 2 + off[1] ** 2)) / 6
    assert mean_interval(values, labels) == pytest.approx((centre - half, centre + half))
    # Of differences 1, 0 | 0, -1, 0, 0, 0, 0 with two more clusters of 4 that differ by 4 / sqrt(2).
    first, second = np.array([1.0, 0, 0, 0, 0, 0, 0, 0]), np.array([0.0, 0, 0, 1, 0, 0, 0, 0])
    labels = np.array([0, 0, *[1] * 6])
    squares = 1 + 1 + 2 * (4 / np.sqrt(2)) ** 2
    half = t * np.sqrt(squares) / 16
    expected = (max(-1, -half), min(1, half))
    assert difference_interval(first, second, labels) == pytest.approx(expected)
    three = np.array([0, 0, 1, 1, 1, 2, 2, 2])
    sums, counts = np.array([1, -1, 0, 8 / 3 / 2**0.5, -8 / 3 / 2**0.5]), [2, 3, 3, 8 / 3, 8 / 3]
    half = stats.t.ppf(0.975, 2) * np.sqrt((sums**2).sum()) / sum(counts)
    found = difference_interval(first, second, three)
    assert found == pytest.approx((-half, half)) and half < 1
    assert difference_interval(first, second, np.zeros(8)) == (-1, 1)


def test_resampled_groups() -> None:
    """Where each cluster is a group the interval is that of the clusters' means."""
    rng = np.random.default_rng(0)
    shares = rng.random(40)
    values, groups = np.repeat(shares, 3), np.repeat(np.arange(40), 3)
    low, high = macro_interval(values, groups, groups)
    half = Z * shares.std() / np.sqrt(40)
    # A resample counts each group that it holds once: 25.5 of 40, all different.
    held = 40 * (1 - (1 - 1 / 40) ** 40)
    half *= np.sqrt(40 / held * (1 - held / 40) * 40 / 39)
    assert (low, high) == pytest.approx((shares.mean() - half, shares.mean() + half), abs=0.015)
    assert macro_interval(np.ones(6), alone(6), np.repeat(["a", "b"], 3)) == wilson(6, 6)


def test_clusters_need_not_be_sorted_or_equal() -> None:
    """The mean of examples, not of cluster means; the order of the examples does not matter."""
    values = np.array([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    clusters = np.array(["a", "b", "b", "b", "c", "c"])
    order = np.array([3, 0, 5, 1, 4, 2])
    low, high = interval(values, clusters)
    assert (low, high) == interval(values[order], clusters[order])
    assert low <= values.mean() <= high


@pytest.mark.parametrize(
    ("clusters", "members", "true", "agreement"),
    [
        (80, 1, 0.4, 5),
        (50, 4, 0.4, 5),
        (6, 3, 0.4, 5),  # ImageCoDe with few sets
        (15, 3, 0.9, 2),
        (155, 3, 0.3, 2),
        (60, 14, 0.7, 2),  # CLEVR's questions of an image
    ],
)
def test_coverage(clusters: int, members: int, true: float, agreement: float) -> None:
    """At least about 95 of 100 intervals hold the true mean, whose clusters' rates vary."""
    rng, hits, sims = np.random.default_rng(2), 0, 1000
    for _ in range(sims):
        rates = rng.beta(true * agreement, (1 - true) * agreement, (clusters, 1))
        values = (rng.random((clusters, members)) < rates).ravel().astype(float)
        low, high = interval(values, np.repeat(np.arange(clusters), members))
        hits += low <= true <= high
    assert hits / sims >= 0.925


@pytest.mark.parametrize(("clusters", "members"), [(15, 1), (60, 1), (6, 3), (34, 3), (155, 3)])
@pytest.mark.parametrize(("won", "lost"), [(0.25, 0.25), (0.3, 0.05), (0.03, 0.03)])
def test_coverage_of_differences(clusters: int, members: int, won: float, lost: float) -> None:
    """Members of a cluster share an outcome three times in five."""
    rng, hits, sims = np.random.default_rng(3), 0, 1000
    chances = {"p": [won, lost, 1 - won - lost]}
    for _ in range(sims):
        shared = rng.choice([1.0, -1.0, 0.0], (clusters, 1), **chances)
        own = rng.choice([1.0, -1.0, 0.0], (clusters, members), **chances)
        found = np.where(rng.random((clusters, members)) < 0.6, shared, own).ravel()
        labels = np.repeat(np.arange(clusters), members)
        low, high = difference_interval(found, np.zeros(len(found)), labels)
        hits += low <= won - lost <= high
    assert hits / sims >= 0.925


def test_no_values() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        interval(np.array([]), np.array([]))


@pytest.mark.parametrize(("won", "lost"), [(8, 1), (5, 5), (0, 3), (12, 4)])
def test_mcnemar(won: int, lost: int) -> None:
    """Only examples that differ count, whatever the others are."""
    first = np.array([1.0] * won + [0.0] * lost + [1.0, 0.0] * 6)
    second = np.array([0.0] * won + [1.0] * lost + [1.0, 0.0] * 6)
    expected = stats.binomtest(won, won + lost, 0.5).pvalue
    assert paired_p(first, second, alone(len(first))) == pytest.approx(expected)


def test_no_difference_is_no_evidence() -> None:
    values = np.array([1.0, 0.0, 0.5, 1.0])
    assert paired_p(values, values, alone(4)) == 1.0
    assert paired_p(values, values, np.array([0, 0, 1, 1])) == 1.0


def test_permutation_equals_the_exact_test() -> None:
    """With fractional credit: against all 2^10 exchanges."""
    rng = np.random.default_rng(3)
    difference = rng.choice([-0.5, 0.0, 0.5, 1.0], 10)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1)
    exact = (np.abs(difference @ signs) >= abs(difference.sum()) - 1e-12).mean()
    found = paired_p(difference, np.zeros(10), alone(10))
    assert found == pytest.approx(exact, abs=0.03)


def test_permutation_exchanges_whole_clusters() -> None:
    """Four clusters that all agree cannot give less than 2/16, however many members they have."""
    first, clusters = np.ones(400), np.repeat(np.arange(4), 100)
    assert paired_p(first, np.zeros(400), clusters) == pytest.approx(2 / 16, abs=0.02)
    assert paired_p(first, np.zeros(400), alone(400)) < 1e-9


def test_permutation_under_the_null() -> None:
    """p is below 0.05 in about one case of twenty."""
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(15), 2)
    p = [paired_p(*rng.random((2, 30)), clusters) for _ in range(100)]
    assert np.mean(np.array(p) < 0.05) <= 0.12
    assert 0.3 < np.mean(p) < 0.7


def test_deterministic() -> None:
    values = np.random.default_rng(5).random(30)
    clusters = np.repeat(np.arange(10), 3)
    other = values[::-1].copy()
    assert paired_p(values, other, clusters) == paired_p(values, other, clusters)
