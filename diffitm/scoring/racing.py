"""Racing: candidates of a decision are scored on a growing prefix of the timesteps, and those that are
worse beyond doubt drop out.

Every candidate meets the same timesteps and noises, so what decides is the paired difference to the
candidate at the border, timestep by timestep. Its mean over a prefix of n of N timesteps stands for
the mean over all N with the variance s^2 / n (1 - n / N), the finite-population correction (Cochran,
Sampling Techniques, 1977, section 2.6): over the full plan no doubt is left. The mean is that of the line
through a prefix's differences, which holds what changes slowly with the timestep wherever the prefix is
denser, and s^2 is that of neighbours (von Neumann 1941; for systematic samples Wolter, Introduction to
Variance Estimation, 1985).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy import optimize, special

from diffitm.core.errors import InputError
from diffitm.core.schema import Contest
from diffitm.scoring.protocols import TRAINED, plan_timesteps

VERSION = 1  # grows when the same errors and rules would race otherwise
GRID, GRID_END = 400, 8.0  # of the integral over standard normal values
BORROWED = 4.0  # degrees of freedom that the other candidates' spread is as good as


class Dropped(NamedTuple):
    """Numbers of open candidates that are decided, in the order they were dropped."""

    winners: list[int]
    losers: list[int]


class Rules(Protocol):
    """What of a plan a race scores first, and who drops out."""

    def order(self, timesteps: Sequence[float]) -> list[int]:
        """The places of the plan in the order in which they are scored."""

    def lengths(self, total: int) -> list[int]:
        """How many places each look has, the last of them `total`."""

    def drop(self, errors: np.ndarray, places: int, total: int) -> Dropped:
        """Who is decided by the errors [C, n] of the open candidates, of whom `places` are to win."""


@dataclass(frozen=True)
class Racing:
    """Candidates drop out that are worse, or win, beyond doubt.

    `doubt` is the most that a contest may err by: the probability that one of its candidates
    is on another side of the border than it would be at the full plan. `first` is the length of
    the first prefix, each further one is `growth` times as long.
    """

    doubt: float = 0.01
    first: int = 5
    growth: float = 1.4

    def __post_init__(self) -> None:
        if not 0 <= self.doubt < 1:
            raise InputError(f"{self.doubt}: must be at least 0 and below 1", "racing")
        if self.first < 2 or self.growth <= 1:
            raise ValueError(f"{self}: first is at least 2, growth above 1")

    def order(self, timesteps: Sequence[float]) -> list[int]:
        """spread_order over the sorted timesteps."""
        by_size = sorted(range(len(timesteps)), key=lambda place: timesteps[place])
        return [by_size[number] for number in spread_order(len(timesteps))]

    def lengths(self, total: int) -> list[int]:
        """Prefixes that grow to `total`."""
        lengths = [min(self.first, total)]
        while lengths[-1] < total:
            lengths.append(min(total, max(lengths[-1] + 1, round(lengths[-1] * self.growth))))
        return lengths

    def drop(self, errors: np.ndarray, places: int, total: int) -> Dropped:
        """Those whose doubts together stay below what this look may err by, the surest first."""
        columns, weights = _prefix(total, errors.shape[1])
        errors = errors[:, columns]  # in the order of their timesteps
        order = np.argsort(errors @ weights, kind="stable")
        best, worst = order[:places], order[places:]
        wrong = np.ones(len(errors))
        shrunk = _shrinkage(errors, total, weights)
        wrong[worst] = doubts(errors[worst], errors[best[-1]], total, shrunk, weights)
        wrong[best] = doubts(errors[best], errors[worst[0]], total, shrunk, weights)
        left = look_share(self.doubt, tuple(self.lengths(total)))
        first, dropped = set(best.tolist()), Dropped([], [])
        for number in np.argsort(wrong, kind="stable").tolist():
            # A winner leaves only where several win: the last one is what the others are compared with.
            if places == 1 and number in first:
                continue
            if wrong[number] > left:
                break
            left -= float(wrong[number])
            (dropped.winners if number in first else dropped.losers).append(number)
        return dropped


@dataclass(frozen=True)
class Rounds:
    """Diffusion Classifier's rounds (Li et al. 2023, algorithm 2): after round i with samples[i]
    timesteps the kept[i] candidates of lowest mean error stay, over all that was scored of them so far.

    Raises InputError for numbers that are no rounds.
    """

    samples: tuple[int, ...]
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.kept):
            text = f"{list(self.kept)}: give one for each of {list(self.samples)}"
            raise InputError(text, "to_keep")
        if list(self.samples) != sorted(set(self.samples)) or not self.samples:
            raise InputError(f"{list(self.samples)}: each must be more than before", "n_samples")
        if min(self.kept) < 1 or list(self.kept) != sorted(self.kept, reverse=True):
            text = f"{list(self.kept)}: must be 1 or more, none more than before"
            raise InputError(text, "to_keep")
        if self.samples[0] < 1 or self.samples[-1] > TRAINED:
            text = f"{list(self.samples)}: each must be 1 to {TRAINED}"
            raise InputError(text, "n_samples")

    @functools.cached_property
    def places(self) -> list[list[int]]:
        """The places that each round adds, in the grid of the largest one."""
        grid = rounds(self.samples)[-1]
        found: dict[int, int] = {}
        for number, chosen in enumerate(rounds(self.samples)):
            for step in chosen:
                found.setdefault(grid.index(step), number)
        return [[p for p, at in found.items() if at == i] for i in range(len(self.samples))]

    def order(self, timesteps: Sequence[float]) -> list[int]:
        """Round after round. Raises InputError for a plan that is not the grid of the largest round."""
        if list(timesteps) != rounds(self.samples)[-1]:
            text = f"{self.samples[-1]}: rounds take the timesteps of the diffusion-classifier protocol"
            raise InputError(text, "n_samples")
        return [place for places in self.places for place in places]

    def lengths(self, total: int) -> list[int]:
        """Timesteps that are scored by the end of each round."""
        return np.cumsum([len(places) for places in self.places]).tolist()

    def drop(self, errors: np.ndarray, places: int, total: int) -> Dropped:
        """All that are worse than the last one kept, as no tie is won by its place; at the end everyone."""
        looks = self.lengths(total)
        kept = self.kept[looks.index(errors.shape[1])]
        stay = survivors(errors, max(kept, places))
        if errors.shape[1] == total:
            return Dropped(stay[:places], stay[places:] + _others(stay, len(errors)))
        means = errors.mean(1)
        return Dropped([], np.flatnonzero(means > means[stay[-1]]).tolist())


def _others(numbers: Sequence[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(numbers))


@dataclass(frozen=True)
class RacePlan:
    """Rules over a plan of timesteps: what races, an actor's and the evaluation's, are held by.

    `error` is the kind that decides; `weights` are those of the timesteps in a score, of which one
    without weight is not scored.
    """

    rules: Racing | Rounds
    timesteps: tuple[float, ...]
    error: str = "l2"
    weights: tuple[float, ...] | None = None

    @functools.cached_property
    def order(self) -> list[int]:
        """Places in the plan, the first to be scored first."""
        used = [
            p for p in range(len(self.timesteps)) if self.weights is None or self.weights[p] > 0
        ]
        return [used[p] for p in self.rules.order([self.timesteps[p] for p in used])]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """How many of them each look has."""
        return self.rules.lengths(len(self.order))

    @functools.cached_property
    def scale(self) -> np.ndarray:
        """What errors [.., N] are multiplied by, so that their mean over the order is the score's."""
        if self.weights is None:
            return np.ones(len(self.timesteps))
        weights = np.array(self.weights)
        return weights * (len(self.order) / weights.sum())

    @property
    def identity(self) -> dict[str, Any]:
        """What the outcome of a race depends on beside its errors."""
        rules = {"rules": type(self.rules).__name__.lower(), **asdict(self.rules)}
        return {"version": VERSION, **rules, "error": self.error, "weights": self.weights}


