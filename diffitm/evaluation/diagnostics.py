"""What stored errors tell beyond a task's figures: curves over timesteps, accuracy by the number of
timesteps, and the examples that a model is surest of or nearly gets right. No model is needed."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from diffitm.metrics.columns import Columns
from diffitm.metrics.intervals import interval, mean_interval
from diffitm.metrics.score import normalised_score
from diffitm.store.join import ScoredBatch, ScoredExample, ScoredPart
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


def right_pairs(item: ScoredExample, right: int = 1) -> np.ndarray:
    """bool [images, texts]: which pairs of an example belong together, `right` ones from the gold one on."""
    example = item.example
    mask = np.zeros((len(example.images), len(example.texts)), bool)
    if example.direction == "both":
        np.fill_diagonal(mask, True)
    else:
        mask.flat[example.gold : example.gold + right] = True
    return mask


def spread_weights(steps: int) -> dict[int, np.ndarray]:
    """Number of timesteps -> weights [steps] that pick that many, evenly spread."""
    found = {}
    for number in (*(n for n in NUMBERS if n < steps), steps):
        weights = np.zeros(steps)
        weights[((np.arange(number) + 0.5) * steps / number).astype(int)] = 1
        found[number] = weights
    return found


def _pair_places(batch: ScoredBatch, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Places [n, right] and [n, wrong] among each example's pairs, image by image; `count` are right where
    candidates are compared."""
    images, texts = batch.shape
    pairs = np.arange(images * texts)
    if batch.direction == "both":
        mask = np.zeros(batch.shape, bool)
        np.fill_diagonal(mask, True)
        return tuple(  # type: ignore[return-value]
            np.broadcast_to(pairs[part], (len(batch), part.sum()))
            for part in (mask.ravel(), ~mask.ravel())
        )
    right, others = pairs[batch.golds][:, None], pairs[: len(pairs) - count]
    return right + np.arange(count), others + count * (others >= right)


