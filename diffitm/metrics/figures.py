"""Figures: what a task reports of its decisions, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np

from diffitm.metrics.credit import Credit, Credits, together
from diffitm.metrics.intervals import interval, macro_interval

# Metrics beside the main ones, by how they begin.
SECONDARY = ("R@5", "macro", "var.", "R@1 as ")
Unit = Literal["share", "effect size", "number"]


@dataclass(frozen=True)
class Decision:
    """What became of one example under one kind of score; `credits` is None without a score."""

    cluster: str
    groups: dict[str, str]
    chance: dict[str, float]
    credits: dict[str, Credit] | None
    failed: bool = False


@dataclass(frozen=True)
class Figure:
    """One number of a task. `low` and `high` bound the 95% interval, `n` examples count, `p` is that
    of a test against chance, where there is one. Without a scored example the value is None."""

    group: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    chance: float | None
    ties: int = 0
    failures: int = 0
    unit: Unit = "share"
    p: float | None = None


class Labels(NamedTuple):
    """Labels of examples as numbers: `codes` [n] into `names`, which are sorted."""

    names: Sequence[str]
    codes: np.ndarray


class Groups(NamedTuple):
    """The groups of examples: those of example i are the `pairs` (key, value) that codes[starts[i] :
    starts[i + 1]] tell. Pairs are in the order in which they first come."""

    pairs: Sequence[tuple[str, str]]
    codes: np.ndarray
    starts: np.ndarray


class Decisions(Sequence[Decision]):
    """Decisions as columns; one by itself is made when it is asked for.

    `scored` [n] tells which have credits, `failed` [n] which failed; a column is NaN where a decision lacks
    its metric.
    """

    def __init__(
        self,
        clusters: Labels,
        groups: Groups,
        chance: dict[str, np.ndarray],
        credits: dict[str, Credits],
        scored: np.ndarray,
        failed: np.ndarray,
    ) -> None:
        self.clusters, self.groups, self.chance, self.credits = clusters, groups, chance, credits
        self.scored, self.failed = scored, failed

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> Decisions:
        """The columns of single ones."""
        if isinstance(decisions, Decisions):
            return decisions
        names = sorted({d.cluster for d in decisions})
        codes = {name: code for code, name in enumerate(names)}
        pairs: dict[tuple[str, str], int] = {}
        own = [pairs.setdefault(pair, len(pairs)) for d in decisions for pair in d.groups.items()]
        chances = dict.fromkeys(name for d in decisions for name in d.chance)
        return cls(
            Labels(names, np.array([codes[d.cluster] for d in decisions], int)),
            Groups(list(pairs), np.array(own, int), _starts([len(d.groups) for d in decisions])),
            {n: np.array([d.chance.get(n, np.nan) for d in decisions], float) for n in chances},
            together([d.credits or {} for d in decisions]),
            np.array([d.credits is not None for d in decisions], bool),
            np.array([d.failed for d in decisions], bool),
        )

    def __len__(self) -> int:
        return len(self.failed)

    @overload
    def __getitem__(self, place: int) -> Decision: ...
    @overload
    def __getitem__(self, place: slice) -> list[Decision]: ...
    def __getitem__(self, place: int | slice) -> Decision | list[Decision]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        i = range(len(self))[place]
        own = self.groups.codes[self.groups.starts[i] : self.groups.starts[i + 1]]
        credits = None
        if self.scored[i]:
            credits = {
                name: Credit(float(c.values[i]), bool(c.tied[i]), bool(c.finite[i]))
                for name, c in self.credits.items()
                if not np.isnan(c.values[i])
            }
        return Decision(
            self.clusters.names[self.clusters.codes[i]],
            dict(self.groups.pairs[code] for code in own),
            {n: float(values[i]) for n, values in self.chance.items() if not np.isnan(values[i])},
            credits,
            bool(self.failed[i]),
        )

    def by_group(self) -> dict[str, np.ndarray]:
        """Places of the decisions of 'all' and of each group, in the order in which groups first come."""
        names: dict[str, int] = {}
        number = [
            names.setdefault(f"{key}={value}", len(names)) for key, value in self.groups.pairs
        ]
        places = np.repeat(np.arange(len(self)), np.diff(self.groups.starts))
        codes = np.array(number, int)[self.groups.codes]
        order = np.argsort(codes, kind="stable")
        members = np.split(places[order], np.cumsum(np.bincount(codes, minlength=len(names)))[:-1])
        return {"all": np.arange(len(self)), **dict(zip(names, members, strict=False))}


def _starts(counts: Sequence[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(int)


def means(decisions: Sequence[Decision]) -> list[Figure]:
    """The mean credit of each metric over all decisions and over each group."""
    columns = Decisions.of(decisions)
    return [
        _mean(columns, members[there], metric, group)
        for group, members in columns.by_group().items()
        for metric, chance in columns.chance.items()
        if (there := ~np.isnan(chance[members])).any()
    ]


def _mean(decisions: Decisions, members: np.ndarray, metric: str, group: str) -> Figure:
    kept = members[decisions.scored[members]]
    found = len(kept) > 0
    value = low = high = None
    ties = 0
    if found:
        values = decisions.credits[metric].values[kept]
        if np.isnan(values).any():
            raise KeyError(metric)
        value, ties = float(values.mean()), int(decisions.credits[metric].tied[kept].sum())
        low, high = interval(values, decisions.clusters.codes[kept])
    return Figure(
        group=group,
        metric=metric,
        value=value,
        low=low,
        high=high,
        n=len(kept),
        chance=float(np.mean(decisions.chance[metric][members])),
        ties=ties,
        failures=int(decisions.failed[members].sum()),
    )


def scored(
    decisions: Iterable[Decision], metric: str
) -> tuple[np.ndarray, np.ndarray, list[Credit]]:
    """Values [n], clusters [n] and credits of the decisions that have a score."""
    kept = [d for d in decisions if d.credits is not None]
    credits = [d.credits[metric] for d in kept if d.credits is not None]
    return np.array([c.value for c in credits]), np.array([d.cluster for d in kept]), credits


def macro(decisions: Sequence[Decision], metric: str, key: str, kept: set[str]) -> Figure:
    """The mean over the kept groups of each group's mean credit, its chance that of their mean chance;
    clusters are resampled."""
    members = [decision for decision in decisions if decision.groups[key] in kept]
    values, clusters, credits = scored(members, metric)
    groups = np.array([d.groups[key] for d in members if d.credits is not None])
    name = f"macro {metric}"
    failures = sum(decision.failed for decision in members)
    parts: dict[str, list[float]] = {}
    for decision in members:
        parts.setdefault(decision.groups[key], []).append(decision.chance[metric])
    chance = float(np.mean([np.mean(part) for part in parts.values()])) if parts else 0.0
    if not credits:
        return Figure("all", name, None, None, None, 0, chance, failures=failures)
    value = float(np.mean([values[groups == group].mean() for group in np.unique(groups)]))
    low, high = macro_interval(values, clusters, groups)
    ties = sum(credit.tied for credit in credits)
    return Figure("all", name, value, low, high, len(values), chance, ties, failures)
