"""Matching accuracy of a model in training, by the scoring code and the credits of gdbench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from diffitm.core.schema import Example, PairRow
from diffitm.scoring.scorer import RowScorer
from diffitm.store.join import ScoredExample
from diffitm.tasks.base import Task
from diffitm.tasks.registry import find_task
from diffitm.training.job import Validation
from diffitm.training.module import Worker

E = TypeVar("E")


def accuracy(name: str, check: Validation, scorer: RowScorer, worker: Worker) -> float | None:
    """Mean credit of a task's examples, which are shared out over the workers; None if none has one."""
    task = find_task(name)()
    chosen = spread(list(task.examples(check.root)), check.examples)[worker.rank :: worker.world]
    values = [credit for credit in credits(task, chosen, scorer) if credit is not None]
    sums = worker.summed([sum(values), len(values)])
    return float(sums[0] / sums[1]) if sums[1] else None


def spread(examples: list[E], most: int) -> list[E]:
    """At most so many, evenly spread."""
    if most >= len(examples):
        return examples
    return [examples[i * len(examples) // most] for i in range(most)]


def credits(task: Task, examples: Sequence[Example], scorer: RowScorer) -> list[float | None]:
    """The credit of each example in the task's first metric, None of one that cannot be scored."""
    found = credits_by_metric(task, examples, scorer)
    return [None if by_metric is None else next(iter(by_metric.values())) for by_metric in found]


def credits_by_metric(
    task: Task, examples: Sequence[Example], scorer: RowScorer
) -> list[dict[str, float] | None]:
    """The credits of each example by metric, None of one that cannot be scored.

    The score is the normalised one where images are compared, else the conditional one; of a CLIP
    it is the cosine.
    """
    texts: dict[str, dict[str, None]] = {}
    for example in examples:
        for image in example.images if example.failure is None else ():
            wanted = dict.fromkeys([*example.texts, *([""] if example.needs_unconditional else [])])
            texts.setdefault(image, {}).update(wanted)
    work = [PairRow(row, image, list(found)) for row, (image, found) in enumerate(texts.items())]
    lines = scorer.score(work) if work else []
    # A line of a failure has neither.
    kind = "similarity" if any(line["similarity"] is not None for line in lines) else "l2"
    values = {
        (line["image"], line["text"]): line[kind] for line in lines if line["failure"] is None
    }
    return [_credits(task, example, values, kind) for example in examples]


def _credits(
    task: Task, example: Example, errors: dict[tuple[str, str], Any], kind: str
) -> dict[str, float] | None:
    pairs = [(image, text) for image in example.images for text in example.texts]
    if example.failure is not None or not all(pair in errors for pair in pairs):
        return None
    if kind == "similarity":
        similarity = np.array([errors[pair] for pair in pairs]).reshape(len(example.images), -1)
        return _of(task, example, ScoredExample(example, similarity=similarity))
    shape = (len(example.images), len(example.texts), -1)
    conditional = np.array([errors[pair] for pair in pairs], float).reshape(shape)
    unconditional = np.zeros_like(conditional)
    if example.needs_unconditional:
        empty = [errors[image, ""] for image, _ in pairs]
        unconditional = np.array(empty, float).reshape(shape)
    return _of(task, example, ScoredExample(example, None, conditional, unconditional))


def _of(task: Task, example: Example, scored: ScoredExample) -> dict[str, float]:
    """The credits under the last kind of score."""
    scores = list(scored.scores().values())[-1]
    return {name: credit.value for name, credit in task.credits(example, scores).items()}
