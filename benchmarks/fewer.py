"""Other ways than the plain grid to spend a few forwards of the U-Net on a pair, and races from other starts.

    python -m benchmarks.fewer [FOLDER] [--store OUT] [--out FILE]

Scores drawn scenes with the embedded model at 98 timesteps, at 30 of them with the opposite noise too,
in one process; FOLDER keeps the errors, and a pair that it holds is not scored again. `--store` reads
the errors of a gdbench OUT instead, which has no opposite noises. Whatever is fitted or chosen is fitted
on one half of the examples and measured on the other, both ways round, so every example measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffitm.commands.run_record import read_record
from diffitm.core.schema import Example, PairRow
from diffitm.evaluation.diagnostics import right_pairs
from diffitm.evaluation.examples import data_root, write_examples
from diffitm.metrics.figures import SECONDARY
from diffitm.metrics.intervals import NORMAL, difference_interval, mean_interval
from diffitm.models.loading import load_denoiser, resolve
from diffitm.scoring.diffusion import DiffusionScorer
from diffitm.scoring.noise_plan import NoisePlan, make_plan
from diffitm.scoring.protocols import plan_timesteps
from diffitm.scoring.racing import Racing, race, spread_order
from diffitm.store.join import ScoredExample, read_examples, read_scored
from diffitm.sweep.score_settings import half_of
from diffitm.sweep.timestep_weights import Contrasts, learn, spread
from diffitm.tasks.base import Task
from diffitm.tasks.registry import find_task

TASKS = {  # examples of each
    "coco_neg_text": 250,
    "winoground": 150,
    "clevr": 300,
    "mmvp_vlm": 80,
    "svo_obj": 80,
    "flickr30k_text": 50,
    "flickr30k": 50,
    "pets": 30,
}
SCENES, SEED = 500, 1
STEPS = list(range(10, 990, 10))
# Places of STEPS that have the opposite noise too: 25 evenly spread, and the grid of 10.
OPPOSITE = sorted({*range(0, 98, 4), *range(0, 98, 10)})
AT_ONCE = 16  # images
NUMBERS = (5, 10, 20, 49)
MEASURES = ("accuracy", "agreement")
OFFSETS = 10  # that a random one is averaged over
RANGES = list(itertools.product((0, 100, 200, 300, 400), (500, 600, 700, 800, 900, 1000)))
DOUBTS = (0.001, 0.01, 0.05, 0.2)
RACED = [(200, 800), (0, 700)]
MOST = 150  # decisions of a task that race
FEWEST = 30  # examples of a task


def plan(shape: tuple[int, int, int]) -> NoisePlan:
    """98 timesteps, each with a noise of its own, then 30 of them again with that noise's opposite."""
    base = make_plan(STEPS, shape, SEED)
    return NoisePlan(
        torch.cat([base.timesteps, base.timesteps[OPPOSITE]]),
        torch.cat([base.noise, -base.noise[OPPOSITE]]),
    )


def score(folder: Path, tasks: Sequence[str]) -> dict[str, list[ScoredExample]]:
    """The scored examples of each task; pairs that FOLDER lacks are scored first."""
    root = data_root("shapes", SCENES, str(folder))
    scorer = None
    found = {}
    for task in tasks:
        uri = write_examples([task], root, str(folder), TASKS[task])[task].uri
        examples, errors = list(read_examples(uri)), _held(folder / f"{task}.npz")
        if rows := _rows(examples, errors):
            if scorer is None:
                denoiser = load_denoiser(resolve("shapes"), "fp32", "cpu")
                scorer = DiffusionScorer(denoiser, plan(denoiser.latent_shape), root)
            start, before = time.perf_counter(), len(errors)
            errors |= _scored(scorer, rows)
            count, seconds = len(errors) - before, time.perf_counter() - start
            print(
                f"{task}: {count:,} pairs, {count * scorer.cost / seconds:.0f} forwards/s",
                flush=True,
            )
            names, values = np.array(list(errors)), np.stack(list(errors.values()))
            np.savez(folder / f"{task}.npz", names=names, errors=values)
        found[task] = [_joined(example, errors) for example in examples]
    return found