@functools.cache
def spread_order(total: int) -> tuple[int, ...]:
    """The positions 0 to total - 1 in an order of which every prefix is spread over the range: both ends,
    then van der Corput's sequence in base 2."""
    width = max(1, (total - 1).bit_length())
    turned = (int(f"{number:0{width}b}"[::-1], 2) for number in range(2**width))
    return tuple(dict.fromkeys([0, total - 1, *(p for p in turned if p < total)]))


@functools.cache
def _prefix(total: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The columns of a prefix in the order of their positions, and the weights [n] of their errors: those
    with which the mean over all `total` is that of the line through them.

    A prefix is denser here than there, so a plain mean of what changes along the range would be off.
    """
    positions = np.array(spread_order(total)[:length])
    columns = np.argsort(positions)
    known, every = positions[columns], np.arange(total)
    return columns, np.array([np.interp(every, known, unit).mean() for unit in np.eye(length)])


def _spread(weights: np.ndarray, total: int) -> float:
    """The variance of a prefix's weighted mean around the mean over all, of noise of variance 1; with equal
    weights 1 / n (1 - n / N)."""
    return float(((weights - 1 / total) ** 2).sum() + (total - len(weights)) / total**2)


class Race:
    """A contest's race, told its errors look by look; lower is better.

    `candidates` and `total` are the sizes C of the contest and N of the full plan, `kept` how many
    win. After each call of `take`, `open` holds the candidates whose side is still in doubt, `winners`
    and `losers` the others; `spent` [C] is how many timesteps were asked of each, `means` [C] the mean of
    its errors there. With `about` the race is over once that candidate's side is known; others may have
    none then.
    """

    def __init__(
        self, candidates: int, total: int, rules: Rules, kept: int = 1, about: int | None = None
    ) -> None:
        self.rules, self.total, self.kept, self.about = rules, total, kept, about
        self.open = list(range(candidates))
        self.winners: list[int] = []
        self.losers: list[int] = []
        self.spent = np.zeros(candidates, int)
        self.means = np.zeros(candidates)
        self._tiers = np.zeros(candidates)  # 1 for an early winner, -1 for an early loser
        self._settle()

    def take(self, errors: np.ndarray) -> None:
        """Errors [len(open), n] of the open candidates over the first n timesteps, in their order.

        Raises ValueError for another shape or errors that are not finite.
        """
        if errors.ndim != 2 or len(errors) != len(self.open):
            raise ValueError(f"errors {errors.shape} of {len(self.open)} candidates")
        if not np.isfinite(errors).all():
            raise ValueError("errors are not finite")
        now = list(self.open)
        self.spent[now], self.means[now] = errors.shape[1], errors.mean(1)
        dropped = self.rules.drop(errors, self.kept - len(self.winners), self.total)
        winners, losers = ([now[number] for number in numbers] for numbers in dropped)
        self.winners += winners
        self.losers += losers
        if errors.shape[1] < self.total:
            self._tiers[winners], self._tiers[losers] = 1, -1
        gone = {*winners, *losers}
        self.open = [candidate for candidate in now if candidate not in gone]
        self._settle()

    def withdraw(self, errors: np.ndarray) -> None:
        """Open candidates lose of whose errors [len(open), n] some are not finite; the others go on."""
        stays = np.isfinite(errors).all(1)
        now, lost = np.array(self.open)[stays], np.array(self.open)[~stays]
        self.spent[now], self.means[now] = errors.shape[1], errors[stays].mean(1)
        self._tiers[lost] = -1
        self.losers += lost.tolist()
        self.open = now.tolist()
        self._settle()

    def _settle(self) -> None:
        """Whether the open ones all win, or all lose."""
        places = self.kept - len(self.winners)
        if len(self.open) <= places:
            self.winners += self.open
        elif places == 0:
            self.losers += self.open
        elif self.about is None or self.about in self.open:
            return
        self.open = []

    def best(self) -> list[int]:
        """The winners, the lowest mean first."""
        return sorted(self.winners, key=lambda candidate: (self.means[candidate], candidate))

    def standing(self) -> np.ndarray:
        """Scores [C] that rank the candidates as the race did, higher is better: those that dropped out
        early stand behind (or, winners, before) the others, and who is equal at the full plan is equal.
        """
        width = np.ptp(self.means) + 1
        return self._tiers * 2 * width - self.means


class Run:
    """A contest under way over errors of pairs that become known bit by bit."""

    def __init__(self, contest: Contest, plan: RacePlan) -> None:
        self.contest, self.plan = contest, plan
        # The published rounds go on to their end.
        about = contest.about if isinstance(plan.rules, Racing) else None
        size, total = len(contest.candidates), len(plan.order)
        self.race = Race(size, total, plan.rules, contest.kept, about)
        self.finite = True
        self._looks = 0

    @property
    def decided(self) -> bool:
        """Whether there is an outcome, be it that errors are not finite."""
        return not self.finite or not self.race.open

    @property
    def spent(self) -> dict[int, int]:
        """Pair -> how many timesteps were asked of it."""
        found: dict[int, int] = {}
        for pairs in (self.contest.candidates, self.contest.bases):
            for pair, spent in zip(pairs, self.race.spent.tolist(), strict=False):
                found[pair] = max(found.get(pair, 0), spent)
        return found

    def advance(self, errors: np.ndarray) -> dict[int, int]:
        """Go on as far as errors [P, N] of pairs reach, NaN where they are not known; then pair -> how many
        of the order's first timesteps are asked of it, nothing once all is decided."""
        while not self.decided:
            length = self.plan.lengths[self._looks]
            places = self.plan.order[:length]
            numbers = self.race.open
            pairs = [self.contest.candidates[number] for number in numbers]
            bases = [self.contest.bases[number] for number in numbers if self.contest.bases]
            used = [*pairs, *bases]
            values = errors[np.ix_(used, places)]
            if missing := np.flatnonzero(np.isnan(values).any(1)).tolist():
                return {used[number]: length for number in missing}
            rows = values.reshape(-1, len(pairs), length)  # of the pairs and, if any, their bases
            with np.errstate(invalid="ignore"):
                found = rows[0] - rows[1] if bases else rows[0]
                found = found * self.plan.scale[places]
            if np.isfinite(found).all():
                self.race.take(found)
                self._looks += 1
            elif self.contest.drops_lost:
                self.race.withdraw(found)
            else:
                self.finite = False
        return {}


def hold(
    contests: Sequence[Contest],
    errors: np.ndarray,
    plan: RacePlan,
    measure: Callable[[Mapping[int, int]], None] | None = None,
) -> list[Run]:
    """Race all contests over errors [P, N] of their pairs, NaN where they are not known.

    `measure` is given pair -> n and puts the errors at the first n places of the plan's order into
    `errors`, infinite ones where there are none to be had. Without it contests stay undecided where
    errors lack.
    """
    runs = [Run(contest, plan) for contest in contests]
    while True:
        asked: dict[int, int] = {}
        for run in runs:
            for pair, length in run.advance(errors).items():
                asked[pair] = max(asked.get(pair, 0), length)
        if not asked or measure is None:
            return runs
        measure(asked)


@functools.lru_cache
def look_share(doubt: float, lengths: tuple[int, ...]) -> float:
    """What each look but that at the full plan may err by, so that all of them err by `doubt` together.

    The worst case is a difference of 0 over the full plan. Its means over the prefixes, each divided by its
    deviation, are a Gaussian Markov chain, a Brownian bridge at the looks: the share is that at which the
    chain crosses its quantile at any look with the probability `doubt` (Armitage, McPherson and Rowe 1969).
    """
    early, total = np.array(lengths[:-1], float), lengths[-1]
    if doubt == 0 or len(early) < 2:
        return doubt
    times = early / (total - early)  # of the Brownian motion that the bridge is at another clock
    carried = np.sqrt(times[:-1] / times[1:])

    def excess(share: float) -> float:
        bound = special.ndtri(share)
        grid = np.linspace(bound, GRID_END, GRID)
        weights = np.full(GRID, grid[1] - grid[0])
        weights[[0, -1]] /= 2
        density = _normal(grid)
        for rho in carried:
            width = math.sqrt(1 - rho**2)
            steps = _normal((grid[:, None] - rho * grid) / width) / width
            density = steps @ (density * weights)
        return 1 - float(density @ weights) - doubt

    return float(optimize.brentq(excess, doubt / len(early), doubt, xtol=doubt * 1e-4))


def _normal(values: np.ndarray) -> np.ndarray:
    return np.exp(-(values**2) / 2) / math.sqrt(2 * math.pi)


def _shrinkage(errors: np.ndarray, total: int, weights: np.ndarray) -> float:
    """The share of the means' variance between candidates that is no noise (James and Stein, 1961).

    The best of many equal candidates looks better than it is; with this share the differences shrink to
    what remains of them. 1 for fewer than four candidates, of which it cannot be told.
    """
    candidates, n = errors.shape
    if candidates < 4 or n >= total:
        return 1.0
    apart = errors - errors.mean(0)
    noise = apart.var(1, ddof=1).sum() / (candidates - 1) * _spread(weights, total)
    between = float((apart @ weights).var(ddof=1))
    if between == 0:
        return 0.0
    return max(0.0, 1 - (candidates - 3) / (candidates - 1) * noise / between)


def doubts(
    errors: np.ndarray,
    border: np.ndarray,
    total: int,
    shrunk: float = 1.0,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """The probability that a candidate is on the other side of the border at the full plan.

    `errors` [C, n] in the order of their timesteps, `border` [n] the errors of the candidate at the
    border, `total` the N timesteps of the full plan. One-sided, of Student's t over paired differences,
    whose spread is that of neighbouring timesteps; each borrows from the others' mean spread as if that
    were known from BORROWED more degrees of freedom. `shrunk` is the share of the differences that is
    no noise. `weights` [n] are those of the columns in a mean, all the same unless told.
    """
    differences = np.asarray(errors, float) - np.asarray(border, float)
    count, n = differences.shape
    if n >= total:
        return np.zeros(count)
    if shrunk == 0:  # nothing tells them apart
        return np.full(count, 0.5)
    weights = np.full(n, 1 / n) if weights is None else weights
    means, steps = differences @ weights, np.diff(differences, axis=1)
    variances = (steps**2).sum(1) / (2 * (n - 1))
    freedom = 2 * (n - 1) ** 2 / (3 * n - 4)  # what this estimate's own variance amounts to
    if count > 1:
        others = (variances.sum() - variances) / (count - 1)
        variances = (freedom * variances + BORROWED * others) / (freedom + BORROWED)
        freedom += BORROWED
    deviation = np.sqrt(variances * _spread(weights, total))
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(
            deviation > 0, np.abs(means) / deviation, np.where(means == 0, 0, np.inf)
        )
    return special.stdtr(freedom, -distance * math.sqrt(shrunk))


def race(errors: np.ndarray, rules: Racing | Rounds, kept: int = 1) -> tuple[list[int], np.ndarray]:
    """A race over errors [C, N] that are known, in the plan's order: the winners, the best first, and how
    many timesteps each candidate was asked for, int [C]."""
    candidates, total = errors.shape
    plan = RacePlan(rules, _steps(rules, total))
    (run,) = hold([Contest(list(range(candidates)), kept)], errors, plan)
    return run.race.best(), run.race.spent


def _steps(rules: Racing | Rounds, total: int) -> tuple[int, ...]:
    """Timesteps of which there are `total`."""
    return tuple(rounds(rules.samples)[-1] if isinstance(rules, Rounds) else range(total))


def rounds(samples: Sequence[int], total: int = TRAINED) -> list[list[int]]:
    """The timesteps of each round of Diffusion Classifier (Li et al. 2023; n_samples of their code): an
    even part of the grid of the largest round, so that a later round finds what an earlier one scored.

    Raises InputError for a number that `total` training timesteps cannot give.
    """
    if not samples or min(samples) < 1 or max(samples) > total:
        raise InputError(f"rounds {list(samples)}: each must be 1 to {total}")
    grid = plan_timesteps("diffusion-classifier", max(samples), total=total)
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
