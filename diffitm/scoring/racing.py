"""Racing: candidates of a decision are scored on a growing prefix of the timesteps, and those that are
worse beyond doubt drop out.

Every candidate meets the same timesteps and noises, so what decides is the paired difference to the
candidate at the border, timestep by timestep. Its mean over a prefix of n of N timesteps stands for
the mean over all N with the variance s^2 / n (1 - n / N), the finite-population correction (Cochran,
Sampling Techniques, 1977, section 2.6): over the full plan no doubt is left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from diffitm.core.errors import InputError

BORROWED = 4.0  # how many timesteps the other candidates' spread weighs as much as


@dataclass(frozen=True)
class Racing:
    """The rules of a race.

    `doubt` is the most that a decision's race may err by: the probability that one of its candidates
    is on another side of the border than it would be at the full plan. `first` is the length of
    the first prefix, each further one is `growth` times as long, `kept` how many candidates win.
    """

    doubt: float = 0.01
    first: int = 5
    growth: float = 1.4
    kept: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.doubt < 1:
            raise InputError(f"doubt {self.doubt}: must be at least 0 and below 1", "racing")
        if self.first < 2 or self.growth <= 1 or self.kept < 1:
            raise ValueError(f"{self}: first is at least 2, growth above 1, kept at least 1")

    def prefixes(self, total: int) -> list[int]:
        """Lengths of the prefixes, the last of them `total`."""
        lengths = [min(self.first, total)]
        while lengths[-1] < total:
            lengths.append(min(total, max(lengths[-1] + 1, round(lengths[-1] * self.growth))))
        return lengths


def spread_order(total: int) -> list[int]:
    """The positions 0 to total - 1 in an order of which every prefix is spread over the range: van der
    Corput's sequence in base 2."""
    width = max(1, (total - 1).bit_length())
    turned = (int(f"{number:0{width}b}"[::-1], 2) for number in range(2**width))
    return [position for position in turned if position < total]


class Race:
    """One decision's race, told its errors prefix by prefix; lower is better.

    `candidates` and `total` are the sizes C of the decision and N of the full plan. After each call
    of `take`, `open` holds the candidates whose side is still in doubt, `winners` and `losers` the others.
    """

    def __init__(self, candidates: int, total: int, rules: Racing) -> None:
        self.rules, self.total = rules, total
        self.open = list(range(candidates))
        self.winners: list[int] = []
        self.losers: list[int] = []
        # Every look but the one at the full plan may err by the same share.
        self.allowed = rules.doubt / max(1, len(rules.prefixes(total)) - 1)
        self._settle()

    def take(self, errors: np.ndarray) -> None:
        """Errors [len(open), n] of the open candidates over a prefix of n timesteps, in their order.

        Raises ValueError for another shape or errors that are not finite.
        """
        if errors.ndim != 2 or len(errors) != len(self.open):
            raise ValueError(f"errors {errors.shape} of {len(self.open)} candidates")
        if not np.isfinite(errors).all():
            raise ValueError("errors are not finite")
        places = self.rules.kept - len(self.winners)
        order = np.argsort(errors.mean(1), kind="stable")
        best, worst = order[:places], order[places:]
        wrong = np.ones(len(errors))
        shrunk = _shrinkage(errors, self.total)
        wrong[worst] = doubts(errors[worst], errors[best[-1]], self.total, shrunk)
        wrong[best] = doubts(errors[best], errors[worst[0]], self.total, shrunk)
        drop, left = [], self.allowed
        # A winner leaves only where several win: the last one is what the others are compared with.
        for number in sorted(range(len(errors)), key=lambda number: wrong[number]):
            if places == 1 and number == best[0]:
                continue
            if wrong[number] > left:
                break
            left -= float(wrong[number])
            drop.append(number)
        first = set(best.tolist())
        self.winners += [self.open[number] for number in drop if number in first]
        self.losers += [self.open[number] for number in drop if number not in first]
        self.open = [self.open[number] for number in range(len(errors)) if number not in drop]
        self._settle()

    def _settle(self) -> None:
        """Whether the open ones all win, or all lose."""
        places = self.rules.kept - len(self.winners)
        if len(self.open) <= places:
            self.winners += self.open
        elif places == 0:
            self.losers += self.open
        else:
            return
        self.open = []