Errors = dict[tuple[str, str], np.ndarray]  # (image, text) -> errors [N]


def _held(path: Path) -> Errors:
    if not path.exists():
        return {}
    with np.load(path) as held:
        return {tuple(name): e for name, e in zip(held["names"], held["errors"], strict=True)}


def _rows(examples: Sequence[Example], errors: Errors) -> list[PairRow]:
    """Every pair that the examples need and that is not held, once."""
    asked: dict[str, dict[str, None]] = {}
    for example in examples:
        for image in example.images:
            texts = [*example.texts, *([""] if example.needs_unconditional else [])]
            lacking = [text for text in texts if (image, text) not in errors]
            asked.setdefault(image, {}).update(dict.fromkeys(lacking))
    return [PairRow(n, image, [*texts]) for n, (image, texts) in enumerate(asked.items()) if texts]


def _scored(scorer: DiffusionScorer, rows: Sequence[PairRow]) -> Errors:
    found = {}
    for start in range(0, len(rows), AT_ONCE):
        for line in scorer.score(rows[start : start + AT_ONCE]):
            if line["failure"] is not None:
                raise ValueError(f"{line['image']}: {line['failure']}")
            found[line["image"], line["text"]] = line["l2"]
    return found


def _joined(example: Example, errors: Errors) -> ScoredExample:
    """An example with the errors of its pairs."""
    conditional = np.array([[errors[i, t] for t in example.texts] for i in example.images], float)
    empty = np.zeros((0, 0, 0))
    if example.needs_unconditional:
        empty = np.array([[errors[i, ""]] * len(example.texts) for i in example.images], float)
    return ScoredExample(example, None, conditional, empty)


@dataclass(frozen=True)
class Decision:
    """Pairs of a task among which one is right; `example` is the place of its example."""

    pairs: np.ndarray
    right: int
    example: int


class Scored:
    """A task's scored examples. Errors [P, M] have an example's pairs in a row; columns are the
    `steps`, then those of them (`opposite`) that were scored with the opposite noise too."""

    def __init__(
        self, task: Task, items: Sequence[ScoredExample], steps: list[int], opposite: list[int]
    ) -> None:
        self.task, self.steps, self.opposite = task, np.array(steps), opposite
        self.items = [
            item for item in items if item.failure is None and not right_pairs(item).all()
        ]
        self.clusters = np.array([item.example.cluster for item in self.items])
        self.halves = np.array([half_of(cluster)[0] for cluster in self.clusters], bool)
        self.folds = np.array([half_of(cluster)[1] for cluster in self.clusters], int)
        sizes = [item.conditional[..., 0].size for item in self.items]
        self.ends = np.cumsum(sizes)
        self.decisions = list(self._decisions())
        self.kinds = {kind: self._errors(change) for kind, change in CHANGES.items()}
        every = self.kinds["l2"].mean(1)
        self.full = np.array([every[d.pairs].argmin() for d in self.decisions])
        self.others = np.setdiff1d(np.arange(len(steps)), opposite)

    def _errors(self, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Errors [P, M] of the main score, each changed before the unconditional ones are taken off."""
        found = []
        for item in self.items:
            errors = change(item.conditional)
            if item.example.needs_unconditional:
                errors = errors - change(item.unconditional)
            found.append(errors.reshape(-1, errors.shape[-1]))
        return np.concatenate(found)

    def _decisions(self) -> Iterator[Decision]:
        for number, (item, end) in enumerate(zip(self.items, self.ends, strict=True)):
            shape = item.conditional.shape[:2]
            pairs = np.arange(end - shape[0] * shape[1], end).reshape(shape)
            if item.example.direction == "both":
                for k in range(len(pairs)):
                    yield Decision(pairs[k], k, number)
                    yield Decision(pairs[:, k], k, number)
            else:
                yield Decision(pairs.ravel(), item.example.gold, number)

    def contrasts(self, half: bool, kind: str = "l2") -> Contrasts:
        """What the decisions of a half tell: wrong less right, by column."""
        kept = [d for d in self.decisions if self.halves[d.example] == half]
        errors = self.kinds[kind]
        blocks = [np.delete(errors[d.pairs], d.right, 0) - errors[d.pairs[d.right]] for d in kept]
        counts = np.array([len(block) for block in blocks])
        of = [d.example for d in kept]
        starts = np.cumsum(counts) - counts
        return Contrasts(np.concatenate(blocks), starts, self.folds[of], self.clusters[of])

    def credits(self, scores: np.ndarray) -> np.ndarray:
        """Each example's credit, the mean over the task's main metrics; scores [P], higher is better."""
        found = []
        for item, end in zip(self.items, self.ends, strict=True):
            shape = item.conditional.shape[:2]
            block = scores[end - shape[0] * shape[1] : end].reshape(shape)
            made = self.task.credits(item.example, block)
            found.append(np.mean([c.value for m, c in made.items() if not m.startswith(SECONDARY)]))
        return np.array(found)

    def agreements(self, scores: np.ndarray) -> np.ndarray:
        """The share of each example's decisions that fall as with all stored forwards."""
        picks = np.array([scores[d.pairs].argmax() for d in self.decisions])
        same, of = (picks == self.full).astype(float), [d.example for d in self.decisions]
        return np.bincount(of, same) / np.bincount(of)


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "l2": lambda errors: errors,
    "squared": np.square,
    "log": np.log,
}
Tables = dict[str, Scored]
# Weights [K, M] of a table's columns for each of K draws.
Fitted = Callable[[Scored], np.ndarray]


