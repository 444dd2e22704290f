"""Settings of the score tried on stored errors: number, range and weights of timesteps.

Half of the examples choose (weights are fitted on them, settings compared); the other half measures
what was chosen. Halves are of clusters, so that no image or set stands in both.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.evaluation.diagnostics import right_pairs
from diffitm.metrics.figures import SECONDARY
from diffitm.metrics.intervals import interval
from diffitm.metrics.score import other_dtype
from diffitm.store.join import ScoredExample, read_scored
from diffitm.store.score_store import Store
from diffitm.sweep.timestep_weights import Contrasts, learn, spread
from diffitm.tasks.base import Task

log = logging.getLogger("diffitm")
FEW = 30  # examples


@dataclass(frozen=True)
class TaskErrors:
    """A task's examples with the errors of its main score, less the unconditional one where images
    are compared: float32 [P, N], an example's pairs in a row. `chooses` [n] tells the half, `failures`
    why examples have no errors (id -> reason)."""

    task: Task
    examples: list[Example]
    values: np.ndarray
    contrasts: Contrasts
    chooses: np.ndarray
    clusters: np.ndarray
    failures: dict[str, str]

    @property
    def identity(self) -> list[Any]:
        """What changes when the errors do."""
        return [self.task.name, hashlib.sha256(self.values.tobytes()).hexdigest(), self.failures]

    def credits(self, weights: np.ndarray) -> np.ndarray:
        """Each example's credit [n], the mean over the task's main metrics; weights [N] sum to 1."""
        scores, found, start = -(self.values @ weights), [], 0
        for example in self.examples:
            shape = (len(example.images), len(example.texts))
            end = start + shape[0] * shape[1]
            made = self.task.credits(example, scores[start:end].reshape(shape))
            found.append(np.mean([c.value for m, c in made.items() if not m.startswith(SECONDARY)]))
            start = end
        return np.array(found)


Key = tuple[str, str, str, str]  # model, LoRA, protocol, kind of error
Table = tuple[list[float], list[TaskErrors]]  # timesteps, and the tasks' errors at them


def half_of(cluster: str) -> tuple[bool, int]:
    """Whether a cluster's examples choose or measure, and their fold among those that choose."""
    number = hashlib.sha256(cluster.encode()).digest()[0]
    return bool(number & 1), number >> 1 & 1


def read_errors(task: Task, uri: str, store: Store, error: str) -> TaskErrors | None:
    """The stored errors of a task; None for one without right and wrong answers.

    Raises InputError if its examples have too few clusters for two halves.
    """
    if not task.graded:
        return None
    kept: list[ScoredExample] = []
    failures: dict[str, str] = {}
    for item in read_scored(uri, store, error):
        reason = item.failure
        if reason is None and not np.isfinite(_main(item)).all():
            reason = f"an error is not finite{other_dtype(store.config.get('dtype'))}"
        if reason is not None:
            failures[item.example.id] = reason
        elif not right_pairs(item, task.right).all():
            kept.append(item)
    halves = [half_of(item.example.cluster) for item in kept]
    chooses = np.array([half for half, _ in halves], bool)
    if min(chooses.sum(), (~chooses).sum()) < 2:
        raise InputError(
            f"task {task.name}: {len(kept)} examples are too few to choose settings on one half and "
            "measure them on the other"
        )
    if min(chooses.sum(), (~chooses).sum()) < FEW:
        text = (
            "task %s: only %d examples choose settings and %d measure them: expect chance in both"
        )
        log.warning(text, task.name, chooses.sum(), (~chooses).sum())
    main = [_main(item) for item in kept]
    values = np.concatenate([errors.reshape(-1, errors.shape[-1]) for errors in main])
    return TaskErrors(
        task,
        [item.example for item in kept],
        values.astype(np.float32),
        _contrasts(kept, main, halves, task.right),
        chooses,
        np.array([item.example.cluster for item in kept]),
        failures,
    )


def _main(item: ScoredExample) -> np.ndarray:
    """Errors [images, texts, N] of the main score."""
    if item.example.needs_unconditional:
        return item.conditional - item.unconditional
    return item.conditional


def _contrasts(
    items: Sequence[ScoredExample],
    errors: Sequence[np.ndarray],
    halves: Sequence[tuple[bool, int]],
    count: int,
) -> Contrasts:
    """The decisions of the half that chooses; each image's and each text's where both are asked."""
    blocks, folds, clusters = [], [], []
    for item, found, (chooses, fold) in zip(items, errors, halves, strict=True):
        if not chooses:
            continue
        right = right_pairs(item, count)
        if item.example.direction == "both":
            rows = [(found[i], right[i]) for i in range(len(found))]
            rows += [(found[:, j], right[:, j]) for j in range(found.shape[1])]
        else:
            rows = [(found.reshape(-1, found.shape[-1]), right.ravel())]
        for candidates, mask in rows:
            blocks.append(candidates[~mask] - candidates[mask])
            folds.append(fold)
            clusters.append(item.example.cluster)
    counts = [len(block) for block in blocks]
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(int)
    values = np.concatenate(blocks).astype(np.float32)
    return Contrasts(values, starts, np.array(folds), np.array(clusters))


def parse_range(text: str) -> tuple[int, int]:
    """'0-1000' as its bounds, the last not included. Raises InputError."""
    found = re.fullmatch(r"(\d+)-(\d+)", text)
    if not found or not int(found[1]) < int(found[2]):
        raise InputError(f"range: {text!r} must be LOW-HIGH, such as 0-1000, with LOW below HIGH")
    return int(found[1]), int(found[2])


def measure(
    tables: Sequence[TaskErrors],
    timesteps: Sequence[float],
    number: int,
    bounds: str,
    weighting: str,
) -> dict[str, Any]:
    """What a setting reaches on the tasks: mean accuracy of the half that chooses (`accuracy`) and of
    the other (`measured`), each task's values with the 95% interval of the latter, and the timesteps
    with their weights. At most `number` of the stored timesteps within `bounds`, evenly spread; or,
    learned, the most useful ones.

    Raises InputError if none of them lies there.
    """
    low, high = parse_range(bounds)
    steps = np.array(timesteps)
    inside = np.flatnonzero((steps >= low) & (steps < high))
    if len(inside) == 0:
        raise InputError(f"range: none of the stored timesteps lies in {bounds}")
    number = min(number, len(inside))
    if weighting == "learned":
        places, weights = learn([table.contrasts for table in tables], inside, number)
        places = places.astype(int)
    else:
        places = inside[spread(len(inside), number)]
        weights = np.full(number, 1 / number)
    every = np.zeros(len(steps))
    every[places] = weights
    tasks = {table.task.name: _task(table, every) for table in tables}
    return {
        "accuracy": float(np.mean([t["chosen"] for t in tasks.values()])),
        "measured": float(np.mean([t["measured"] for t in tasks.values()])),
        "tasks": tasks,
        "timesteps": steps[places].tolist(),
        "weights": weights.tolist(),
    }


def _task(table: TaskErrors, weights: np.ndarray) -> dict[str, Any]:
    credits = table.credits(weights)
    other = ~table.chooses
    low, high = interval(credits[other], table.clusters[other])
    return {
        "chosen": float(credits[table.chooses].mean()),
        "measured": float(credits[other].mean()),
        "low": low,
        "high": high,
        "n": int(other.sum()),
    }