def _shrinkage(errors: np.ndarray, total: int) -> float:
    """The share of the means' variance between candidates that is no noise (James and Stein, 1961).

    The best of many equal candidates looks better than it is; with this share the differences shrink to
    what remains of them. 1 for fewer than four candidates, of which it cannot be told.
    """
    candidates, n = errors.shape
    if candidates < 4 or n >= total:
        return 1.0
    apart = errors - errors.mean(0)
    noise = apart.var(1, ddof=1).sum() / (candidates - 1) / n * (1 - n / total)
    between = float(apart.mean(1).var(ddof=1))
    if between == 0:
        return 0.0
    return max(0.0, 1 - (candidates - 3) / (candidates - 1) * noise / between)


def doubts(errors: np.ndarray, border: np.ndarray, total: int, shrunk: float = 1.0) -> np.ndarray:
    """The probability that a candidate is on the other side of the border at the full plan.

    `errors` [C, n], `border` [n] the errors of the candidate at the border, `total` the N timesteps of
    the full plan. One-sided, of Student's t over paired differences; each spread borrows from the
    others' mean spread as if that were known from BORROWED more timesteps. `shrunk` is the share of the
    differences that is no noise.
    """
    differences = np.asarray(errors, float) - np.asarray(border, float)
    count, n = differences.shape
    if n >= total:
        return np.zeros(count)
    means, variances = differences.mean(1), differences.var(1, ddof=1)
    freedom = float(n - 1)
    if count > 1:
        others = (variances.sum() - variances) / (count - 1)
        variances = (freedom * variances + BORROWED * others) / (freedom + BORROWED)
        freedom += BORROWED
    deviation = np.sqrt(variances / n * (1 - n / total))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(
            deviation > 0, np.abs(means) / deviation, np.where(means == 0, 0, np.inf)
        )
    return special.stdtr(freedom, -distance * math.sqrt(shrunk))


def race(errors: np.ndarray, rules: Racing) -> tuple[list[int], np.ndarray]:
    """A race over errors [C, N] that are known, in the plan's order: the winners, and how many
    timesteps each candidate was asked for, int [C].

    Winners stand in their order over what was measured of them.
    """
    candidates, total = errors.shape
    run, order = Race(candidates, total, rules), spread_order(total)
    spent = np.zeros(candidates, int)
    for n in rules.prefixes(total):
        if not run.open:
            break
        spent[run.open] = n
        run.take(errors[np.ix_(run.open, order[:n])])
    means = [errors[c, order[: max(1, spent[c])]].mean() for c in range(candidates)]
    return sorted(run.winners, key=lambda c: (means[c], c)), spent


def rounds(samples: Sequence[int], total: int = 1000) -> list[list[int]]:
    """The timesteps of each round of Diffusion Classifier (Li et al. 2023; n_samples of their code): an
    even part of the grid of the largest round, so that a later round finds what an earlier one scored.

    Raises InputError for a number that `total` training timesteps cannot give.
    """
    if not samples or min(samples) < 1 or max(samples) > total:
        raise InputError(f"rounds {list(samples)}: each must be 1 to {total}")
    step = total // max(samples)
    grid = list(range(step // 2, total, step))[: max(samples)]
    strides = [len(grid) // n for n in samples]
    return [grid[s // 2 :: s][:n] for s, n in zip(strides, samples, strict=True)]


def survivors(errors: np.ndarray, kept: int) -> list[int]:
    """Indices of the `kept` candidates of lowest mean error, the lowest first; errors [C, n].

    Equal means stay in the order given; one that is not finite is behind all others.
    Raises ValueError where fewer than one is to be kept, or none has a finite mean.
    """
    if kept < 1:
        raise ValueError(f"kept {kept}: must be at least 1")
    means = np.asarray(errors, float).mean(1)
    finite = [c for c in np.argsort(means, kind="stable").tolist() if math.isfinite(means[c])]
    if not finite:
        raise ValueError("no candidate has a finite error")
    return finite[:kept]
