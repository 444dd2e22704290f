"""The score store joined back to the examples: credits, results with intervals, failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds

from diffitm import registry, storage
from diffitm.matching.scores import averaged, conditional_score, normalised_score
from diffitm.metrics.credit import Credit
from diffitm.metrics.intervals import interval, paired_p
from diffitm.pairs import examples_dataset, scored_pairs
from diffitm.schema import Example
from diffitm.store import Store
from diffitm.tasks.base import Task


@dataclass(frozen=True)
class Row:
    """One line of results.json. `score` is conditional, normalised or cosine; `low` and `high` bound
    the 95% interval; `n` examples count. `failures` have no score and do not count, or one that is
    not finite and count as lost; where nothing could be scored, `value`, `low` and `high` are null."""

    model: str
    task: str
    group: str
    metric: str
    score: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    chance: float
    ties: int
    failures: int
    protocol: str
    timesteps: int


@dataclass(frozen=True)
class Comparison:
    """Normalised against conditional (naive) score on the same examples; p is two-sided."""

    model: str
    task: str
    metric: str
    difference: float
    p: float
    n: int


@dataclass(frozen=True)
class Outcome:
    """What became of one example: credits by kind of score and metric, none if it has no score."""

    cluster: str
    groups: dict[str, str]
    chance: dict[str, float]
    credits: dict[str, dict[str, Credit]]
    failed: bool


@dataclass
class Evaluation:
    """All results of a run, and the failures one by one."""

    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)


def evaluate(examples: dict[str, str], stores: list[Store], error: str = "auto") -> Evaluation:
    """Results of every task (name -> examples file) for every store, from the stores alone.

    `error` is the kind of error that is averaged: l2, mse, l1 or huber; 'auto' is the protocol's
    own, the l2 norm for diffusionitm and the mean squared error for the others.
    """
    out = Evaluation()
    for store in stores:
        for name, uri in examples.items():
            task: Task = registry.find(registry.TASKS, name, "task")()
            outcomes, failed = _outcomes(task, uri, store, _kind_of_error(error, store))
            out.failures += [{"model": store.model, "task": name, **line} for line in failed]
            kinds = list(dict.fromkeys(kind for o in outcomes for kind in o.credits))
            for kind in kinds or ["cosine" if store.is_clip else "conditional"]:
                out.rows += _rows(outcomes, kind, store, name)
            if "normalised" in kinds:
                out.comparisons += _compare(outcomes, store, name)
    return out


def _kind_of_error(error: str, store: Store) -> str:
    if error != "auto":
        return error
    return "l2" if store.config.get("protocol", "diffusionitm") == "diffusionitm" else "mse"


def _outcomes(
    task: Task, uri: str, store: Store, error: str
) -> tuple[list[Outcome], list[dict[str, str]]]:
    """The outcome of every example, and the failures with their reasons."""
    outcomes: list[Outcome] = []
    failed: list[dict[str, str]] = []
    pairs = _PairReader(scored_pairs(uri, store, error), error)
    for example, reason in read_examples(uri):
        scores: dict[str, np.ndarray] = {}
        if reason is None:
            conditional, unconditional, similarity, reasons = pairs.take(
                (len(example.images), len(example.texts))
            )
            if reasons:
                reason = _where(example, reasons)
            elif store.is_clip:
                scores = {"cosine": similarity}
            else:
                scores = {"conditional": conditional_score(conditional)}
                if example.needs_unconditional:
                    scores["normalised"] = normalised_score(conditional, unconditional)
        if not all(np.isfinite(values).all() for values in scores.values()):
            reason = "a score is not finite"
        if reason is not None:
            failed.append({"example": example.id, "failure": reason})
        credits = {kind: task.credits(example, values) for kind, values in scores.items()}
        chance = task.chance(example)
        failure = reason is not None
        outcomes.append(Outcome(example.cluster, example.groups, chance, credits, failure))
    return outcomes, failed


def _where(example: Example, reasons: dict[int, str]) -> str:
    """The first failed pair of an example and why."""
    place, reason = next(iter(reasons.items()))
    return f"{example.images[place // len(example.texts)]}: {reason}"


class _PairReader:
    """Takes the pairs of one example after the other from the ordered stream."""

    def __init__(self, batches: Iterator[pa.RecordBatch], error: str) -> None:
        self.batches, self.error = batches, error
        self.held: list[tuple[np.ndarray, ...]] = []
        self.count = 0

    def take(
        self, shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
        """Conditional and unconditional errors and similarity [images, texts]; failures by pair."""
        need = shape[0] * shape[1]
        while self.count < need:
            arrays = self._reduced(next(self.batches))
            self.held.append(arrays)
            self.count += len(arrays[0])
        if len(self.held) > 1:
            columns = zip(*self.held, strict=True)
            self.held = [tuple(np.concatenate(parts) for parts in columns)]
        (held,) = self.held
        first = [part[:need] for part in held]
        self.held, self.count = [tuple(part[need:] for part in held)], self.count - need
        failures = {i: str(f) for i, f in enumerate(first[3]) if f is not None}
        conditional, unconditional, similarity = (part.reshape(shape) for part in first[:3])
        return conditional, unconditional, similarity, failures

    def _reduced(self, batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
        elements = batch["elements"].to_numpy(zero_copy_only=False).astype(float)
        return (
            self._mean(batch["errors"], elements),
            self._mean(batch["unconditional"], elements),
            batch["similarity"].to_numpy(zero_copy_only=False).astype(float),
            np.array(batch["failure"].to_pylist(), dtype=object),
        )

    def _mean(self, lists: pa.ListArray, elements: np.ndarray) -> np.ndarray:
        """Averaged errors of each pair, NaN where there are none."""
        out = np.full(len(lists), np.nan)
        present = np.flatnonzero(lists.is_valid().to_numpy(zero_copy_only=False))
        if len(present) == 0:
            return out
        flat = lists.drop_null().flatten().to_numpy(zero_copy_only=False).astype(float)
        errors = flat.reshape(len(present), -1)
        if self.error == "mse":
            errors = errors**2 / elements[present, None]
        out[present] = averaged(errors)
        return out


def read_examples(uri: str) -> Iterator[tuple[Example, str | None]]:
    """The examples of a file in order, each with the reason why it cannot be scored, if any."""
    for batch in examples_dataset([uri]).to_batches():
        for line in batch.to_pylist():
            example = Example(
                id=line["id"],
                images=tuple(line["images"]),
                texts=tuple(line["texts"]),
                direction=line["direction"],
                gold=line["gold"],
                cluster=line["cluster"],
                groups=dict(line["groups"]),
            )
            yield example, line["failure"]


def _rows(outcomes: list[Outcome], score: str, store: Store, task: str) -> list[Row]:
    """The whole task and each of its groups, for each metric."""
    groups: dict[str, list[Outcome]] = {"all": outcomes}
    for outcome in outcomes:
        for key, value in outcome.groups.items():
            groups.setdefault(f"{key}={value}", []).append(outcome)
    return [
        _row(members, metric, score, store, task, group)
        for group, members in groups.items()
        for metric in outcomes[0].chance
    ]


def _row(
    members: list[Outcome], metric: str, score: str, store: Store, task: str, group: str
) -> Row:
    scored = [o for o in members if score in o.credits]
    credits = [o.credits[score][metric] for o in scored]
    values = np.array([credit.value for credit in credits])
    low, high = interval(values, np.array([o.cluster for o in scored])) if scored else (None, None)
    return Row(
        model=store.model,
        task=task,
        group=group,
        metric=metric,
        score=score,
        value=float(values.mean()) if scored else None,
        low=low,
        high=high,
        n=len(values),
        chance=float(np.mean([o.chance[metric] for o in members])),
        ties=sum(credit.tied for credit in credits),
        failures=sum(o.failed for o in members),
        protocol=store.config.get("protocol", "cosine"),
        timesteps=len(store.config.get("timesteps", [])),
    )


def _compare(outcomes: list[Outcome], store: Store, task: str) -> list[Comparison]:
    scored = [o for o in outcomes if "normalised" in o.credits]
    clusters = np.array([o.cluster for o in scored])
    out = []
    for metric in scored[0].chance:
        normalised, naive = (
            np.array([o.credits[kind][metric].value for o in scored])
            for kind in ("normalised", "conditional")
        )
        p = paired_p(normalised, naive, clusters)
        difference = float(normalised.mean() - naive.mean())
        out.append(Comparison(store.model, task, metric, difference, p, len(scored)))
    return out


def write_results(evaluation: Evaluation, provenance: dict[str, Any], out: str) -> str:
    """results.json, provenance.json and failures.json below `out`; the path of the first."""
    rows = {
        "rows": [asdict(row) for row in evaluation.rows],
        "comparisons": [asdict(line) for line in evaluation.comparisons],
    }
    path = storage.join(out, "results.json")
    storage.write_text(storage.join(out, "provenance.json"), json.dumps(provenance, indent=2))
    failures = {"failures": evaluation.failures}
    storage.write_text(storage.join(out, "failures.json"), json.dumps(failures, indent=2))
    storage.write_text(path, json.dumps(rows, indent=2))
    return path


def present(root: str, uri: str, tries: int = 8) -> str | None:
    """None if any of a few of the task's images is there, else the first path that is not."""
    from diffitm.images import split_crop

    head = ds.Scanner.from_dataset(examples_dataset([uri]), columns=["images"]).head(tries)
    paths = [
        storage.join(root, split_crop(i)[0]) for line in head.to_pylist() for i in line["images"]
    ]
    return None if not paths or any(storage.exists(path) for path in paths) else paths[0]