def _of_pairs(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Values [n, places, ..] of some pairs, from those [n, images, texts, ..] of all."""
    flat = values.reshape(len(values), values.shape[1] * values.shape[2], *values.shape[3:])
    return np.asarray(flat[np.arange(len(flat))[:, None], places])


class ErrorCurves:
    """Adds up the errors of right and wrong pairs."""

    def __init__(self, right: int = 1) -> None:
        self.right = right
        self.sums: dict[str, np.ndarray] = {}
        self.n = 0

    def add(self, item: ScoredExample) -> None:
        """One example."""
        self.add_part(ScoredPart.of(item))

    def add_part(self, part: ScoredPart) -> None:
        """Each example weighs the same, however many wrong pairs it has."""
        found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        for batch in part.batches:
            right, wrong = _pair_places(batch, self.right)
            if batch.similarity is not None or not wrong.shape[1]:
                continue
            kinds = {"conditional": batch.conditional}
            if batch.needs_unconditional:
                kinds["normalised"] = -normalised_score(batch.conditional, batch.unconditional)
            finite = np.all([np.isfinite(e).all((1, 2, 3)) for e in kinds.values()], axis=0)
            self.n += int(finite.sum())
            for kind, errors in kinds.items():
                chosen = errors[finite]
                means = (_of_pairs(chosen, places[finite]).mean(1) for places in (right, wrong))
                lines = batch.places[finite], np.stack(list(means), 1)
                found.setdefault(kind, []).append(lines)
        for kind, lists in found.items():
            places, pairs = (np.concatenate(arrays) for arrays in zip(*lists, strict=True))
            if not len(places):
                continue
            if kind in self.sums:
                pairs = np.concatenate([self.sums[kind][None], pairs[np.argsort(places)]])
            else:
                pairs = pairs[np.argsort(places)]
            self.sums[kind] = pairs.sum(0)  # one after the other, in the order of the examples

    def read(self, model: str, task: str, timesteps: list[int]) -> list[Curve]:
        """The mean curves."""
        found = []
        for kind, total in self.sums.items():
            right, wrong = (total / self.n).tolist()
            found.append(Curve(model, task, kind, timesteps, right, wrong, self.n))
        return found


class DenoisingStats:
    """Keeps each example's error of its right pairs and of the empty text, NaN without one."""

    def __init__(self, right: int = 1) -> None:
        self.right = right
        self._values: list[np.ndarray] = []
        self._clusters: list[np.ndarray] = []

    @property
    def values(self) -> np.ndarray:
        """[n, 2]"""
        return np.concatenate([np.zeros((0, 2)), *self._values])

    @property
    def clusters(self) -> np.ndarray:
        """[n]"""
        return np.concatenate(self._clusters)

    def add(self, item: ScoredExample) -> None:
        """One example."""
        self.add_part(ScoredPart.of(item))

    def add_part(self, part: ScoredPart) -> None:
        """Some examples; of a model without errors, nothing."""
        values = np.full((part.size, 2), np.nan)
        for batch in part.batches:
            if batch.similarity is not None:
                continue
            right, _ = _pair_places(batch, self.right)
            for column, errors in enumerate((batch.conditional, batch.unconditional)):
                chosen = _of_pairs(errors, right).reshape(len(batch), -1)
                values[batch.places, column] = chosen.mean(1)
        self._values.append(values)
        self._clusters.append(part.clusters)

    def read(self, model: str, task: str, first: DenoisingStats | None) -> Denoising | None:
        """The means, and what changed since `first`."""
        values = self.values
        kept = np.isfinite(values)
        if not kept[:, 0].any():
            return None
        right = float(values[kept[:, 0], 0].mean())
        empty = float(values[kept[:, 1], 1].mean()) if kept[:, 1].any() else None
        changes = [None if first is None else self._change(first, i) for i in (0, 1)]
        return Denoising(model, task, right, empty, int(kept[:, 0].sum()), *changes)

    def _change(self, first: DenoisingStats, column: int) -> tuple[float, float, float] | None:
        with np.errstate(invalid="ignore"):
            difference = self.values[:, column] - first.values[:, column]
        both = np.isfinite(difference)
        clusters = self.clusters[both]
        if len(np.unique(clusters)) < 2:
            return None
        low, high = mean_interval(difference[both], clusters)
        return float(difference[both].mean()), low, high


class Counts:
    """The credits of every example for every number of timesteps."""

    def __init__(self, task: Task, steps: int) -> None:
        self.task, self.weights = task, spread_weights(steps)
        self._clusters: list[np.ndarray] = []
        self._values: Columns[tuple[str, str, int]] = Columns()
        self._n = 0

    def add_part(self, part: ScoredPart) -> None:
        """Some examples, of which those with scores count."""
        scored = np.ones(part.size, bool)
        scored[list(part.failures)] = False
        numbers = self._n + np.cumsum(scored) - 1
        self._n += int(scored.sum())
        self._clusters.append(part.clusters[scored])
        for batch in part.batches:
            places = numbers[batch.places]
            for number, weights in self.weights.items():
                for kind, scores in batch.scores(weights).items():
                    found = self.task.credits_each(batch.examples, batch.golds, scores)
                    for metric, credits in found.items():
                        self._values.put((metric, kind, number), places, credits.values)

    def read(self, model: str) -> list[Count]:
        """A metric that only some examples have is left out."""
        found, name = [], self.task.name
        clusters = np.concatenate(self._clusters) if self._clusters else np.zeros(0)
        for (metric, kind, number), values in self._values.read(self._n).items():
            if not np.isnan(values).any():
                low, high = interval(values, clusters)
                value, n = float(np.mean(values)), len(values)
                found.append(Count(model, name, metric, kind, number, value, low, high, n))
        return found


@dataclass
class Cases:
    """Keeps the examples with the largest margins and the nearest misses."""

    right: int = 1
    kept: dict[str, list[tuple[float, int, ScoredExample, str]]] = field(default_factory=dict)
    seen: int = 0

    def add(self, item: ScoredExample) -> None:
        """One example."""
        self.add_part(ScoredPart.of(item))

    def add_part(self, part: ScoredPart) -> None:
        """Examples under their last kind of score, normalised where images are compared."""
        margins = np.full(part.size, np.nan)
        owners: dict[int, tuple[ScoredBatch, int]] = {}
        chosen = set[int]()
        for batch in part.batches:
            if not _pair_places(batch, self.right)[1].shape[1]:
                continue
            values = list(batch.scores().values())[-1]
            finite = np.isfinite(values).all((1, 2))
            margins[batch.places[finite]] = _margins(batch, values, self.right)[finite]
        order = np.flatnonzero(~np.isnan(margins))
        numbers = np.zeros(part.size, int)
        numbers[order] = self.seen + 1 + np.arange(len(order))
        self.seen += len(order)
        ranks = {}
        for name, sign in (("surest right", 1), ("surest wrong", -1), ("nearest miss", -1)):
            fits = order[margins[order] * sign > 0]
            rank = margins if name == "surest wrong" else -margins
            best = fits[np.argsort(rank[fits], kind="stable")[:CASES]]
            ranks[name] = [(float(rank[place]), int(place)) for place in best]
            chosen.update(map(int, best))
        for batch in part.batches:
            for number in np.flatnonzero(np.isin(batch.places, list(chosen))):
                owners[int(batch.places[number])] = batch, int(number)
        for name, best_of in ranks.items():
            for value, place in best_of:
                self._keep(name, value, int(numbers[place]), *owners[place])

    def _keep(self, name: str, rank: float, seen: int, batch: ScoredBatch, number: int) -> None:
        best = self.kept.setdefault(name, [])
        if len(best) < CASES or (rank, seen) < best[-1][:2]:
            item = batch.item(number)
            kind = list(item.scores())[-1]
            bisect.insort(best, (rank, seen, item, kind), key=lambda entry: entry[:2])
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
                pairs = _pairs(item, item.scores()[kind], self.right)
                found.append(Case(model, task, name, item.example.id, margin, kind, pairs))
        return found


def _margins(batch: ScoredBatch, scores: np.ndarray, count: int) -> np.ndarray:
    """The scores of the worst right answers less those of the best wrong ones [n]; of a Winoground pair, the
    lesser of both captions' margins between the images."""
    right, wrong = _pair_places(batch, count)
    with np.errstate(invalid="ignore"):  # scores that are not finite
        if batch.direction == "both":
            others = scores.copy()
            own_image, own_text = np.diag_indices(min(batch.shape))
            others[:, own_image, own_text] = -np.inf
            own = np.diagonal(scores, axis1=1, axis2=2)
            return np.asarray((own - others.max(1)).min(1))
        return np.asarray(_of_pairs(scores, right).min(1) - _of_pairs(scores, wrong).max(1))


def _pairs(item: ScoredExample, scores: np.ndarray, count: int) -> list[CasePair]:
    """The worst right pair and the best wrong one; all four of a Winoground pair."""
    right = right_pairs(item, count)
    places: Sequence[tuple[int, int]]
    if item.example.direction == "both":
        places = list(np.ndindex(scores.shape))
    else:
        worst, best = np.where(right, -scores, -np.inf), np.where(right, -np.inf, scores)
        places = [divmod(int(a.argmax()), a.shape[1]) for a in (worst, best)]
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
        self.denoising, self.curves = DenoisingStats(task.right), ErrorCurves(task.right)
        self.cases = Cases(task.right)
        self.counts = Counts(task, len(timesteps))
        self.incomplete = False

    def add(self, item: ScoredExample) -> None:
        """One example."""
        self.add_part(ScoredPart.of(item))

    def add_part(self, part: ScoredPart) -> None:
        """Some examples."""
        if not self.task.graded or self.incomplete:
            return
        self.denoising.add_part(part)
        self.curves.add_part(part)
        self.cases.add_part(part)
        if self.timesteps:
            self.counts.add_part(part)
