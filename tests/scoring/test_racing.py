"""Racing: the published rounds, what a prefix can tell, and that the stated doubt holds."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from diffitm.core.errors import InputError
from diffitm.scoring.racing import (
    Race,
    Racing,
    Rounds,
    doubts,
    look_share,
    race,
    rounds,
    spread_order,
    survivors,
)


def published_rounds(samples: list[int], total: int) -> list[list[int]]:
    """As the loop of Li et al. 2023 is described: from the grid of the largest round each takes every so
    manieth timestep, from the middle of the first stretch on."""
    most = max(samples)
    grid = []
    t = total // most // 2
    while t < total and len(grid) < most:
        grid.append(t)
        t += total // most
    found = []
    for n in samples:
        every = most // n
        chosen = [grid[i] for i in range(every // 2, most, every)]
        found.append(chosen[:n])
    return found


@pytest.mark.parametrize(
    ("samples", "total"),
    [([50, 500], 1000), ([16, 64], 1000), ([1, 3, 7, 100], 1000), ([5], 1000), ([4, 20], 100)],
)
def test_the_published_rounds(samples: list[int], total: int) -> None:
    assert rounds(samples, total) == published_rounds(samples, total)


def test_rounds_by_hand() -> None:
    assert rounds([2, 8], 1000) == [[312, 812], [62, 187, 312, 437, 562, 687, 812, 937]]
    assert rounds([64])[0][-1] == 952
    assert set(rounds([50, 500])[0]) <= set(rounds([50, 500])[1])


@pytest.mark.parametrize("samples", [[], [0, 5], [5, 1001]])
def test_rounds_that_cannot_be(samples: list[int]) -> None:
    with pytest.raises(InputError, match="must be 1 to 1000"):
        rounds(samples)


def test_survivors() -> None:
    errors = np.array([[3.0, 3.0], [1.0, 2.0], [9.0, 0.0], [2.0, 1.0]])
    assert survivors(errors, 1) == [1]  # a tie stays in the order given
    assert survivors(errors, 3) == [1, 3, 0]
    assert survivors(errors, 9) == [1, 3, 0, 2]


def test_no_survivor_by_nan() -> None:
    errors = np.array([[np.nan, 0.0], [5.0, 5.0], [-np.inf, 0.0]])
    assert survivors(errors, 2) == [1]
    with pytest.raises(ValueError, match="no candidate has a finite error"):
        survivors(errors[[0, 2]], 1)
    with pytest.raises(ValueError, match="at least 1"):
        survivors(errors, 0)


@pytest.mark.parametrize("total", [1, 2, 3, 10, 49, 64, 245])
def test_every_prefix_is_spread(total: int) -> None:
    """All positions once; of the first 2 ** k, none is alone in more than two of its strata's widths."""
    order = spread_order(total)
    assert sorted(order) == list(range(total))
    for k in range(1, total.bit_length()):
        prefix = sorted(order[: 2**k])
        gaps = np.diff([-1, *prefix, total])
        assert gaps.max() <= 2 * math.ceil(2 ** (total - 1).bit_length() / 2**k)


def test_prefixes_grow_to_the_full_plan() -> None:
    assert Racing(first=5, growth=1.4).lengths(49) == [5, 7, 10, 14, 20, 28, 39, 49]
    assert Racing(first=5, growth=1.1).lengths(8) == [5, 6, 7, 8]
    assert Racing(first=5).lengths(3) == [3]


def test_doubt_of_two_is_the_paired_t_test_of_neighbours_with_the_correction() -> None:
    numbers = np.random.default_rng(0)
    a, b = numbers.normal(size=(2, 6))
    steps = np.diff(a - b)
    deviation = math.sqrt((steps @ steps) / (2 * 5) / 6 * (1 - 6 / 30))
    expected = stats.t.sf(abs(np.mean(a - b)) / deviation, 2 * 5**2 / (3 * 6 - 4))
    assert doubts(a[None], b, 30) == pytest.approx([expected])
    assert doubts(a[None], b, 6) == [0]


