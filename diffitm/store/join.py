"""The store joined back to a task's examples: every example with the errors of its pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from diffitm.core.schema import Example
from diffitm.metrics.score import averaged, conditional_score, error_values, normalised_score
from diffitm.store.dense_errors import dense
from diffitm.store.pair_table import examples_dataset, scored_pairs
from diffitm.store.score_store import Store

# Values of the errors that are held at once, whatever the number of timesteps.
HELD = 4_000_000
NOTHING = np.zeros((0, 0, 0))
UNSCORED = "not scored yet"


@dataclass(frozen=True)
class ScoredExample:
    """An example with conditional and unconditional errors [images, texts, timesteps] or with
    similarities [images, texts] of a `kind`; `failure` tells why it has no score."""

    example: Example
    failure: str | None = None
    conditional: np.ndarray = field(default_factory=lambda: NOTHING)
    unconditional: np.ndarray = field(default_factory=lambda: NOTHING)
    similarity: np.ndarray | None = None
    kind: str = "cosine"

    @property
    def is_complete(self) -> bool:
        """Whether everything that its scores are made of is known."""
        used = [
            self.conditional,
            *([self.unconditional] if self.example.needs_unconditional else []),
        ]
        return self.similarity is not None or not any(np.isnan(errors).any() for errors in used)

    def scores(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Kind of score -> scores [images, texts]; the timesteps weigh the same unless told."""
        if self.failure is not None:
            return {}
        if self.similarity is not None:
            return {self.kind: self.similarity}
        conditional = averaged(self.conditional, weights)
        found = {"conditional": conditional_score(conditional)}
        if self.example.needs_unconditional:
            unconditional = averaged(self.unconditional, weights)
            found["normalised"] = normalised_score(conditional, unconditional)
        return found


def read_scored(
    uri: str, store: Store, error: str, partial: bool = False, lost: float = np.nan
) -> Iterator[ScoredExample]:
    """Every example of a file in order. `error` is l2, mse, l1 or huber. With `partial` an example is no
    failure for errors that are not scored yet. Errors that are not there are NaN, those of a pair that
    failed `lost`.
    """
    rows = max(1000, min(100_000, HELD // store.steps))
    batches = scored_pairs(uri, store, error, rows, partial=partial)
    pairs = _PairReader(batches, error, store.steps)
    for position, example in enumerate(read_examples(uri)):
        if example.failure is not None:
            yield ScoredExample(example, example.failure)
            continue
        shape = (len(example.images), len(example.texts))
        conditional, unconditional, similarity, failures = pairs.take(position, shape)
        if failures:
            place, reason = next(iter(failures.items()))
            _lose(conditional, list(failures), lost)
            _lose(unconditional, list(failures), lost)
            why = f"{example.images[place // shape[1]]}: {reason}"
            yield ScoredExample(example, why, conditional, unconditional)
        elif store.similarity:
            yield ScoredExample(example, similarity=similarity, kind=store.similarity)
        else:
            yield ScoredExample(example, None, conditional, unconditional)


def read_examples(uri: str) -> Iterator[Example]:
    """The examples of a file in order."""
    for batch in examples_dataset([uri]).to_batches():
        for line in batch.to_pylist():
            yield Example(
                id=line["id"],
                images=tuple(line["images"]),
                texts=tuple(line["texts"]),
                direction=line["direction"],
                gold=line["gold"],
                cluster=line["cluster"],
                groups=dict(line["groups"]),
                failure=line["failure"],
            )


class _PairReader:
    """Takes the pairs of one example after the other from the ordered stream.

    Raises ValueError where the stream has other pairs there than the example's.
    """

    def __init__(self, batches: Iterator[pa.RecordBatch], error: str, steps: int) -> None:
        self.batches, self.error, self.steps = batches, error, steps
        self.keys = np.zeros((0, 3), int)  # position, i, j of the pairs that are held
        self.held: list[tuple[np.ndarray, ...]] = []
        self.count = 0

    def take(
        self, position: int, shape: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[int, str]]:
        """Conditional and unconditional errors [images, texts, timesteps], similarities [images,
        texts], failures by pair."""
        need = shape[0] * shape[1]
        while self.count < need:
            batch = next(self.batches, None)
            if batch is None:
                break
            self.keys = np.concatenate([self.keys, _keys(batch)])
            self.held.append(self._arrays(batch))
            self.count += len(batch)
        texts = np.tile(np.arange(shape[1]), shape[0])
        images = np.repeat(np.arange(shape[0]), shape[1])
        expected = np.stack([np.full(need, position), images, texts], 1)
        if not np.array_equal(self.keys[:need], expected):
            raise ValueError(f"the pairs of example {position} are not those of its file")
        self.keys = self.keys[need:]
        if len(self.held) > 1:
            columns = zip(*self.held, strict=True)
            self.held = [tuple(np.concatenate(parts) for parts in columns)]
        (held,) = self.held
        first = [part[:need] for part in held]
        self.held, self.count = [tuple(part[need:] for part in held)], self.count - need
        failures = {i: str(f) for i, f in enumerate(first[3]) if f is not None}
        conditional, unconditional = (part.astype(float).reshape(*shape, -1) for part in first[:2])
        return conditional, unconditional, first[2].reshape(shape), failures

    def _arrays(self, batch: pa.RecordBatch) -> tuple[np.ndarray, ...]:
        elements = batch["elements"].to_numpy(zero_copy_only=False).astype(float)
        return (
            self._errors(batch["errors"], batch["places"], elements),
            self._errors(batch["unconditional"], batch["unconditional_places"], elements),
            batch["similarity"].to_numpy(zero_copy_only=False).astype(float),
            np.array(batch["failure"].to_pylist(), dtype=object),
        )

    def _errors(
        self, lists: pa.ListArray, places: pa.ListArray, elements: np.ndarray
    ) -> np.ndarray:
        """Errors [pairs, timesteps], NaN where there are none."""
        return error_values(dense(lists, places, self.steps), self.error, elements[:, None])


def _lose(errors: np.ndarray, pairs: list[int], lost: float) -> None:
    """Put `lost` where errors [images, texts, timesteps] of some pairs are not known."""
    flat = errors.reshape(errors.shape[0] * errors.shape[1], -1)
    flat[pairs] = np.where(np.isnan(flat[pairs]), lost, flat[pairs])


def _keys(batch: pa.RecordBatch) -> np.ndarray:
    return np.stack([batch[name].to_numpy() for name in ("position", "i", "j")], 1)
