"""The store joined back to a task's examples: every example with the errors of its pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diffitm.core.schema import Example
from diffitm.metrics.figures import Groups, Labels
from diffitm.metrics.score import averaged, conditional_score, normalised_score
from diffitm.store.pair_table import examples_dataset
from diffitm.store.score_store import Store
from diffitm.store.stored_lines import LinesByTask, ScoredPairs, StoredLines, rows_at_once

NOTHING = np.zeros((0, 0, 0))
ITEMS = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
LINES = 10_000  # examples that are read at once


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
        return _scores(
            self.conditional, self.unconditional, self.example.needs_unconditional, weights
        )


@dataclass(frozen=True)
class ScoredBatch:
    """Examples with scores that have the same number of images and texts and compare the same, each at one
    of the `places` [n] of a part. Errors are [n, images, texts, timesteps], similarities [n, images, texts].
    """

    places: np.ndarray
    examples: Sequence[Example]
    golds: np.ndarray
    direction: str
    shape: tuple[int, int]  # images, texts
    conditional: np.ndarray
    unconditional: np.ndarray
    similarity: np.ndarray | None
    kind: str

    def __len__(self) -> int:
        return len(self.places)

    @property
    def needs_unconditional(self) -> bool:
        """See Example."""
        return self.direction != "text"

    def scores(self, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Kind of score -> scores [n, images, texts], as ScoredExample has them."""
        if self.similarity is not None:
            return {self.kind: self.similarity}
        return _scores(self.conditional, self.unconditional, self.needs_unconditional, weights)

    def item(self, number: int) -> ScoredExample:
        """One of the examples, which does not keep the others."""
        similarity = None if self.similarity is None else self.similarity[number].copy()
        errors = (e[number].copy() for e in (self.conditional, self.unconditional))
        conditional, unconditional = errors
        return ScoredExample(
            self.examples[number], None, conditional, unconditional, similarity, self.kind
        )


@dataclass(frozen=True)
class ScoredPart:
    """Some examples of a task in order, `size` of them: those with scores in batches, in the order of their
    first ones, and why others have none, with these in order. `clusters` [size] are labels of any kind."""

    size: int
    clusters: np.ndarray
    batches: list[ScoredBatch]
    failures: dict[int, str]
    lost: Sequence[Example]

    @classmethod
    def of(cls, item: ScoredExample) -> ScoredPart:
        """One example."""
        clusters = np.array([item.example.cluster])
        if item.failure is not None:
            return cls(1, clusters, [], {0: item.failure}, [item.example])
        example, similarity = item.example, item.similarity
        batch = ScoredBatch(
            np.zeros(1, int),
            [example],
            np.array([example.gold]),
            example.direction,
            (len(example.images), len(example.texts)),
            item.conditional[None],
            item.unconditional[None],
            None if similarity is None else similarity[None],
            item.kind,
        )
        return cls(1, clusters, [batch], {}, [])


def _scores(
    conditional: np.ndarray,
    unconditional: np.ndarray,
    needs_unconditional: bool,
    weights: np.ndarray | None,
) -> dict[str, np.ndarray]:
    mean = averaged(conditional, weights)
    found = {"conditional": conditional_score(mean)}
    if needs_unconditional:
        found["normalised"] = normalised_score(mean, averaged(unconditional, weights))
    return found


def read_scored(
    uri: str, store: Store, error: str, partial: bool = False, lost: float = np.nan
) -> Iterator[ScoredExample]:
    """Every example of a file in order. `error` is l2, mse, l1 or huber. With `partial` an example is no
    failure for errors that are not scored yet. Errors that are not there are NaN, those of a pair that
    failed `lost`.
    """
    return read_items(uri, LinesByTask(store, error).of(uri), partial, lost)


def read_items(
    uri: str, lines: StoredLines, partial: bool = False, lost: float = np.nan
) -> Iterator[ScoredExample]:
    """The same of lines that are read already."""
    for part in _Parts(uri, lines, partial):
        for place, example in enumerate(part.examples):
            if example.failure is not None:
                yield ScoredExample(example, example.failure)
                continue
            start, shape = int(part.starts[place]), (len(example.images), len(example.texts))
            mine = slice(start, start + shape[0] * shape[1])
            conditional, unconditional = (
                errors[mine].astype(float).reshape(*shape, -1)
                for errors in (part.pairs.conditional, part.pairs.unconditional)
            )
            failures = part.failures[np.searchsorted(part.failures, start) :]
            failures = failures[failures < mine.stop] - start
            if len(failures):
                for errors in (conditional, unconditional):
                    _lose(errors, failures, lost)
                why = part.reason(place, int(failures[0]))
                yield ScoredExample(example, why, conditional, unconditional)
            elif kind := lines.store.similarity:
                similarity = part.pairs.similarity[mine].reshape(shape)
                yield ScoredExample(example, similarity=similarity, kind=kind)
            else:
                yield ScoredExample(example, None, conditional, unconditional)


