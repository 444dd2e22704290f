"""Figures by hand, and the intervals and paired tests below them by simulation and exact tests."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
from scipy import stats

from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure, macro, means
from diffitm.metrics.intervals import (
    MCNEMAR,
    PERMUTATION,
    difference_interval,
    interval,
    macro_interval,
    paired_p,
    paired_test,
    percentiles,
    wilson,
)

UNEQUAL = np.repeat(np.arange(4), [1, 2, 3, 4])  # ten examples in clusters of 1 to 4
CHANCE = 0.25


def decided(
    value: float | Credit | None, cluster: str, chance: float = CHANCE, **groups: str
) -> Decision:
    """A decision on 'hit'; None has no score, and failed, as does a credit that is not finite."""
    credit = Credit(value) if isinstance(value, float) else value
    credits = None if credit is None else {"hit": credit}
    failed = credit is None or not credit.finite
    return Decision(cluster, groups, {"hit": chance}, credits, failed)


MIXED = [
    decided(1.0, "a", kind="x", size="big"),
    decided(0.0, "a", kind="x", size="small"),
    decided(Credit(0.5, tied=True), "b", kind="y", size="big"),
    decided(None, "b", kind="y", size="big"),
    decided(LOST, "c", kind="y", size="small"),
    decided(1.0, "c", chance=0.75, kind="x", size="small"),
]


def test_means_by_hand() -> None:
    """Everything, then each group as it first comes: mean, count, chance, ties and failures."""
    found = {figure.group: figure for figure in means(MIXED)}
    assert list(found) == ["all", "kind=x", "size=big", "size=small", "kind=y"]
    expected = {
        "all": (2.5 / 5, 5, (5 * 0.25 + 0.75) / 6, 1, 2),
        "kind=x": (2 / 3, 3, (2 * 0.25 + 0.75) / 3, 0, 0),
        "kind=y": (0.25, 2, 0.25, 1, 2),
        "size=big": (0.75, 2, 0.25, 1, 1),
        "size=small": (1 / 3, 3, (2 * 0.25 + 0.75) / 3, 0, 1),
    }
    for group, numbers in expected.items():
        f = found[group]
        assert (f.value, f.n, f.chance, f.ties, f.failures) == pytest.approx(numbers), group
        assert f.low <= f.value <= f.high
        assert (f.metric, f.unit, f.p) == ("hit", "share", None)


def test_means_have_the_interval_of_their_values_and_clusters() -> None:
    """That of the scored examples alone, of each group's own clusters."""
    found = {figure.group: figure for figure in means(MIXED)}
    values, clusters = np.array([1.0, 0.0, 0.5, 0.0, 1.0]), np.array(list("aabcc"))
    assert (found["all"].low, found["all"].high) == interval(values, clusters)
    small = interval(np.array([0.0, 0.0, 1.0]), np.array(["a", "c", "c"]))
    assert (found["size=small"].low, found["size=small"].high) == small


def test_decisions_without_credits_do_not_count() -> None:
    """They move neither mean nor interval nor n; the failed ones are counted as failures."""
    kept = [d for d in MIXED if d.credits is not None]
    for group, figure in {f.group: f for f in means(MIXED)}.items():
        (other,) = [f for f in means(kept) if f.group == group]
        assert (figure.value, figure.low, figure.high) == (other.value, other.low, other.high)
        assert figure.n == other.n
    pending = Decision("d", {"kind": "x", "size": "big"}, {"hit": CHANCE}, None)  # not failed
    assert means([*MIXED, pending])[0].failures == means(MIXED)[0].failures == 2
    assert means(kept)[0].failures == 1


def test_all_failed() -> None:
    """No value and no interval, of the whole and of each group; what failed is told."""
    found = means([decided(None, "a", kind="x"), decided(None, "b", kind="y")])
    assert [(f.group, f.n, f.failures) for f in found] == [
        ("all", 0, 2),
        ("kind=x", 0, 1),
        ("kind=y", 0, 1),
    ]
    assert all(f.value is f.low is f.high is None for f in found)
    assert {f.chance for f in found} == {CHANCE}


def test_credits_that_are_not_finite_count_as_lost() -> None:
    """They are scored, so they lower the mean, and are failures too."""
    (figure, *_) = means([decided(1.0, "a"), decided(LOST, "b")])
    assert (figure.value, figure.n, figure.failures) == (0.5, 2, 1)
    assert (figure.low, figure.high) == wilson(1, 2)


