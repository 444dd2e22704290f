"""The table of races: the contests of tasks that stored errors do not decide, in blocks for actors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.schema import RACES, Contest, Example
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.races import RaceOptions, pair_values
from diffitm.scoring.racing import RacePlan, hold
from diffitm.store.join import read_examples, read_items
from diffitm.store.pair_table import (
    WorkTable,
    batched,
    connect,
    write_examples,
    write_race_blocks,
)
from diffitm.store.score_store import Store
from diffitm.store.stored_lines import LinesByTask

# A block is what a kill costs an actor; contests in one share their images' latents and empty text.
FORWARDS_PER_BLOCK = 20_000
BLOCKS_PER_ACTOR = 4
SHARE = 0.4  # of a block's forwards that a race is guessed to need
SORTED = pa.schema([("task", pa.int32()), ("position", pa.int64()), *RACES])


class Contested(Protocol):
    """What says the contests of examples, such as a task."""

    @property
    def name(self) -> str:
        """What its examples' files are named by."""

    @property
    def version(self) -> int:
        """Grows when its examples change."""

    def contests(self, example: Example) -> list[Contest]:
        """See tasks.base.Task."""


class Races(NamedTuple):
    """How a store's pairs are raced: what is audited, the plan, and who says the contests, by the names of
    examples."""

    options: RaceOptions
    plan: RacePlan
    tasks: Mapping[str, Contested]


def full_part(examples: Mapping[str, Examples], races: Races, out: str) -> list[Examples]:
    """What of each task is scored in full: the examples to audit, and those without contests."""
    found = []
    for name, part in examples.items():
        task = races.tasks[name]
        chosen = (
            example
            for example in read_examples(part.uri)
            if races.options.is_audited(task.name, example) or not task.contests(example)
        )
        uri, count = write_examples(task.name, chosen, storage.join(out, "examples"), None)
        if count:
            found.append(Examples(uri, f"{task.version}-{storage.without_query(uri)}"))
    return found


def write_races(
    examples: Mapping[str, Examples], store: Store, races: Races, actors: int, uri: str
) -> WorkTable:
    """Write the contests that the stored errors do not decide, in blocks that share images: enough of them
    for so many actors."""
    with tempfile.TemporaryDirectory(prefix="diffitm-") as folder:
        path = Path(folder, "contests.parquet")
        pairs = 0
        with parquet.ParquetWriter(path, SORTED) as writer:
            for batch in batched(_undecided(examples, store, races), 100):
                writer.write_table(pa.Table.from_pylist(batch, SORTED))
                pairs += sum(len(line["image_of"]) for line in batch)
        guess = SHARE * len(races.plan.order)
        most = min(FORWARDS_PER_BLOCK, pairs * guess / (BLOCKS_PER_ACTOR * actors))
        connection = connect(contests=ds.dataset(path))
        query = "SELECT * FROM contests ORDER BY images[1], task, position"
        batches = connection.sql(query).to_arrow_reader(100)
        lines = (line for batch in batches for line in batch.to_pylist())
        return write_race_blocks(_blocks(lines, most / guess), uri)


def _undecided(
    examples: Mapping[str, Examples], store: Store, races: Races
) -> Iterator[dict[str, Any]]:
    """A line of RACES an example with contests that are not decided."""
    plan, stored = races.plan, LinesByTask(store, races.plan.error)
    for number, (name, part) in enumerate(examples.items()):
        task = races.tasks[name]
        for position, item in enumerate(read_items(part.uri, stored.of(part.uri), partial=True)):
            contests = [] if item.example.failure else task.contests(item.example)
            errors = pair_values(item)
            runs = hold(contests, errors, plan)
            if left := [run.contest for run in runs if not run.decided]:
                line = _line(item.example, errors, left)
                yield {"task": number, "position": position, "row": 0, **line}


def _line(example: Example, errors: np.ndarray, contests: list[Contest]) -> dict[str, Any]:
    """The pairs of contests with what is known of them."""
    texts = len(example.texts)
    pairs = len(example.images) * texts
    used = sorted({p for c in contests for p in (*c.candidates, *c.bases)})
    place = {pair: number for number, pair in enumerate(used)}
    known = [np.flatnonzero(~np.isnan(errors[pair])) for pair in used]
    return {
        "images": list(example.images),
        "texts": [*example.texts, ""],
        "image_of": [p // texts if p < pairs else p - pairs for p in used],
        "text_of": [p % texts if p < pairs else texts for p in used],
        "stored": [places.tolist() for places in known],
        "errors": [errors[pair, places] for pair, places in zip(used, known, strict=True)],
        "contests": [
            c._replace(
                candidates=[place[p] for p in c.candidates], bases=[place[p] for p in c.bases]
            )._asdict()
            for c in contests
        ],
    }


def _blocks(lines: Iterable[dict[str, Any]], most: float) -> Iterator[dict[str, Any]]:
    """Lines joined to blocks of up to `most` pairs; those of one first image stay together up to that."""
    row, block, last = 0, _Block(), None
    for line in lines:
        full = len(block.image_of) + len(line["image_of"]) > most
        if block.contests and (
            full or (len(block.image_of) > most / 2 and line["images"][0] != last)
        ):
            yield block.line(row)
            row, block = row + 1, _Block()
        block.add(line)
        last = line["images"][0]
    if block.contests:
        yield block.line(row)


@dataclass
class _Block:
    """Lines of RACES that become one: each image, text and pair once."""

    images: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    pairs: dict[tuple[int, int], int] = field(default_factory=dict)
    image_of: list[int] = field(default_factory=list)
    text_of: list[int] = field(default_factory=list)
    stored: list[list[int]] = field(default_factory=list)
    errors: list[list[float]] = field(default_factory=list)
    contests: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        """Put a line's pairs and contests to the others."""
        places = []
        for p, (i, t) in enumerate(zip(line["image_of"], line["text_of"], strict=True)):
            image = self.images.setdefault(line["images"][i], len(self.images))
            text = self.texts.setdefault(line["texts"][t], len(self.texts))
            if (image, text) not in self.pairs:
                self.pairs[image, text] = len(self.pairs)
                self.image_of.append(image)
                self.text_of.append(text)
                self.stored.append(line["stored"][p])
                self.errors.append(line["errors"][p])
            places.append(self.pairs[image, text])
        for contest in line["contests"]:
            for name in ("candidates", "bases"):
                contest[name] = [places[pair] for pair in contest[name]]
            self.contests.append(contest)

    def line(self, row: int) -> dict[str, Any]:
        """The row of the table of races."""
        return {
            "row": row,
            "images": list(self.images),
            "texts": list(self.texts),
            "image_of": self.image_of,
            "text_of": self.text_of,
            "stored": self.stored,
            "errors": self.errors,
            "contests": self.contests,
        }