def at(table: Scored, timesteps: Sequence[float] | np.ndarray) -> np.ndarray:
    """The places of the stored timesteps next to these, each place once."""
    return np.unique([np.abs(table.steps - t).argmin() for t in timesteps])


def equal(table: Scored, places: Sequence[int] | np.ndarray) -> np.ndarray:
    """The same weight for each of these columns, [1, M]."""
    weights = np.zeros((1, len(table.steps) + len(table.opposite)))
    weights[0, places] = 1 / len(places)
    return weights


def weighted(table: Scored, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """These weights for these columns, [1, M]."""
    weights = np.zeros_like(equal(table, [0]))
    weights[0, places] = values / values.sum()
    return weights


def grid(table: Scored, number: int) -> np.ndarray:
    return at(table, plan_timesteps("diffusionitm", number))


def plain(tables: Tables, half: bool, number: int) -> Fitted:
    return lambda table: equal(table, grid(table, number))


def middles(tables: Tables, half: bool, number: int) -> Fitted:
    """Strata of the same width and their middles."""
    steps = plan_timesteps("diffusion-classifier", number)
    return lambda table: equal(table, at(table, steps))


def offset(tables: Tables, half: bool, number: int) -> Fitted:
    """Strata with one random offset that they share: a row for each."""
    width = 1000 // number

    def draws(table: Scored) -> np.ndarray:
        first = table.steps[table.steps < width + table.steps[0]]
        kept = first[spread(len(first), min(OFFSETS, len(first)))]
        rows = [equal(table, at(table, start + width * np.arange(number))) for start in kept]
        return np.concatenate(rows)

    return draws


def antithetic(tables: Tables, half: bool, number: int) -> Fitted:
    """Half the timesteps, each with a noise and its opposite; for 5 and 49 one forward more."""
    steps = plan_timesteps("diffusionitm", (number + 1) // 2)
    return lambda table: both(table, steps)


def antithetic_middles(tables: Tables, half: bool, number: int) -> Fitted:
    """The same at the middles of strata."""
    steps = plan_timesteps("diffusion-classifier", (number + 1) // 2)
    return lambda table: both(table, steps)


def antithetic_range(tables: Tables, half: bool, number: int) -> Fitted:
    """The same at the middles of a range's strata; the other half chose the range."""
    (low, high), count = best_range(tables, half, number), (number + 1) // 2
    steps = low + (np.arange(count) + 0.5) * (high - low) / count
    return lambda table: both(table, steps)


def both(table: Scored, steps: Sequence[float] | np.ndarray) -> np.ndarray:
    """Next to these timesteps, both noises, [1, M]."""
    found = table.steps[table.opposite]
    chosen = np.unique([np.abs(found - t).argmin() for t in steps])
    return equal(table, [*np.array(table.opposite)[chosen], *(len(table.steps) + chosen)])


def learned(tables: Tables, half: bool, number: int) -> Fitted:
    """The most useful timesteps with learned weights, shared by all tasks."""
    steps = next(iter(tables.values())).steps
    return _learned(tables, half, number, np.arange(len(steps)))


def learned_grid(tables: Tables, half: bool, number: int) -> Fitted:
    """The grid with learned weights, shared by all tasks."""
    return _learned(tables, half, number, grid(next(iter(tables.values())), number))


def _learned(tables: Tables, half: bool, number: int, places: np.ndarray) -> Fitted:
    chosen, weights = learn([t.contrasts(half) for t in tables.values()], places, number)
    return lambda table: weighted(table, chosen.astype(int), weights)


def spreads(table: Scored, half: bool) -> np.ndarray:
    """Of a task's differences between right and wrong at each of the timesteps."""
    return table.contrasts(half).values[:, : len(table.steps)].std(0)


def relative(tables: Tables, half: bool, number: int) -> Fitted:
    """The grid, each difference relative to its timestep's spread over the task."""

    def scaled(table: Scored) -> np.ndarray:
        places = grid(table, number)
        return weighted(table, places, 1 / spreads(table, half)[places])

    return scaled


def informed(tables: Tables, half: bool, number: int) -> Fitted:
    """The grid, weighted by mean over variance of all tasks' differences (Fisher's, diagonal)."""
    places = grid(next(iter(tables.values())), number)
    scaled = [(v := t.contrasts(half).values[:, places]) / v.std() for t in tables.values()]
    means, variances = (np.mean([f(v, 0) for v in scaled], 0) for f in (np.mean, np.var))
    return lambda table: weighted(table, places, np.maximum(means / variances, 0))


def best_range(tables: Tables, half: bool, number: int) -> tuple[int, int]:
    """The range whose evenly spread timesteps decide best on a half, over all tasks; the widest of several
    equal ones."""

    def accuracy(bounds: tuple[int, int]) -> float:
        found = []
        for table in tables.values():
            scores = -(table.kinds["l2"] @ within(table, bounds, number)[0])
            found.append(table.credits(scores)[table.halves == half].mean())
        return float(np.mean(found))

    return max(RANGES, key=lambda bounds: (round(accuracy(bounds), 9), bounds[1] - bounds[0]))


def within(table: Scored, bounds: tuple[int, int], number: int) -> np.ndarray:
    """Evenly spread timesteps of a range, weights [1, M]."""
    inside = np.flatnonzero((table.steps >= bounds[0]) & (table.steps < bounds[1]))
    return equal(table, inside[spread(len(inside), min(number, len(inside)))])


def ranged(tables: Tables, half: bool, number: int) -> Fitted:
    """A range that the tasks' other half chose."""
    bounds = best_range(tables, half, number)
    return lambda table: within(table, bounds, number)


def fixed(bounds: tuple[int, int]) -> Callable[[Tables, bool, int], Fitted]:
    """A range that nothing here chose."""
    return lambda tables, half, number: lambda table: within(table, bounds, number)


@dataclass(frozen=True)
class Way:
    """How a half of the tables' examples is made into weights for the other, of which kind of error; or,
    `elsewhere`, for the other half of a task that fitted nothing."""

    fit: Callable[[Tables, bool, int], Fitted]
    kind: str = "l2"
    elsewhere: bool = False


WAYS = {
    "grid": Way(plain),
    "middles of strata": Way(middles),
    "random offset": Way(offset),
    "antithetic": Way(antithetic),
    "antithetic, middles": Way(antithetic_middles),
    "antithetic, range": Way(antithetic_range),
    "200 to 800": Way(fixed((200, 800))),
    "0 to 700": Way(fixed((0, 700))),
    "squared errors": Way(plain, "squared"),
    "log errors": Way(plain, "log"),
    "relative to spread": Way(relative),
    "mean over variance": Way(informed),
    "learned weights": Way(learned_grid),
    "learned": Way(learned),
    "learned elsewhere": Way(learned, elsewhere=True),
    "range": Way(ranged),
    "range elsewhere": Way(ranged, elsewhere=True),
}


def measured(tables: Tables, way: Way, number: int) -> dict[str, list[np.ndarray]]:
    """Each task's credits and agreements by example, and the correlation of the candidates' differences
    with those over the stored timesteps that have no opposite noise, [1]; each with what the other
    half chose."""
    found = {name: [np.zeros(len(t.items)) for _ in range(2)] for name, t in tables.items()}
    alike: dict[str, list[float]] = {name: [] for name in tables}
    for half in (False, True):
        shared = None if way.elsewhere else way.fit(tables, half, number)
        for name, table in tables.items():
            others = {other: t for other, t in tables.items() if other != name}
            fitted = (shared or way.fit(others, half, number))(table)
            draws = [-(table.kinds[way.kind] @ weights) for weights in fitted]
            mask = table.halves != half
            for values, judge in zip(found[name], (table.credits, table.agreements), strict=True):
                values[mask] = np.mean([judge(scores) for scores in draws], 0)[mask]
            these = table.contrasts(not half, way.kind).values @ fitted.T
            full = table.contrasts(not half).values[:, table.others].mean(1)
            alike[name] += [np.corrcoef(one, full)[0, 1] for one in these.T]
    return {name: [*found[name], np.array([np.mean(alike[name])])] for name in tables}


def compare(tables: Tables) -> list[dict[str, Any]]:
    """A row for each way, number and task: the three measures, and of the first two the difference to the
    grid with its 95% interval and its standard error."""
    rows = []
    for number in NUMBERS:
        base = measured(tables, WAYS["grid"], number)
        for way, rule in WAYS.items():
            if way.startswith("antithetic") and not all(t.opposite for t in tables.values()):
                continue
            if rule.elsewhere and len(tables) == 1:
                continue
            for task, values in measured(tables, rule, number).items():
                row: dict[str, Any] = {"way": way, "number": number, "task": task}
                row["correlation"] = float(values[2][0])
                for name, one, other in zip(MEASURES, values, base[task], strict=False):
                    clusters = tables[task].clusters
                    low, high = mean_interval(one - other, clusters)
                    row[name] = float(one.mean())
                    row[f"{name}_change"] = float((one - other).mean())
                    row[f"{name}_interval"] = difference_interval(one, other, clusters)
                    row[f"{name}_error"] = (high - low) / 2 / NORMAL
                rows.append(row)
    return rows


def print_ways(rows: Sequence[dict[str, Any]], tables: Tables) -> None:
    """Means over tasks, and how many tasks are above and below the grid beyond their interval."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    head = "| way | " + " | ".join(map(str, NUMBERS)) + " |\n|---" + "|---" * len(NUMBERS) + "|"
    for name in MEASURES:
        print(f"\n{name}: the grid's, %, and changes, points, mean of {len(tables)} tasks with 95%")
        print(f"interval (tasks above, below the grid beyond their own)\n\n{head}")
        for way in ways:
            cells = [
                _cell([r for r in rows if (r["way"], r["number"]) == (way, n)], name)
                for n in NUMBERS
            ]
            print(f"| {way} | " + " | ".join(cells) + " |")
    print(f"\ncorrelation with the mean over many timesteps, mean of tasks\n\n{head}")
    for way in ways:
        cells = []
        for number in NUMBERS:
            kept = [r["correlation"] for r in rows if (r["way"], r["number"]) == (way, number)]
            cells.append(f"{np.mean(kept):.3f}")
        print(f"| {way} | " + " | ".join(cells) + " |")
    for number, name in itertools.product(NUMBERS, MEASURES):
        print(f"\n{number} forwards: {name} of the grid, and change; * beyond the 95% interval\n")
        print("| way | " + " | ".join(tables) + " |\n|---" + "|---" * len(tables) + "|")
        for way in ways:
            cells = []
            for row in (r for r in rows if (r["way"], r["number"]) == (way, number)):
                low, high = row[f"{name}_interval"]
                mark = "*" if low > 0 or high < 0 else ""
                change = f"{100 * row[f'{name}_change']:+.1f}{mark}"
                cells.append(f"{100 * row[name]:.1f}" if way == "grid" else change)
            print(f"| {way} | " + " | ".join(cells) + " |")


def _cell(rows: Sequence[dict[str, Any]], name: str) -> str:
    if rows[0]["way"] == "grid":
        return f"{100 * np.mean([r[name] for r in rows]):.1f}"
    change = np.mean([r[f"{name}_change"] for r in rows])
    error = np.sqrt(sum(r[f"{name}_error"] ** 2 for r in rows)) / len(rows)
    above = sum(r[f"{name}_interval"][0] > 0 for r in rows)
    below = sum(r[f"{name}_interval"][1] < 0 for r in rows)
    return f"{100 * change:+.1f} ± {100 * NORMAL * error:.1f} ({above}, {below})"


def likeness(tables: Tables) -> dict[str, list[float]]:
    """How alike two measurements of a difference between candidates are at one place: with a noise and its
    opposite, and with the noises of two neighbouring timesteps. Correlation over decisions of what is
    left when the mean over the timesteps nearby (5 places to both sides, without these two) is off."""
    found = {}
    for name, table in tables.items():
        values = np.concatenate([table.contrasts(half).values for half in (False, True)])
        count, pairs = len(table.steps), {"opposite": [], "neighbour": []}
        for column, place in enumerate(table.opposite):
            near = [p for p in range(place - 5, place + 7) if 0 <= p < count - 1]
            near = [p for p in near if p not in (place, place + 1)]
            if place + 1 >= count:
                continue
            mean = values[:, near].mean(1)
            this, other, next_ = (values[:, c] - mean for c in (place, count + column, place + 1))
            pairs["opposite"].append(np.corrcoef(this, other)[0, 1])
            pairs["neighbour"].append(np.corrcoef(this, next_)[0, 1])
        found[name] = [float(np.mean(values)) for values in pairs.values()]
    return found


def order_to(order: Sequence[int]) -> np.ndarray:
    """Columns such that a race, which takes them in van der Corput's order, takes them in this one."""
    found = np.zeros(len(order), int)
    found[spread_order(len(order))] = order
    return found


class Start(NamedTuple):
    """A way to race: errors [P, N] as a race takes them, forwards a column, columns of the first look."""

    errors: np.ndarray
    cost: int = 1
    first: int = 5


def starts(table: Scored, half: bool, chosen: tuple[int, int]) -> dict[str, Start]:
    """Ways to race; the range and the spreads are those of a half."""
    steps = table.steps
    errors = table.kinds["l2"][:, : len(steps)]
    found = {
        "all": Start(errors),
        "relative to spread": Start(errors / spreads(table, half)),
    }
    for name, (low, high) in {
        "chosen": chosen,
        **{f"{a} to {b}": (a, b) for a, b in RACED},
    }.items():
        inside = np.flatnonzero((steps >= low) & (steps < high))
        rest = np.setdiff1d(np.arange(len(steps)), inside)
        order = [part[k] for part in (inside, rest) if len(part) for k in spread_order(len(part))]
        found[f"{name} first"] = Start(errors[:, order_to(order)])
        found[f"{name} only"] = Start(errors[:, inside])
    if table.opposite:
        count = len(table.opposite)
        pairs = (errors[:, table.opposite] + table.kinds["l2"][:, len(steps) :]) / 2
        found[f"{2 * count} of all"] = Start(errors[:, spread(len(steps), 2 * count)])
        found[f"{count} with opposites"] = Start(pairs, 2, 3)
    return found


def races(tables: Tables) -> list[dict[str, Any]]:
    """Forwards a candidate, the share that is saved beside a race over all timesteps with its 95% interval,
    agreement with the mean over all timesteps, and accuracy, by start and doubt, as means over tasks."""
    chosen = {half: best_range(tables, half, 20) for half in (False, True)}
    found: dict[tuple[str, float], dict[str, list[float]]] = {}
    for name, table in tables.items():
        made = {half: starts(table, half, chosen[half]) for half in (False, True)}
        kept = spread(len(table.decisions), min(MOST, len(table.decisions)))
        raced = [table.decisions[number] for number in kept]
        clusters = table.clusters[[decision.example for decision in raced]]
        means = table.kinds["l2"][:, : len(table.steps)].mean(1)
        for doubt in DOUBTS:
            base = np.zeros(len(raced))
            for way in made[True]:
                lines = []
                for decision in raced:
                    start = made[not table.halves[decision.example]][way]
                    winners, spent = race(start.errors[decision.pairs], Racing(doubt, start.first))
                    same = winners[0] == means[decision.pairs].argmin()
                    right = winners[0] == decision.right
                    lines.append((spent.mean() * start.cost, same, right))
                spent, same, right = np.array(lines, float).T
                base = spent if way == "all" else base
                saved = 1 - spent / base.mean()
                low, high = mean_interval((base - spent) / base.mean(), clusters)
                error = (high - low) / 2 / NORMAL
                line = [float(values.mean()) for values in (spent, same, right, saved)]
                found.setdefault((way, doubt), {})[name] = [*line, error]
    print(f"\nranges: {chosen[True]}, {chosen[False]}\n")
    print(
        "| race | doubt | forwards a candidate | saved, % | agreement | accuracy |\n"
        + "|---" * 6
        + "|"
    )
    rows = []
    for (way, doubt), by_task in sorted(found.items(), key=lambda item: item[0][1]):
        values = np.array(list(by_task.values()))
        spent, same, right, saved = values[:, :4].mean(0).tolist()
        half = NORMAL * float(np.sqrt((values[:, 4] ** 2).sum())) / len(values)
        cells = f"{spent:.1f} | {100 * saved:+.0f} ± {100 * half:.0f}"
        print(f"| {way} | {doubt} | {cells} | {100 * same:.1f} | {100 * right:.1f} |")
        mean = {"forwards": spent, "saved": saved, "error": half, "agreement": same}
        rows.append({"way": way, "doubt": doubt, **mean, "accuracy": right, "tasks": by_task})
    return rows


def stored(out: str) -> Tables:
    """The tasks of a gdbench OUT, as far as they are scored."""
    record, found = read_record(out), {}
    (store,) = record.stores
    steps = store.config["timesteps"]
    for name, uri in record.examples.items():
        task = find_task(name)()
        items = [item for item in read_scored(uri, store, "l2") if item.failure is None]
        if task.graded and len(items) >= FEWEST:
            found[name] = Scored(task, items, steps, [])
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/fewer"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--store", help="OUT of a gdbench run with one diffusion model")
    parser.add_argument("--out", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.store:
        tables = stored(args.store)
    else:
        args.folder.mkdir(parents=True, exist_ok=True)
        scored = score(args.folder, args.tasks)
        tables = {n: Scored(find_task(n)(), found, STEPS, OPPOSITE) for n, found in scored.items()}
    for name, table in tables.items():
        print(f"{name}: {len(table.items)} examples, {len(table.decisions)} decisions")
    rows = compare(tables)
    print_ways(rows, tables)
    figures: dict[str, Any] = {"ways": rows}
    if not args.store:
        figures["likeness"] = likeness(tables)
        print("\ncorrelation with the opposite noise, with the next timestep's noise")
        for name, (opposite, neighbour) in figures["likeness"].items():
            print(f"{name}: {opposite:.2f}, {neighbour:.2f}")
    figures["races"] = races(tables)
    if args.out:
        Path(args.out).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
