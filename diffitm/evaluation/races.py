"""Races over stored errors: how examples are raced, and what that took and how true it was."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.evaluation.diagnostics import Diagnostics
from diffitm.metrics.intervals import interval
from diffitm.scoring.racing import RacePlan, Racing, Rounds, Run
from diffitm.store.join import ScoredExample
from diffitm.store.score_store import Store


@dataclass(frozen=True)
class RaceOptions:
    """How examples are raced; `audit` is the share of them, chosen by chance, that is scored in full."""

    rules: Racing | Rounds
    audit: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.audit <= 1:
            raise InputError(f"{self.audit}: must be 0 to 1", "racing_audit")

    def plan(self, store: Store, error: str, weights: np.ndarray | None) -> RacePlan | None:
        """The races over a store's errors; None where a pair has a single score."""
        if store.similarity:
            return None
        timesteps = tuple(store.config["timesteps"])
        used = None if weights is None else tuple(map(float, weights))
        return RacePlan(self.rules, timesteps, error, used)

    def is_audited(self, task: str, example: Example) -> bool:
        """Whether an example is scored in full; always the same ones of a task, of a larger share more."""
        digest = hashlib.sha256(f"{task}\n{example.id}".encode()).digest()
        return int.from_bytes(digest[:8]) < self.audit * 2**64


def pair_values(item: ScoredExample) -> np.ndarray:
    """Errors [pairs, N] of an example as its contests number them, NaN where there are none."""
    images, texts = len(item.example.images), len(item.example.texts)
    conditional = item.conditional.reshape(images * texts, -1)
    unconditional = item.unconditional[:, 0] if item.unconditional.size else np.zeros((0, 0))
    return np.concatenate([conditional, unconditional.reshape(-1, conditional.shape[1])])


@dataclass(frozen=True)
class RaceFigure:
    """What racing a task took and how true it was.

    `contests` were decided with `forwards` of the `full` ones that scoring all of their pairs takes; of
    `audited` contests, which were scored in full as well, `agreed` came out alike. `agreement` is their
    share, with the 95% interval; null without any.
    """

    model: str
    task: str
    rules: str
    contests: int
    forwards: int
    full: int
    audited: int
    agreed: int
    agreement: float | None
    low: float | None
    high: float | None

    @property
    def share(self) -> float:
        """Of the full run's forwards."""
        return self.forwards / self.full


class RaceStats:
    """Adds up the races of a task; `sample` is what the audited examples tell beyond that."""

    def __init__(
        self, plan: RacePlan, options: RaceOptions, sample: Diagnostics | None = None
    ) -> None:
        self.plan, self.options, self.sample = plan, options, sample
        self.spent: dict[tuple[str, str], int] = {}
        self.contests = 0
        self.agreed: list[float] = []
        self.clusters: list[str] = []

    def add(
        self, item: ScoredExample, runs: Sequence[Run], errors: np.ndarray, audited: bool
    ) -> None:
        """The decided contests of an example with errors [pairs, N], all known if it is audited. A pair
        that another has, too, counts once."""
        example = item.example
        texts, pairs = len(example.texts), len(example.images) * len(example.texts)
        for run in runs:
            self.contests += 1
            for p, spent in run.spent.items():
                image = p // texts if p < pairs else p - pairs
                key = example.images[image], example.texts[p % texts] if p < pairs else ""
                self.spent[key] = max(self.spent.get(key, 0), spent)
        if audited:
            self.agreed += [float(self._agrees(run, errors)) for run in runs]
            self.clusters += [example.cluster] * len(runs)

    def _agrees(self, run: Run, errors: np.ndarray) -> bool:
        """Whether the full plan has no loser before a winner, or the one asked about on the same side."""
        values = errors[run.contest.candidates]
        if run.contest.bases:
            with np.errstate(invalid="ignore"):
                values = values - errors[run.contest.bases]
        means = (values * self.plan.scale)[:, self.plan.order].mean(1)
        means = np.where(np.isnan(means), np.inf, means)  # of what cannot be scored
        if (about := run.contest.about) is None:
            worst = means[run.race.winners].max(initial=-np.inf)
            return bool(worst <= means[run.race.losers].min(initial=np.inf))
        before, level = (means < means[about]).sum(), (means == means[about]).sum()
        if about in run.race.winners:
            return bool(before < run.contest.kept)
        return bool(before + level > run.contest.kept)

    def read(self, model: str, task: str) -> RaceFigure | None:
        """The figure, None without a contest."""
        if not self.contests:
            return None
        agreement = low = high = None
        if self.agreed:
            agreement = float(np.mean(self.agreed))
            low, high = interval(np.array(self.agreed), np.array(self.clusters))
        return RaceFigure(
            model=model,
            task=task,
            rules=describe(self.plan.rules),
            contests=self.contests,
            forwards=sum(self.spent.values()),
            full=len(self.spent) * len(self.plan.timesteps),
            audited=len(self.agreed),
            agreed=int(sum(self.agreed)),
            agreement=agreement,
            low=low,
            high=high,
        )


def describe(rules: Racing | Rounds) -> str:
    """The rules in a few words: 'doubt 0.01', 'rounds of 16, 64 keeping 5, 1'."""
    if isinstance(rules, Racing):
        return f"doubt {rules.doubt:g}"
    samples, kept = (", ".join(map(str, numbers)) for numbers in (rules.samples, rules.kept))
    return f"rounds of {samples} keeping {kept}"