def read_parts(uri: str, lines: StoredLines, clusters: np.ndarray) -> Iterator[ScoredPart]:
    """Every example of a file in order, with its label of `clusters`, many at a time."""
    position = 0
    for part in _Parts(uri, lines, False):
        size = len(part.examples)
        yield part.scored(clusters[position : position + size], lines.store.similarity)
        position += size


def read_labels(uri: str) -> tuple[Labels, Groups]:
    """The clusters and the groups of the examples of a file."""
    table = examples_dataset([uri]).to_table(columns=["cluster", "groups"]).combine_chunks()
    found = _encoded(table["cluster"])
    order = pc.array_sort_indices(found.dictionary).to_numpy()
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    labels = Labels(found.dictionary.take(pa.array(order)).to_pylist(), ranks[found.indices])
    groups = table["groups"].combine_chunks()
    starts = np.concatenate([[0], np.cumsum(_lengths(groups.cast(ITEMS)))]).astype(int)
    keys, values = _encoded(groups.keys), _encoded(groups.items)
    numbers = np.asarray(keys.indices) * max(1, len(values.dictionary)) + values.indices
    _, first, codes = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(first)
    ranks = np.argsort(order)
    pairs = [(groups.keys[int(i)].as_py(), groups.items[int(i)].as_py()) for i in first[order]]
    return labels, Groups(pairs, ranks[codes.ravel()] if len(codes) else codes, starts)


def _encoded(values: pa.Array | pa.ChunkedArray) -> pa.DictionaryArray:
    """The values as numbers into a list of them, which is in the order in which they first come."""
    whole = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pc.dictionary_encode(whole)


def read_examples(uri: str) -> Iterator[Example]:
    """The examples of a file in order."""
    for batch in examples_dataset([uri]).to_batches(batch_size=LINES):
        yield from Lines(batch)