def test_metrics_of_some_examples_only() -> None:
    """A metric is the mean of the examples that have it, in the order they come."""
    both = Decision("a", {}, {"hit": 0.1, "top": 0.5}, {"hit": Credit(0.0), "top": Credit(1.0)})
    one = Decision("b", {"kind": "x"}, {"hit": 0.3}, {"hit": Credit(1.0)})
    found = [(f.group, f.metric, f.value, f.n, f.chance) for f in means([both, one])]
    assert found == [
        ("all", "hit", 0.5, 2, pytest.approx(0.2)),
        ("all", "top", 1.0, 1, 0.5),
        ("kind=x", "hit", 1.0, 1, 0.3),
    ]


def test_macro_by_hand() -> None:
    """The mean of the kept groups' means, each group counting once whatever its size."""
    made = [decided(1.0, "a", relation="on")]
    made += [decided(v, c, relation="under") for v, c in ((1.0, "b"), (0.0, "b"), (0.0, "c"))]
    made += [decided(0.0, "d", relation="near"), decided(None, "e", relation="on")]
    figure = macro(made, "hit", "relation", {"on", "under", "never seen"})
    assert figure.value == pytest.approx((1 + 1 / 3) / 2)
    assert (figure.group, figure.metric, figure.n) == ("all", "macro hit", 4)
    assert (figure.failures, figure.chance, figure.ties) == (1, CHANCE, 0)
    values, groups = np.array([1.0, 1, 0, 0]), np.array(["on"] + ["under"] * 3)
    clusters = np.array(list("abbc"))
    assert (figure.low, figure.high) == macro_interval(values, clusters, groups)
    assert macro(made, "hit", "relation", {"near"}).value == 0.0


def test_macro_chance_is_that_of_its_groups() -> None:
    """As its value: each group counts once, whatever its size."""
    made = [decided(1.0, "a", 0.5, relation="on"), decided(0.0, "b", 0.25, relation="near")]
    made += [decided(1.0, c, chance, relation="under") for c, chance in (("b", 0.1), ("c", 0.3))]
    made += [decided(None, "d", 0.2, relation="under")]
    figure = macro(made, "hit", "relation", {"on", "under"})
    assert figure.chance == pytest.approx((0.5 + 0.2) / 2)


def test_macro_has_the_interval_of_its_groups() -> None:
    """Not that of the mean over examples; clusters stay whole across groups."""
    rng, rates = np.random.default_rng(9), {"on": 0.2, "under": 0.9}
    names = rng.choice(list(rates), 120, p=[0.9, 0.1])
    values = [float(rng.random() < rates[name]) for name in names]
    clusters = [str(i // 3) for i in range(120)]
    lines = zip(values, clusters, names, strict=True)
    figure = macro([decided(v, c, relation=g) for v, c, g in lines], "hit", "relation", set(rates))
    expected = macro_interval(np.array(values), np.array(clusters), names)
    assert (figure.low, figure.high) == expected
    assert interval(np.array(values), np.array(clusters))[1] < figure.value


def test_macro_counts_ties_and_failures_of_kept_groups() -> None:
    """Those of the groups left out are not its business."""
    made = [
        decided(Credit(0.5, tied=True), "a", relation="on"),
        decided(Credit(0.5, tied=True), "b", relation="near"),
        decided(LOST, "c", relation="on"),
        decided(None, "d", relation="near"),
    ]
    figure = macro(made, "hit", "relation", {"on"})
    assert (figure.value, figure.n, figure.ties, figure.failures) == (0.25, 2, 1, 1)


@pytest.mark.parametrize("kept", [set(), {"other"}, {"near"}])
def test_macro_without_a_scored_group(kept: set[str]) -> None:
    """Nothing kept, or nothing of it scored: no value."""
    made = [decided(1.0, "a", relation="on"), decided(None, "b", relation="near")]
    figure = macro(made, "hit", "relation", kept)
    assert figure.value is figure.low is figure.high is None
    assert (figure.n, figure.failures) == (0, len(kept & {"near"}))


def test_macro_of_one_group_is_its_mean() -> None:
    """And its interval that of the clustered mean."""
    rng = np.random.default_rng(0)
    values, clusters = rng.random(60).round(), np.repeat(np.arange(20), 3)
    found = macro_interval(values, clusters, np.full(60, "on"))
    assert found == pytest.approx(interval(values, clusters), abs=0.05)


def test_all_right_is_no_certainty() -> None:
    """Ten right answers in four clusters: neither mean nor macro mean is known to be 1."""
    groups = np.array(list("xyxyxyxyxy"))
    for values in (np.ones(10), np.zeros(10)):
        for low, high in (interval(values, UNEQUAL), macro_interval(values, UNEQUAL, groups)):
            assert high - low > 0.2


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 0.1, 1 / 3])
def test_equal_values_are_no_certainty(value: float) -> None:
    """All tied alike in clusters of unequal size, however their sums round: not a point."""
    same = np.full(10, value)
    for low, high in (
        interval(same, UNEQUAL),
        difference_interval(same, np.zeros(10), UNEQUAL),
        difference_interval(np.zeros(10), same, UNEQUAL),
    ):
        assert high - low > 0.2


