"""Results from the score stores alone: figures of every task and model, paired tests, failures."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from diffitm.core import storage
from diffitm.core.images import holder
from diffitm.core.schema import Contest, Example
from diffitm.evaluation.cut_texts import CutTexts
from diffitm.evaluation.diagnostics import (
    Case,
    Count,
    Curve,
    Denoising,
    DenoisingStats,
    Diagnostics,
)
from diffitm.evaluation.races import RaceFigure, RaceOptions, RaceStats, describe, pair_values
from diffitm.metrics.columns import Columns
from diffitm.metrics.credit import LOST, Credit, Credits
from diffitm.metrics.figures import Decision, Decisions, Figure, Groups, Labels
from diffitm.metrics.intervals import difference_interval, paired_p, paired_test
from diffitm.metrics.score import other_dtype
from diffitm.models.distilled import why_no_unconditional
from diffitm.scoring.protocols import error_of_protocol
from diffitm.scoring.racing import hold
from diffitm.store.join import ScoredExample, ScoredPart, read_items, read_labels, read_parts
from diffitm.store.pair_table import connect, examples_dataset
from diffitm.store.score_store import Store
from diffitm.store.stored_lines import UNSCORED, LinesByTask
from diffitm.store.work_table import finished
from diffitm.tasks.base import Task
from diffitm.tasks.registry import find_task

# What tells two stores of one model apart, in the words of a table.
SETTINGS = (
    "protocol",
    "dtype",
    "resize",
    "seed",
    "latent_seed",
    "empty",
    "resolution",
    "variant",
    "root",
)
UNSAID = {
    "empty": "text",
    "resolution": "its own",
}  # what a setting is where a store does not say it

# What errors must share to be compared.
MEASURED = (
    "weights",
    "protocol",
    "timesteps",
    "seed",
    "resize",
    "latent_seed",
    "empty",
    "resolution",
    "root",
)


@dataclass(frozen=True)
class ResultRow(Figure):
    """One line of results.json: a figure of a model on a task. `score` is conditional, normalised or
    the kind of a single score (CLIP's is cosine), or 'probe' of what is no image-text pair. `failures`
    have no score and do not count, or one that is not finite and count as lost; where nothing could be
    scored, `value`, `low` and `high` are null. `racing` are the rules of the races that decided it."""

    model: str = ""
    task: str = ""
    score: str = ""
    protocol: str = ""
    timesteps: int = 0
    racing: str | None = None


@dataclass(frozen=True)
class Comparison:
    """First less second on the same examples, with the 95% interval and the two-sided p of `test`."""

    task: str
    metric: str
    first: str
    first_score: str
    second: str
    second_score: str
    difference: float
    low: float
    high: float
    p: float
    test: str
    n: int


@dataclass(frozen=True)
class Speed:
    """What scoring cost: seconds of one actor, loading the model not counted."""

    model: str
    pairs: int
    forwards: int
    seconds: float
    seconds_per_pair: float


@dataclass
class Evaluation:
    """All results of a run."""

    rows: list[ResultRow] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    denoising: list[Denoising] = field(default_factory=list)
    speeds: list[Speed] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    races: list[RaceFigure] = field(default_factory=list)
    cut_texts: list[CutTexts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # of models, on all of their figures
    # By model: what its store depends on, with the kind of `error` that is averaged and whether its timesteps
    # are `weighted`.
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """A model's credits under one kind of score, NaN where an example has none: metric -> [n]."""

    model: str
    score: str
    credits: dict[str, np.ndarray]
    clusters: np.ndarray


def evaluate(
    examples: dict[str, str],
    stores: list[Store],
    error: str = "auto",
    weights: np.ndarray | None = None,
    racing: RaceOptions | None = None,
) -> Evaluation:
    """Results of every task (name -> examples file) for every store, from the stores alone.

    `error` is the kind of error that is averaged: l2, mse, l1 or huber; 'auto' is the protocol's
    own (noise_plan.error_of_protocol). `weights` [N] are those of the timesteps, where a store has N of
    them. With `racing` the contests of examples are raced over the stored errors: what comes out does not
    depend on what else is stored.
    """
    evaluation = Evaluation()
    names = titles(stores)
    evaluation.notes = [
        f"{name} {why}: its normalised scores are less the error of no text anyway."
        for name, store in zip(names, stores, strict=True)
        if store.similarity is None and (why := why_no_unconditional(store.model, store.config))
    ]
    evaluation.settings = {
        name: store.config
        | {"error": error_of(store, error), "weighted": _are_of(weights, store) is not None}
        for name, store in zip(names, stores, strict=True)
    }
    connection, read = connect(), dict[int, LinesByTask]()
    for name, uri in examples.items():
        task: Task = find_task(name)()
        columns: list[Column] = []
        labels = read_labels(uri)
        first: dict[str, DenoisingStats] = {}  # by how errors were measured
        for number, (store, title) in enumerate(zip(stores, names, strict=True)):
            kind = error_of(store, error)
            part = Part(task, store, title, weights, (racing, kind) if racing else None)
            if number not in read:
                read[number] = LinesByTask(store, kind, connection)
            lines = read[number].of(uri)
            if part.races:
                for item in read_items(uri, lines, partial=True):
                    part.add(item)
            else:
                for some in read_parts(uri, lines, labels[0].codes):
                    part.add_part(some)
            part.finish(*labels)
            part.put_into(evaluation)
            columns += part.columns()
            denoising, whole = part.diagnostics.denoising, part.diagnostics is part.every
            measured = str([whole, *(store.config.get(key) for key in MEASURED)])
            if (line := denoising.read(title, name, first.get(measured))) is not None:
                evaluation.denoising.append(line)
                first.setdefault(measured, denoising)
        if task.graded:
            evaluation.comparisons += _comparisons(task, columns)
    return evaluation


def error_of(store: Store, error: str) -> str:
    """The kind of error that is averaged: `error`, or for 'auto' the protocol's own."""
    if error != "auto":
        return error
    return error_of_protocol(store.config.get("protocol", "diffusionitm"))


def _are_of(weights: np.ndarray | None, store: Store) -> np.ndarray | None:
    """The weights of timesteps, where a store has as many."""
    fits = weights is not None and len(weights) == len(store.config.get("timesteps", []))
    return weights if fits else None


def titles(stores: Sequence[Store]) -> list[str]:
    """A name for every store: the model's, with the settings that tell two of one model apart."""
    same = Counter(store.model for store in stores)
    found = []
    for store in stores:
        others = [s.config for s in stores if s.model == store.model]
        told = []
        if same[store.model] > 1:
            if len({len(c.get("timesteps", [])) for c in others}) > 1:
                told.append(f"{len(store.config['timesteps'])} timesteps")
            differ = [k for k in SETTINGS if len({str(c.get(k)) for c in others}) > 1]
            told += [f"{k} {store.config.get(k, UNSAID.get(k))}" for k in differ]
        found.append(", ".join([store.model, *told]))
    return found


class Part:
    """The part of an evaluation that is of one task and one store, added up example by example.

    `racing` are the rules of races and the kind of error that decides them.
    """

    def __init__(
        self,
        task: Task,
        store: Store,
        title: str,
        weights: np.ndarray | None,
        racing: tuple[RaceOptions, str] | None = None,
    ) -> None:
        self.task, self.store, self.title = task, store, title
        self.timesteps: list[int] = store.config.get("timesteps", [])
        self.weights = _are_of(weights, store)
        self.kinds = [store.similarity] if store.similarity else ["conditional", "normalised"]
        self.decisions: dict[str, Decisions] = {}
        self._raced: dict[str, list[Decision]] = {kind: [] for kind in self.kinds}
        self._n = 0
        self._chance: Columns[str] = Columns()
        self._failed: Columns[str] = Columns(False)  # by ''
        self._scored: Columns[str] = Columns(False)  # by kind of score
        # By kind of score and metric.
        self._values: Columns[tuple[str, str]] = Columns()
        self._tied: Columns[tuple[str, str]] = Columns(False)
        self._finite: Columns[tuple[str, str]] = Columns(False)
        self.failures: list[dict[str, str]] = []
        self.every = Diagnostics(task, self.timesteps)
        self.races: RaceStats | None = None
        if racing and (plan := racing[0].plan(store, racing[1], self.weights)):
            self.races = RaceStats(plan, racing[0], Diagnostics(task, self.timesteps))

    def add_part(self, part: ScoredPart) -> None:
        """Count examples under every kind of score that they have."""
        reasons = {
            place: (part.failures[place], e)
            for place, e in zip(part.failures, part.lost, strict=True)
        }
        for example, place in zip(part.lost, part.failures, strict=True):
            for metric, chance in self.task.chance(example).items():
                self._chance.put(metric, np.array([self._n + place]), np.array([chance]))
        for batch in part.batches:
            places = self._n + batch.places
            for metric, chances in self.task.chance_each(batch.examples).items():
                self._chance.put(metric, places, chances)
            finite = np.ones(len(batch), bool)
            for kind, scores in batch.scores(self.weights).items():
                finite &= np.isfinite(scores).all((1, 2))
                self._scored.put(kind, places, np.ones(len(batch), bool))
                found = self.task.credits_each(batch.examples, batch.golds, scores)
                for metric, credits in found.items():
                    self._values.put((kind, metric), places, credits.values)
                    self._tied.put((kind, metric), places, credits.tied)
                    self._finite.put((kind, metric), places, credits.finite)
            for number in np.flatnonzero(~finite):
                example = batch.examples[int(number)]
                reasons[int(batch.places[number])] = self._not_finite, example
        for place in sorted(reasons):
            self._fail(*reasons[place])
        self._failed.put(
            "", self._n + np.sort(np.array(list(reasons), int)), np.ones(len(reasons), bool)
        )
        self._n += part.size
        self.every.add_part(part)

    def finish(self, clusters: Labels, groups: Groups) -> None:
        """Make the decisions, when every example is counted."""
        if self.races:
            self.decisions = {kind: Decisions.of(found) for kind, found in self._raced.items()}
            return
        n, nothing = self._n, np.zeros(self._n, bool)
        chance, failed = self._chance.read(n), self._failed.read(n).get("", nothing)
        scored, values = self._scored.read(n), self._values.read(n)
        tied, finite = self._tied.read(n), self._finite.read(n)
        for kind in self.kinds:
            credits = {
                metric: Credits(found, tied[of, metric], finite[of, metric])
                for (of, metric), found in values.items()
                if of == kind
            }
            has = scored.get(kind, nothing)
            self.decisions[kind] = Decisions(clusters, groups, chance, credits, has, failed)

    def add(self, item: ScoredExample) -> None:
        """Count one example; where candidates race, one by one."""
        contests = self.task.contests(item.example) if self.races else []
        if self.races and contests and item.example.failure is None:
            self._add_raced(self.races, item, contests)
            return
        if self.races and item.failure is None and not item.is_complete:
            item = replace(item, failure=UNSCORED)
        scores, reason = item.scores(self.weights), item.failure
        if not all(np.isfinite(values).all() for values in scores.values()):
            reason = self._not_finite
        example = item.example
        credits = {kind: self.task.credits(example, scores[kind]) for kind in scores}
        self._count(example, reason, credits)
        self.every.add(item)
        if self.races and self.races.sample:
            self.races.sample.add(item)

    def _add_raced(self, races: RaceStats, item: ScoredExample, contests: list[Contest]) -> None:
        """An example by the outcome of its races, whatever else is known of it."""
        example, reason, errors = item.example, item.failure, pair_values(item)
        runs = hold(contests, errors, races.plan)
        if reason is None and not all(run.decided for run in runs):
            reason = UNSCORED
        audited = races.options.is_audited(self.task.name, example)
        credits = None
        if reason is None:
            credits = dict.fromkeys(self.task.chance(example), LOST)
            if all(run.finite for run in runs):
                standings = [run.race.standing() for run in runs]
                credits = self.task.raced_credits(example, standings)
                races.add(item, runs, errors, audited and item.is_complete)
            else:
                reason = self._not_finite
        kind = "normalised" if example.needs_unconditional else "conditional"
        self._count(example, reason, {} if credits is None else {kind: credits})
        if reason is None and not item.is_complete:
            self.every.incomplete, reason = True, UNSCORED
        item = replace(item, failure=reason)
        self.every.add(item)
        if audited and races.sample:
            races.sample.add(item)

    @property
    def _not_finite(self) -> str:
        return f"a score is not finite{other_dtype(self.store.config.get('dtype'))}"

    def _count(
        self, example: Example, reason: str | None, credits: dict[str, dict[str, Credit]]
    ) -> None:
        if reason is not None:
            self._fail(reason, example)
        chance, failed = self.task.chance(example), reason is not None
        for kind in self.kinds:
            found = credits.get(kind)
            decision = Decision(example.cluster, example.groups, chance, found, failed)
            self._raced[kind].append(decision)

    def _fail(self, reason: str, example: Example) -> None:
        line = {"model": self.title, "task": self.task.name, "example": example.id}
        self.failures.append({**line, "failure": reason})

    @property
    def diagnostics(self) -> Diagnostics:
        """Of every example or, where races left errors out, of the audited ones: the others that are
        complete are the closest."""
        sample = self.races and self.races.sample
        return sample if sample and self.every.incomplete else self.every

    def _drop_what_is_nowhere_finite(self) -> bool:
        """A model without one score that is finite has no accuracy of 0: nothing could be scored. Whether it
        has none."""
        credits = [c for decisions in self.decisions.values() for c in decisions.credits.values()]
        found = [c.finite[~np.isnan(c.values)] for c in credits]
        if any(map(len, found)) and not any(finite.any() for finite in found):
            for decisions in self.decisions.values():
                decisions.scored = np.zeros(len(decisions), bool)
            return True
        return False

    @property
    def shown(self) -> list[str]:
        """Kinds of score that any example has."""
        return [kind for kind in self.kinds if self.decisions[kind].scored.any()]

    def put_into(self, evaluation: Evaluation) -> None:
        """Add the rows, curves, counts, cases and failures."""
        task = self.task.name
        is_empty = self._drop_what_is_nowhere_finite()
        for kind in self.shown or self.kinds[:1]:
            if len(self.decisions[kind]):
                evaluation.rows += self._rows(kind)
        evaluation.failures += self.failures
        shown = self.diagnostics
        evaluation.curves += shown.curves.read(self.title, task, self.timesteps)
        if not is_empty:
            evaluation.counts += shown.counts.read(self.title)
        evaluation.cases += shown.cases.read(self.title, task)
        if self.races and (figure := self.races.read(self.title, task)):
            evaluation.races.append(figure)

    def _rows(self, kind: str) -> list[ResultRow]:
        raced = describe(self.races.plan.rules) if self.races and self.races.contests else None
        return [
            ResultRow(
                **vars(figure),
                model=self.title,
                task=self.task.name,
                score=kind,
                protocol=self.store.config.get("protocol") or str(self.store.similarity),
                timesteps=len(self.timesteps),
                racing=raced,
            )
            for figure in self.task.figures(self.decisions[kind])
        ]

    def columns(self) -> list[Column]:
        """What a comparison with other stores needs."""
        return [_column(self.title, kind, self.decisions[kind]) for kind in self.shown]


def _column(model: str, score: str, decisions: Decisions) -> Column:
    credits = {
        metric: np.where(decisions.scored, found.values, np.nan)
        for metric, found in decisions.credits.items()
    }
    return Column(model, score, credits, decisions.clusters.codes)


def _comparisons(task: Task, columns: list[Column]) -> list[Comparison]:
    """Every two models under their main score, normalised against naive of each model, and every two
    models under the naive one where it decides otherwise."""
    main = {column.model: column for column in columns}  # the last of a model: normalised, if any
    pairs = list(itertools.combinations(main.values(), 2))
    naive = [column for column in columns if main[column.model] is not column]
    pairs += [(main[column.model], column) for column in naive]
    pairs += [p for p in itertools.combinations(naive, 2) if p[0].score == p[1].score]
    return [
        made
        for first, second in pairs
        for metric in first.credits
        if metric in second.credits and not _told(metric, first, second, main)
        if (made := _compare(task, metric, first, second))
    ]


def _told(metric: str, first: Column, second: Column, main: dict[str, Column]) -> bool:
    """Whether a comparison says nothing new: where texts of one image are compared, normalised and
    naive decide alike, within a model and between two."""
    if first.model == second.model:
        return np.array_equal(first.credits[metric], second.credits[metric], equal_nan=True)
    return all(
        column is not main[column.model]
        and metric in main[column.model].credits  # a task of one's own may have others by kind
        and np.array_equal(
            column.credits[metric], main[column.model].credits[metric], equal_nan=True
        )
        for column in (first, second)
    )


def _compare(task: Task, metric: str, first: Column, second: Column) -> Comparison | None:
    one, two = first.credits[metric], second.credits[metric]
    both = np.isfinite(one) & np.isfinite(two)
    if not both.any():
        return None
    one, two, clusters = one[both], two[both], first.clusters[both]
    low, high = difference_interval(one, two, clusters)
    return Comparison(
        task=task.name,
        metric=metric,
        first=first.model,
        first_score=first.score,
        second=second.model,
        second_score=second.score,
        difference=float((one - two).mean()),
        low=low,
        high=high,
        p=paired_p(one, two, clusters),
        test=paired_test(one, two, clusters),
        n=int(both.sum()),
    )


def speeds(out: str, stores: Sequence[Store]) -> list[Speed]:
    """Seconds a pair of every store, from the notes that finished work tables left."""
    found = []
    for store, title in zip(stores, titles(stores), strict=True):
        done = finished(out, store)
        pairs, forwards, busy = (
            sum(note.get(key, 0) for note in done) for key in ("pairs", "forwards", "busy")
        )
        if pairs:
            found.append(Speed(title, pairs, forwards, busy, busy / pairs))
    return found


def write_results(evaluation: Evaluation, provenance: dict[str, Any], out: str) -> str:
    """results.json, provenance.json and failures.json below `out`; the path of the first."""
    kinds = (
        "rows",
        "comparisons",
        "counts",
        "curves",
        "denoising",
        "speeds",
        "cases",
        "races",
        "cut_texts",
    )
    found = {kind: [asdict(line) for line in getattr(evaluation, kind)] for kind in kinds}
    path = storage.join(out, "results.json")
    storage.write_text(storage.join(out, "provenance.json"), json.dumps(provenance, indent=2))
    failures = {"failures": evaluation.failures}
    storage.write_text(storage.join(out, "failures.json"), json.dumps(failures, indent=2))
    storage.write_text(path, json.dumps(found, indent=2, allow_nan=False))
    return path


def present(root: str, uri: str) -> str | None:
    """None if any of the task's images is there, else the first path that is not."""
    first, listed = None, dict[str, set[str]]()
    for batch in examples_dataset([uri]).to_batches(columns=["images"]):
        for image in batch["images"].flatten().to_pylist():
            path = holder(image)
            folder, _, name = path.rpartition("/")
            if folder not in listed:  # a request a folder, not one an image
                where = storage.join(root, folder) if folder else root
                listed[folder] = {found.rsplit("/", 1)[-1] for found in storage.files(where)}
            if name in listed[folder]:
                return None
            first = first or storage.join(root, path)
    return first