class Lines(Sequence[Example]):
    """The examples of lines of a file, made when they are asked for."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self._made: list[Example] | None = None

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return Lines(self.batch.take(pa.array(range(start, stop, step), pa.int64())))
        (line,) = self.batch.slice(range(len(self))[place], 1).to_pylist()
        return _example(line)

    def __iter__(self) -> Iterator[Example]:
        if self._made is None:
            self._made = list(map(_example, self.batch.to_pylist()))
        return iter(self._made)


def _example(line: dict[str, Any]) -> Example:
    return Example(
        id=line["id"],
        images=tuple(line["images"]),
        texts=tuple(line["texts"]),
        direction=line["direction"],
        gold=line["gold"],
        cluster=line["cluster"],
        groups=dict(line["groups"]),
        failure=line["failure"],
    )


class _Part:
    """Lines of a file with the pairs of those that are no failure; `failures` are numbers of pairs."""

    def __init__(self, batch: pa.RecordBatch, needs: np.ndarray, pairs: ScoredPairs) -> None:
        self.batch, self.examples, self.pairs = batch, Lines(batch), pairs
        self.needs, self.starts = needs, np.cumsum(needs) - needs
        self.failures = np.flatnonzero(np.asarray(pairs.failure.is_valid()))
        self.images, self.texts = (_lengths(batch[name]) for name in ("images", "texts"))
        self._check()

    def _check(self) -> None:
        """Raises ValueError where the pairs are not those of the lines."""
        position, i, j = (self.pairs.keys[name].to_numpy() for name in ("position", "i", "j"))
        owner = np.repeat(np.arange(len(self.needs)), self.needs)
        number = np.arange(len(owner)) - self.starts[owner]
        positions = self.batch["position"].to_numpy()[owner]
        expected = (positions, number // self.texts[owner], number % self.texts[owner])
        for found, wanted in zip((position, i, j), expected, strict=True):
            if not np.array_equal(found, wanted):
                odd = positions[:1] if len(found) != len(wanted) else positions[found != wanted]
                raise ValueError(f"the pairs of example {odd[0]} are not those of its file")

    def reason(self, place: int, pair: int) -> str:
        """Why the example at a place has no score, by its failed pair."""
        image = self.batch["images"][place][pair // int(self.texts[place])]
        return f"{image}: {self.pairs.failure[int(self.starts[place]) + pair]}"

    def scored(self, clusters: np.ndarray, similarity: str | None) -> ScoredPart:
        """The examples by shape and direction."""
        failures: dict[int, str] = {}
        own = self.batch["failure"]
        for place in np.flatnonzero(np.asarray(own.is_valid())):
            failures[int(place)] = own[int(place)].as_py()
        owners = np.searchsorted(self.starts + self.needs, self.failures, side="right")
        for owner, pair in zip(*np.unique(owners, return_index=True), strict=True):
            number = int(self.failures[pair] - self.starts[owner])
            failures[int(owner)] = self.reason(int(owner), number)
        good = np.ones(len(self.examples), bool)
        good[list(failures)] = False
        directions = pc.dictionary_encode(self.batch["direction"])
        kinds = np.stack([self.images, self.texts, directions.indices.to_numpy()], 1)
        shapes, first, shape = np.unique(
            kinds[good], axis=0, return_index=True, return_inverse=True
        )
        places, shape = np.flatnonzero(good), shape.ravel()
        batches = [
            self._batch(places[shape == number], shapes[number], directions.dictionary, similarity)
            for number in np.argsort(first)
        ]
        failures = dict(sorted(failures.items()))
        lost = Lines(self.batch.take(pa.array(list(failures), pa.int64())))
        return ScoredPart(len(good), clusters, batches, failures, lost)

    def _batch(
        self, places: np.ndarray, kind: np.ndarray, directions: pa.Array, similarity: str | None
    ) -> ScoredBatch:
        images, texts, direction = (int(number) for number in kind)
        pairs = self.starts[places][:, None] + np.arange(images * texts)
        shape = (len(places), images, texts)
        chosen = self.batch.take(pa.array(places))
        conditional, unconditional = (
            errors[pairs].astype(float).reshape(*shape, errors.shape[1])
            for errors in (self.pairs.conditional, self.pairs.unconditional)
        )
        return ScoredBatch(
            places,
            Lines(chosen),
            chosen["gold"].to_numpy(),
            directions[direction].as_py(),
            (images, texts),
            conditional,
            unconditional,
            self.pairs.similarity[pairs].reshape(shape) if similarity else None,
            similarity or "cosine",
        )


class _Parts:
    """The examples of a file, so many at a time that little is held, with the pairs of an ordered stream."""

    def __init__(self, uri: str, lines: StoredLines, partial: bool) -> None:
        self.uri, self.most = uri, max(1000, rows_at_once(lines.store.steps) // 4)
        self.stream = lines.pairs(uri, partial=partial)
        self.held: list[ScoredPairs] = []

    def __iter__(self) -> Iterator[_Part]:
        for batch in examples_dataset([self.uri]).to_batches(batch_size=LINES):
            lost = np.asarray(batch["failure"].is_valid())
            needs = _lengths(batch["images"]) * _lengths(batch["texts"])
            needs = np.where(lost, 0, needs)
            number = np.cumsum(needs) // self.most
            ends = np.flatnonzero(np.diff(number, append=-1)) + 1
            for start, stop in zip([0, *ends[:-1]], ends, strict=True):
                mine = needs[start:stop]
                pairs = self._take(int(mine.sum()))
                yield _Part(batch.slice(start, stop - start), mine, pairs)

    def _take(self, need: int) -> ScoredPairs:
        """The next pairs of the stream, fewer where it ends."""
        count = sum(len(pairs.keys) for pairs in self.held)
        while count < need or not self.held:
            pairs = next(self.stream, None)
            if pairs is None:
                break
            self.held.append(pairs)
            count += len(pairs.keys)
        whole = _joined(self.held)
        self.held = [whole.slice(need, count)] if count > need else []
        return whole.slice(0, need)


def _joined(parts: list[ScoredPairs]) -> ScoredPairs:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        empty = {name: pa.array([], pa.int64()) for name in ("position", "i", "j")}
        nothing = np.zeros((0, 0))
        keys = pa.RecordBatch.from_pydict(empty)
        return ScoredPairs(keys, nothing, nothing, np.zeros(0), pa.nulls(0, pa.string()))
    keys = pa.Table.from_batches([part.keys for part in parts]).combine_chunks().to_batches()[0]
    arrays = zip(*(part[1:4] for part in parts), strict=True)
    conditional, unconditional, similarity = (np.concatenate(found) for found in arrays)
    failure = pa.concat_arrays([part.failure for part in parts])
    return ScoredPairs(keys, conditional, unconditional, similarity, failure)


def _lengths(lists: pa.ListArray) -> np.ndarray:
    return np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False)).astype(int)


def _lose(errors: np.ndarray, pairs: np.ndarray, lost: float) -> None:
    """Put `lost` where errors [images, texts, timesteps] of some pairs are not known."""
    flat = errors.reshape(errors.shape[0] * errors.shape[1], -1)
    flat[pairs] = np.where(np.isnan(flat[pairs]), lost, flat[pairs])
