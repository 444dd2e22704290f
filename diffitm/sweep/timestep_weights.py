"""Weights of timesteps, learned from stored errors: which timesteps tell right pairs from wrong ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize

STRENGTHS = (math.inf, 10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)  # of the pull towards equal weights
MOST = 20_000  # decisions of a task; more hardly move the weights
STEPS = 500


@dataclass(frozen=True)
class Contrasts:
    """A task's decisions: the error of each wrong candidate less that of the right one, [M, N] over
    timesteps, those of a decision in a row from `starts` [D] on. `fold` [D] is 0 or 1, `cluster` [D]
    labels decisions that share an image or a set."""

    values: np.ndarray
    starts: np.ndarray
    fold: np.ndarray
    cluster: np.ndarray

    def of(self, chosen: np.ndarray) -> Contrasts:
        """The decisions of a mask [D]."""
        counts = np.diff(np.append(self.starts, len(self.values)))
        kept = counts[chosen]
        starts = np.cumsum(kept) - kept
        values = self.values[np.repeat(chosen, counts)]
        return Contrasts(values, starts, self.fold[chosen], self.cluster[chosen])

    def at(self, positions: np.ndarray) -> Contrasts:
        """The same with some of the timesteps."""
        return replace(self, values=self.values[:, positions])


def learn(tasks: Sequence[Contrasts], positions: np.ndarray, number: int) -> np.ndarray:
    """Weights [number] of the `number` most useful of the timesteps at `positions`, and their place
    among all: an array [2, number] of positions and weights that sum to 1.

    Weights are not negative and shared by all tasks, each of which counts the same. They minimise the
    cross-entropy of choosing the right candidate by the weighted error, plus a pull towards equal
    weights: the strongest one whose loss in two-fold cross-validation over clusters is within a
    standard error of the least, so weights stay equal, and the timesteps evenly
    spread, unless the gain is beyond chance. The problem is convex: no start, no other answer.
    """
    tasks = [_thinned(task) for task in tasks]
    weights = _fit([task.at(positions) for task in tasks])
    if number < len(positions):
        best = np.sort(np.argsort(-weights, kind="stable")[:number])
        positions = positions[best if np.ptp(weights) else spread(len(positions), number)]
        weights = _fit([task.at(positions) for task in tasks])
    return np.stack([positions.astype(float), weights])


def spread(count: int, number: int) -> np.ndarray:
    """`number` of `count` places, evenly spread."""
    return ((np.arange(number) + 0.5) * count / number).astype(int)


def _thinned(task: Contrasts) -> Contrasts:
    """At most so many decisions, evenly spread, in units of their spread."""
    count = len(task.starts)
    if count > MOST:
        chosen = np.zeros(count, bool)
        chosen[np.arange(MOST) * count // MOST] = True
        task = task.of(chosen)
    spread = float(task.values.std()) or 1.0
    return replace(task, values=task.values.astype(np.float64) / spread)


def _fit(tasks: Sequence[Contrasts]) -> np.ndarray:
    """Weights [N] that sum to 1."""
    steps = tasks[0].values.shape[1]
    if steps == 1:
        return np.ones(1)
    found = _minimum(tasks, _strength(tasks))
    return found / found.sum() if found.sum() > 0 else np.full(steps, 1 / steps)


def _strength(tasks: Sequence[Contrasts]) -> float:
    """Of the pull, by cross-validation."""
    splits = [
        (
            [task.of(task.fold == fold) for task in tasks],
            [task.of(task.fold != fold) for task in tasks],
        )
        for fold in (0, 1)
    ]
    if any(len(part.starts) == 0 for split in splits for side in split for part in side):
        return STRENGTHS[0]
    losses = []  # [strengths][tasks][decisions]
    for strength in STRENGTHS:
        fitted = [(_minimum(train, strength), held) for train, held in splits]
        losses.append(
            [
                np.concatenate([_losses(held[i], weights)[0] for weights, held in fitted])
                for i in range(len(tasks))
            ]
        )
    labels = [np.concatenate([held[i].cluster for _, held in splits]) for i in range(len(tasks))]
    means = [np.mean([loss.mean() for loss in found]) for found in losses]
    best = int(np.argmin(means))
    for i, found in enumerate(losses):
        apart = [one - other for one, other in zip(found, losses[best], strict=True)]
        error = np.sqrt(sum(map(_variance, apart, labels))) / len(apart)
        if means[i] - means[best] <= error:
            return STRENGTHS[i]
    return STRENGTHS[best]


def _variance(values: np.ndarray, clusters: np.ndarray) -> float:
    """Of the mean of values [D] that are dependent within clusters."""
    _, place = np.unique(clusters, return_inverse=True)
    return float((np.bincount(place, values - values.mean()) ** 2).sum()) / len(values) ** 2


def _minimum(tasks: Sequence[Contrasts], strength: float) -> np.ndarray:
    """Weights [N], in the scale that fits best."""
    steps = tasks[0].values.shape[1]
    if math.isinf(strength):
        means = [replace(task, values=task.values.mean(1, keepdims=True)) for task in tasks]
        return np.full(steps, _minimum(means, 0.0)[0] / steps)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        apart = weights - weights.mean()
        value = strength * steps * float(apart @ apart)
        gradient = 2 * strength * steps * apart
        for task in tasks:
            losses, slope = _losses(task, weights)
            value += float(losses.mean()) / len(tasks)
            gradient = gradient + slope / len(tasks)
        return value, gradient

    start, bounds = np.full(steps, 1 / steps), [(0.0, None)] * steps
    how = {"jac": True, "method": "L-BFGS-B", "bounds": bounds, "options": {"maxiter": STEPS}}
    return minimize(objective, start, **how).x


def _losses(task: Contrasts, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + sum exp(-contrast)) of each decision [D], and the gradient [N] of its mean."""
    scores = -(task.values @ weights)
    counts = np.diff(np.append(task.starts, len(scores)))
    top = np.maximum(np.maximum.reduceat(scores, task.starts), 0.0)
    terms = np.exp(scores - np.repeat(top, counts))
    sums = np.exp(-top) + np.add.reduceat(terms, task.starts)
    share = terms / np.repeat(sums, counts) / len(task.starts)
    return top + np.log(sums), -(share @ task.values)