def test_the_spread_of_neighbours_is_that_of_noise_whatever_changes_slowly() -> None:
    """A slope over the timesteps makes no doubt; without one the estimate is the usual variance."""
    numbers = np.random.default_rng(5)
    noise, slope = numbers.normal(size=(2000, 12)), 3 * np.linspace(-1, 1, 12)
    flat, steep = (doubts(1 + noise + trend, np.zeros(12), 10_000).mean() for trend in (0, slope))
    assert steep == pytest.approx(flat, abs=0.005)
    assert (np.diff(noise) ** 2).sum(1).mean() / 22 == pytest.approx(1, abs=0.02)


def test_doubt_borrows_the_others_spread() -> None:
    """By hand: n = 2, variances 8 and 2, each 1 of 5 its own and 4 of 5 the other's; t of 5 degrees."""
    border = np.zeros(2)
    errors = np.array([[1.0, 5.0], [2.0, 4.0]])
    variances = np.array([8 + 4 * 2, 2 + 4 * 8]) / 5
    expected = stats.t.sf(3 / np.sqrt(variances / 2 * (1 - 2 / 10)), 5)
    assert doubts(errors, border, 10) == pytest.approx(expected)


@pytest.mark.parametrize(("doubt", "total"), [(0.05, 49), (0.3, 20), (0.01, 245)])
def test_all_looks_together_err_by_the_doubt(doubt: float, total: int) -> None:
    """Means of 40,000 rows of noise whose whole means are 0, over every prefix, against their quantile."""
    lengths = Racing(doubt).lengths(total)
    share = look_share(doubt, tuple(lengths))
    noise = np.random.default_rng(total).normal(size=(40_000, total))
    sums = (noise - noise.mean(1, keepdims=True)).cumsum(1)
    means = [sums[:, n - 1] / math.sqrt(n * (1 - n / total)) for n in lengths[:-1]]
    crossed = (np.stack(means) < stats.norm.ppf(share)).any(0).mean()
    assert crossed == pytest.approx(doubt, abs=4 * math.sqrt(doubt / 40_000) + 0.01 * doubt)


def test_the_share_of_a_look() -> None:
    """Between an equal division and the whole; of a single look the whole, of no doubt nothing."""
    assert look_share(0.05, (5, 49)) == 0.05 and look_share(0.05, (49,)) == 0.05
    assert look_share(0.0, (5, 7, 49)) == 0
    assert 0.05 / 7 < look_share(0.05, (5, 7, 10, 14, 20, 28, 39, 49)) < 0.05


def test_equal_candidates_are_never_without_doubt() -> None:
    flat = np.ones((3, 5))
    assert doubts(flat, np.ones(5), 49).tolist() == [0.5] * 3
    winners, spent = race(np.ones((3, 49)), Racing())
    assert (winners, spent.tolist()) == ([0], [49] * 3)


def test_a_clear_decision_ends_at_the_first_prefix() -> None:
    numbers = np.random.default_rng(1)
    level = numbers.normal(size=49) * 50  # shared by all, so that only paired differences are clear
    errors = level + numbers.normal(size=(10, 49)) * 0.1
    errors[3] -= 5
    winners, spent = race(errors, Racing())
    assert winners == [3] and spent.tolist() == [5] * 10


def test_several_winners_and_their_order() -> None:
    numbers = np.random.default_rng(2)
    errors = numbers.normal(size=(6, 245)) + np.array([5, 1, 9, 0, 8, 2])[:, None]
    winners, spent = race(errors, Racing(), 3)
    assert winners == [3, 1, 5] and spent.max() < 100
    assert race(errors[:2], Racing(), 3)[0] == [0, 1]  # fewer than are kept: nothing to race for
    assert race(errors[:2], Racing(), 2)[1].tolist() == [0, 0]