def test_identical_columns_are_not_a_point() -> None:
    """Two models that agree everywhere: 0 within bounds that narrow with the number of clusters."""
    rng, widths = np.random.default_rng(1), []
    for count in (10, 100, 1000):
        values, clusters = rng.random(2 * count).round(), np.repeat(np.arange(count), 2)
        low, high = difference_interval(values, values, clusters)
        assert low == -high < 0
        widths.append(high)
    assert widths == sorted(widths, reverse=True)
    assert widths[2] < 0.003 < 0.01 < widths[1]
    low, high = difference_interval(np.ones(6), np.zeros(6), np.arange(6))
    assert 0 < low < 0.5
    assert high == 1.0
    low, _ = difference_interval(np.ones(3), np.zeros(3), np.arange(3))
    assert low < 0  # as McNemar's p of 0.25 says


def test_one_cluster_tells_nothing() -> None:
    """However many members it has."""
    assert interval(np.ones(14), np.zeros(14)) == (0.0, 1.0)
    assert difference_interval(np.ones(14), np.zeros(14), np.zeros(14)) == (-1.0, 1.0)


def test_agresti_min_closed_form() -> None:
    """5 wins and 2 losses of 20: centre 3/22, error of the adjusted table."""
    first, second = np.zeros(20), np.zeros(20)
    first[:5], second[5:7] = 1, 1
    centre = 3 / 22
    half = stats.t.ppf(0.975, 19) * np.sqrt(((5 + 2 + 1) / 22 - centre**2) / 22)
    found = difference_interval(first, second, np.arange(20))
    assert found == pytest.approx((centre - half, centre + half))


def test_percentiles() -> None:
    """The middle 95 of 100."""
    assert percentiles(np.arange(1001.0)) == pytest.approx((25, 975))


def test_difference_interval_by_its_parts() -> None:
    """It is that of the differences, mirrored when the two are exchanged, and paired."""
    rng = np.random.default_rng(2)
    first = rng.random(200)
    second, clusters = first - 0.1 + rng.normal(0, 0.01, 200), np.repeat(np.arange(50), 4)
    low, high = difference_interval(first, second, clusters)
    assert difference_interval(second, first, clusters) == pytest.approx((-high, -low))
    assert low < 0.1 < high
    assert high - low < 0.09  # the examples' own spread of 0.3 is gone; half an example is added


