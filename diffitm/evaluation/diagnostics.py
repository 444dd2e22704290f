"""What stored errors tell beyond a task's figures: curves over timesteps, accuracy by the number of
timesteps, and the examples that a model is surest of or nearly gets right. No model is needed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diffitm.metrics.intervals import interval, mean_interval
from diffitm.store.join import ScoredExample
from diffitm.tasks.base import Task

NUMBERS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
CASES = 3


@dataclass(frozen=True)
class Curve:
    """Mean error at each timestep of the right pairs and of the wrong ones, over `n` examples;
    `score` normalised: less the unconditional error."""

    model: str
    task: str
    score: str
    timesteps: list[int]
    right: list[float]
    wrong: list[float]
    n: int


@dataclass(frozen=True)
class Count:
    """A metric over all examples with this number of the stored timesteps, evenly spread."""

    model: str
    task: str
    metric: str
    score: str
    timesteps: int
    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Denoising:
    """Mean error of a task's right pairs and of their images with the empty text (null where it was
    not needed), over `n` examples. `change` and `empty_change`: less that of the first model with the
    same timesteps, on the same examples, with the 95% interval; null for that model itself."""

    model: str
    task: str
    right: float
    empty: float | None
    n: int
    change: tuple[float, float, float] | None = None
    empty_change: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class CasePair:
    """An image and a text of an example, their score and whether they belong together."""

    image: str
    text: str
    score: float
    right: bool


@dataclass(frozen=True)
class Case:
    """An example worth a look. `margin` is the score of the right answer less that of the best wrong
    one; `kind` is 'surest right', 'surest wrong' or 'nearest miss'."""

    model: str
    task: str
    kind: str
    example: str
    margin: float
    score: str
    pairs: list[CasePair]


def right_pairs(item: ScoredExample) -> np.ndarray:
    """bool [images, texts]: which pairs of an example belong together."""
    example = item.example
    mask = np.zeros((len(example.images), len(example.texts)), bool)
    if example.direction == "both":
        np.fill_diagonal(mask, True)
    else:
        mask.flat[example.gold] = True
    return mask


def spread_weights(steps: int) -> dict[int, np.ndarray]:
    """Number of timesteps -> weights [steps] that pick that many, evenly spread."""
    found = {}
    for number in (*(n for n in NUMBERS if n < steps), steps):
        weights = np.zeros(steps)
        weights[((np.arange(number) + 0.5) * steps / number).astype(int)] = 1
        found[number] = weights
    return found


class ErrorCurves:
    """Adds up the errors of right and wrong pairs."""

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}
        self.n = 0

    def add(self, item: ScoredExample) -> None:
        """Each example weighs the same, however many wrong pairs it has."""
        right = right_pairs(item)
        if item.failure is not None or item.similarity is not None or right.all():
            return
        kinds = {"conditional": item.conditional}
        if item.example.needs_unconditional:
            kinds["normalised"] = item.conditional - item.unconditional
        if not all(np.isfinite(errors).all() for errors in kinds.values()):
            return
        self.n += 1
        for kind, errors in kinds.items():
            pair = np.stack([errors[right].mean(0), errors[~right].mean(0)])
            self.sums[kind] = self.sums.get(kind, 0.0) + pair

    def read(self, model: str, task: str, timesteps: list[int]) -> list[Curve]:
        """The mean curves."""
        found = []
        for kind, total in self.sums.items():
            right, wrong = (total / self.n).tolist()
            found.append(Curve(model, task, kind, timesteps, right, wrong, self.n))
        return found


class DenoisingStats:
    """Keeps each example's error of its right pairs and of the empty text, NaN without one."""

    def __init__(self) -> None:
        self.values: list[tuple[float, float]] = []
        self.clusters: list[str] = []

    def add(self, item: ScoredExample) -> None:
        """One example; of a model without errors, nothing."""
        if item.similarity is not None:
            return
        self.clusters.append(item.example.cluster)
        if item.failure is not None:
            self.values.append((np.nan, np.nan))
            return
        right = right_pairs(item)
        self.values.append((item.conditional[right].mean(), item.unconditional[right].mean()))

    def read(self, model: str, task: str, first: DenoisingStats | None) -> Denoising | None:
        """The means, and what changed since `first`."""
        values = np.array(self.values).reshape(-1, 2)
        kept = np.isfinite(values)
        if not kept[:, 0].any():
            return None
        right = float(values[kept[:, 0], 0].mean())
        empty = float(values[kept[:, 1], 1].mean()) if kept[:, 1].any() else None
        changes = [None if first is None else self._change(first, i) for i in (0, 1)]
        return Denoising(model, task, right, empty, int(kept[:, 0].sum()), *changes)

    def _change(self, first: DenoisingStats, column: int) -> tuple[float, float, float] | None:
        difference = np.array(self.values)[:, column] - np.array(first.values)[:, column]
        both = np.isfinite(difference)
        clusters = np.array(self.clusters)[both]
        if len(np.unique(clusters)) < 2:
            return None
        low, high = mean_interval(difference[both], clusters)
        return float(difference[both].mean()), low, high


