"""Figures: what a task reports of its decisions, with intervals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffitm.metrics.credit import Credit
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


def means(decisions: Sequence[Decision]) -> list[Figure]:
    """The mean credit of each metric over all decisions and over each group."""
    groups: dict[str, list[Decision]] = {"all": list(decisions)}
    for decision in decisions:
        for key, value in decision.groups.items():
            groups.setdefault(f"{key}={value}", []).append(decision)
    metrics = list(dict.fromkeys(name for decision in decisions for name in decision.chance))
    return [
        _mean(members, metric, group)
        for group, members in groups.items()
        for metric in metrics
        if any(metric in decision.chance for decision in members)
    ]


def _mean(members: list[Decision], metric: str, group: str) -> Figure:
    members = [decision for decision in members if metric in decision.chance]
    values, clusters, credits = scored(members, metric)
    found = bool(credits)
    low, high = interval(values, clusters) if found else (None, None)
    return Figure(
        group=group,
        metric=metric,
        value=float(values.mean()) if found else None,
        low=low,
        high=high,
        n=len(values),
        chance=float(np.mean([decision.chance[metric] for decision in members])),
        ties=sum(credit.tied for credit in credits),
        failures=sum(decision.failed for decision in members),
    )


def scored(
    decisions: Iterable[Decision], metric: str
) -> tuple[np.ndarray, np.ndarray, list[Credit]]:
    """Values [n], clusters [n] and credits of the decisions that have a score."""
    kept = [d for d in decisions if d.credits is not None]
    credits = [d.credits[metric] for d in kept if d.credits is not None]
    return np.array([c.value for c in credits]), np.array([d.cluster for d in kept]), credits


def macro(decisions: Sequence[Decision], metric: str, key: str, kept: set[str]) -> Figure:
    """The mean over the kept groups of each group's mean credit; clusters are resampled."""
    members = [decision for decision in decisions if decision.groups[key] in kept]
    values, clusters, credits = scored(members, metric)
    groups = np.array([d.groups[key] for d in members if d.credits is not None])
    name = f"macro {metric}"
    failures = sum(decision.failed for decision in members)
    chance = float(np.mean([d.chance[metric] for d in members])) if members else 0.0
    if not credits:
        return Figure("all", name, None, None, None, 0, chance, failures=failures)
    value = float(np.mean([values[groups == group].mean() for group in np.unique(groups)]))
    low, high = macro_interval(values, clusters, groups)
    ties = sum(credit.tied for credit in credits)
    return Figure("all", name, value, low, high, len(values), chance, ties, failures)