def clustered(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of 1 to 5 members and each member's rate of a right answer, 0.4 on average."""
    clusters = np.repeat(np.arange(count), rng.integers(1, 6, count))
    return clusters, rng.beta(2, 3, count)[clusters]


def test_interval_coverage() -> None:
    """40 clusters of unequal size, one credit in ten a tie: 95 of 100 held the mean in 1,000 runs."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(200):
        clusters, rates = clustered(rng, 40)
        values = (rng.random(len(rates)) < rates).astype(float)
        values[rng.random(len(rates)) < 0.1] = 0.4
        low, high = interval(values, clusters)
        hits += low <= 0.4 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_difference_interval_coverage() -> None:
    """Two models on 40 clusters, 0.1 apart: 94 of 100 held the difference in 1,000 runs."""
    rng, hits = np.random.default_rng(4), 0
    for _ in range(200):
        clusters, rates = clustered(rng, 40)
        first, second = (rng.random(len(rates)) < rates * share for share in (1, 0.75))
        low, high = difference_interval(first.astype(float), second.astype(float), clusters)
        hits += low <= 0.1 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_macro_interval_coverage() -> None:
    """4 groups of unequal size across 60 clusters of 4: 95 of 100 held the true mean in 500 runs."""
    rng, hits, rates = np.random.default_rng(5), 0, np.array([0.2, 0.4, 0.6, 0.8])
    for _ in range(120):
        clusters = np.repeat(np.arange(60), 4)
        groups = rng.choice(4, 240, p=[0.1, 0.2, 0.3, 0.4])
        shift = rng.normal(0, 0.1, 60)[clusters]
        values = (rng.random(240) < rates[groups] + shift).astype(float)
        low, high = macro_interval(values, clusters, groups)
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 120 <= 0.995


def test_macro_interval_resamples_clusters() -> None:
    """Members that agree count as one: about sqrt(6) times as wide as independent ones."""
    rng = np.random.default_rng(6)
    wins, of = (rng.random(60) < 0.5).astype(float), np.arange(60) % 3
    values, groups, clusters = np.repeat(wins, 6), np.repeat(of, 6), np.repeat(np.arange(60), 6)
    (low, high), (near, far) = (
        macro_interval(values, c, groups) for c in (clusters, np.arange(360))
    )
    assert 2 < (high - low) / (far - near) < 3


def test_macro_interval_with_a_rare_group() -> None:
    """A group of one cluster that resamples miss: still finite, around the mean."""
    values = np.array([1.0] * 6 + [0.0] * 6 + [1.0])
    groups = np.array(["x"] * 12 + ["rare"])
    low, high = macro_interval(values, np.arange(13), groups)
    assert 0 <= low < 0.75 < high <= 1


@pytest.mark.parametrize(("won", "lost"), [(8, 1), (1, 8), (5, 5), (0, 6), (13, 4), (0, 0)])
def test_mcnemar_by_the_binomial_sum(won: int, lost: int) -> None:
    """Twice the tail of fair coins over the examples that differ, at most 1."""
    first = np.array([1.0] * won + [0.0] * lost + [1.0, 0.0] * 4)
    second = np.array([0.0] * won + [1.0] * lost + [1.0, 0.0] * 4)
    total = won + lost
    tail = sum(math.comb(total, k) for k in range(min(won, lost) + 1)) / 2**total
    found = paired_p(first, second, np.arange(len(first)))
    assert found == pytest.approx(min(1.0, 2 * tail))
    if importlib.util.find_spec("statsmodels"):
        from statsmodels.stats.contingency_tables import mcnemar

        assert found == pytest.approx(mcnemar([[4, won], [lost, 4]], exact=True).pvalue)


def test_permutation_against_scipy() -> None:
    """Fractional credit, an example a cluster: scipy's exact exchange of each pair."""
    rng = np.random.default_rng(7)
    for shift in (0.0, 0.1, 0.3):
        first, second = rng.random(11) + shift, rng.random(11)
        exact = stats.permutation_test(
            (first, second),
            lambda x, y, axis: (x - y).mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        found = paired_p(first, second, np.arange(11))
        assert found == pytest.approx(exact.pvalue, abs=0.03)
        assert found == pytest.approx(paired_p(second, first, np.arange(11)), abs=0.03)


def test_permutation_of_clusters_against_scipy() -> None:
    """Clusters are exchanged whole, so the test is that of their sums."""
    rng = np.random.default_rng(8)
    first, second = (rng.random((2, 10)) < [[0.8], [0.4]]).astype(float)
    exact = stats.permutation_test(
        [
            np.bincount(UNEQUAL, weights=first),
            np.bincount(UNEQUAL, weights=second),
        ],
        lambda x, y, axis: (x - y).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert paired_p(first, second, UNEQUAL) == pytest.approx(exact.pvalue, abs=0.03)


@pytest.mark.parametrize(
    ("first", "clusters", "test"),
    [
        ([1.0, 0.0, 1.0], [0, 1, 2], MCNEMAR),
        ([1.0, 0.0, 1.0], [0, 1, 1], PERMUTATION),
        ([1.0, 0.5, 1.0], [0, 1, 2], PERMUTATION),
        ([0.5, 0.5, 0.5], ["a", "b", "c"], PERMUTATION),
    ],
)
def test_which_test(first: list[float], clusters: list[object], test: str) -> None:
    """McNemar's where each example is alone and won, lost or even; else the permutation test."""
    assert paired_test(np.array(first), np.array([0.0, 0.0, 1.0]), np.array(clusters)) == test


def test_figure_of_both_shapes_of_clusters() -> None:
    """Independent right and wrong answers get Wilson's interval in a figure, shared images none."""

    def figure(clusters: str) -> Figure:
        made = [decided(v, c) for v, c in zip([1.0, 1.0, 0.0, 0.0], clusters, strict=True)]
        return means(made)[0]

    alone, pairs = figure("abcd"), figure("aabb")
    assert (alone.low, alone.high) == wilson(2, 4)
    assert (pairs.low, pairs.high) == pytest.approx((0.0, 1.0), abs=0.01)