class Counts:
    """The credits of every example for every number of timesteps."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.weights = task, spread_weights(steps)
        self.clusters: list[str] = []
        self.values: dict[tuple[str, str, int], list[float]] = {}

    def add(self, item: ScoredExample) -> None:
        """One example, if it has scores."""
        if item.failure is not None:
            return
        self.clusters.append(item.example.cluster)
        for number, weights in self.weights.items():
            for kind, scores in item.scores(weights).items():
                for metric, credit in self.task.credits(item.example, scores).items():
                    self.values.setdefault((metric, kind, number), []).append(credit.value)

    def read(self, model: str) -> list[Count]:
        """A metric that only some examples have is left out."""
        found, clusters = [], np.array(self.clusters)
        for (metric, kind, number), values in self.values.items():
            if len(values) == len(clusters):
                low, high = interval(np.array(values), clusters)
                value, n = float(np.mean(values)), len(values)
                name = self.task.name
                found.append(Count(model, name, metric, kind, number, value, low, high, n))
        return found


@dataclass
class Cases:
    """Keeps the examples with the largest margins and the nearest misses."""

    kept: dict[str, list[tuple[float, int, ScoredExample, str]]] = field(default_factory=dict)
    seen: int = 0

    def add(self, item: ScoredExample) -> None:
        """One example under its last kind of score, normalised where images are compared."""
        scores = list(item.scores().items())
        if not scores or right_pairs(item).all():
            return
        kind, values = scores[-1]
        if not np.isfinite(values).all():
            return
        margin = _margin(item, values)
        self.seen += 1
        self._keep("surest right", -margin, item, kind, margin > 0)
        self._keep("surest wrong", margin, item, kind, margin < 0)
        self._keep("nearest miss", -margin, item, kind, margin < 0)

    def _keep(self, name: str, rank: float, item: ScoredExample, kind: str, fits: bool) -> None:
        if fits:
            best = self.kept.setdefault(name, [])
            bisect.insort(best, (rank, self.seen, item, kind), key=lambda entry: entry[:2])
            del best[CASES:]

    def read(self, model: str, task: str) -> list[Case]:
        """The best of each kind; a nearest miss is not also a surest wrong one."""
        found, shown = [], set()
        for name in ("surest right", "surest wrong", "nearest miss"):
            for rank, number, item, kind in self.kept.get(name, []):
                if number in shown:
                    continue
                shown.add(number)
                margin = rank if name == "surest wrong" else -rank
                pairs = _pairs(item, item.scores()[kind])
                found.append(Case(model, task, name, item.example.id, margin, kind, pairs))
        return found


def _margin(item: ScoredExample, scores: np.ndarray) -> float:
    """The right answer's score less the best wrong one's; of a Winoground pair, the lesser of both
    captions' margins between the images."""
    right = right_pairs(item)
    if item.example.direction == "both":
        others = np.where(right, -np.inf, scores).max(0)
        return float((np.diag(scores) - others).min())
    return float(scores[right].item() - scores[~right].max())


def _pairs(item: ScoredExample, scores: np.ndarray) -> list[CasePair]:
    """The right pair and the best wrong one; all four of a Winoground pair."""
    right = right_pairs(item)
    places: Sequence[tuple[int, int]]
    if item.example.direction == "both":
        places = list(np.ndindex(scores.shape))
    else:
        best = np.where(right, -np.inf, scores)
        places = [divmod(int(a.argmax()), a.shape[1]) for a in (right, best)]
    images, texts = item.example.images, item.example.texts
    return [
        CasePair(images[i], texts[j], float(scores[i, j]), bool(right[i, j])) for i, j in places
    ]


class Diagnostics:
    """All of these for one task and model; without decisions that are right or wrong, nothing.

    `incomplete`: examples were left out whose errors are not all known.
    """

    def __init__(self, task: Task, timesteps: Sequence[int]) -> None:
        self.task, self.timesteps = task, timesteps
        self.denoising, self.curves, self.cases = DenoisingStats(), ErrorCurves(), Cases()
        self.counts = Counts(task, len(timesteps))
        self.incomplete = False

    def add(self, item: ScoredExample) -> None:
        """One example."""
        if not self.task.graded or self.incomplete:
            return
        self.denoising.add(item)
        self.curves.add(item)
        self.cases.add(item)
        if self.timesteps:
            self.counts.add(item)