def test_no_doubt_allowed_scores_everything() -> None:
    numbers = np.random.default_rng(3)
    errors = numbers.normal(size=(5, 20)) + np.arange(5)[:, None]
    winners, spent = race(errors, Racing(doubt=0))
    assert winners == survivors(errors, 1) and spent.tolist() == [20] * 5


def test_a_race_refuses_what_would_win_by_nan() -> None:
    run = Race(2, 10, Racing())
    with pytest.raises(ValueError, match="not finite"):
        run.take(np.array([[1.0, np.nan], [1.0, 1.0]]))
    with pytest.raises(ValueError, match="of 2 candidates"):
        run.take(np.ones((3, 5)))
    with pytest.raises(InputError, match=r"1\.5"):
        Racing(doubt=1.5)


@pytest.mark.parametrize(
    ("candidates", "kept", "total", "apart", "heavy"),
    [
        (2, 1, 49, 0.0, False),
        (2, 1, 245, 0.05, True),
        (4, 1, 245, 0.05, False),
        (10, 5, 49, 0.05, False),
        (10, 1, 49, 0.3, True),
        (40, 1, 245, 0.0, False),
    ],
)
def test_the_stated_doubt_holds(
    candidates: int, kept: int, total: int, apart: float, heavy: bool
) -> None:
    """Of 400 races with a known truth, among them candidates that are all but equal, no more go wrong than
    were allowed to; the number that may be seen in 400 is that of the binomial distribution."""
    numbers = np.random.default_rng(candidates * total)
    races, doubt, wrong = 400, 0.05, 0
    scale = 1 + 0.6 * np.linspace(0, 1, total)  # errors spread more at late timesteps
    for _ in range(races):
        noise = (
            numbers.standard_t(4, (candidates, total))
            if heavy
            else numbers.normal(size=(candidates, total))
        )
        slope = 0.3 * numbers.normal(size=(candidates, 1)) * np.linspace(-1, 1, total)
        means = apart * numbers.normal(size=(candidates, 1))
        errors = 5 * numbers.normal(size=total) + (means + noise) * scale + slope
        wrong += set(race(errors, Racing(doubt), kept)[0]) != set(survivors(errors, kept))
    assert wrong > 0 or apart > 0.1 or candidates > 10
    assert wrong <= stats.binom.isf(0.001, races, doubt)


@pytest.mark.parametrize("total", [16, 49, 64, 128])
@pytest.mark.parametrize("curve", [lambda x: x, lambda x: x**2, lambda x: np.exp(3 * x) / 10])
def test_what_changes_along_the_timesteps_decides_nothing(
    total: int, curve: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Two candidates that are equal over the full plan but for noise, whose difference runs from one side to
    the other: which of the timesteps a prefix holds must not tell them apart."""
    numbers = np.random.default_rng(total)
    shape = curve(np.linspace(-1, 1, total))
    races, doubt, wrong = 200, 0.05, 0
    for number in range(races):
        errors = numbers.normal(size=(2, total))
        errors[0] += (3, 10)[number % 2] * (shape - shape.mean())
        wrong += race(errors, Racing(doubt))[0] != survivors(errors, 1)
    assert wrong <= stats.binom.isf(0.001, races, doubt)


def test_rounds_drop_no_tie_by_its_place() -> None:
    """A model that tells nothing apart is right by chance, wherever the right answer stands."""
    winners, spent = race(np.ones((4, 64)), Rounds((16, 64), (1, 1)))
    assert spent.tolist() == [64] * 4 and winners == [0]
    errors = np.ones((4, 64)) + np.array([1, 0, 0, 2])[:, None]
    assert race(errors, Rounds((16, 64), (1, 1)))[1].tolist() == [16, 64, 64, 16]


def test_no_share_of_the_differences_is_half_a_doubt() -> None:
    assert doubts(np.ones((2, 5)), np.zeros(5), 49, shrunk=0.0).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("samples", [(0, 64), (16, 1001)])
def test_rounds_that_are_none_name_their_option(samples: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"n_samples.*must be 1 to 1000"):
        Rounds(samples, (5, 1))
