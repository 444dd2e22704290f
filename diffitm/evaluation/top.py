"""The best texts of each image, or images of each text, of people's own pairs, found by races."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Contest, Example
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.race_table import Races
from diffitm.evaluation.races import RaceFigure, RaceStats, pair_values
from diffitm.scoring.racing import hold
from diffitm.store.join import read_scored
from diffitm.store.pair_table import connect, examples_dataset, write_examples
from diffitm.store.score_store import Store

Of = Literal["text", "image"]
MOST_IMAGES = 10_000  # of a contest, whose latents one actor holds


@dataclass(frozen=True)
class Top:
    """The contests of people's own pairs: which `kept` candidates of an example are the best."""

    kept: int
    name: ClassVar[str] = "own"
    version: ClassVar[int] = 1

    def contests(self, example: Example) -> list[Contest]:
        """One over all pairs, by the normalised score; a candidate that cannot be scored loses. Where all are
        kept nothing is raced: they are scored in full, and ranked by that."""
        pairs = list(range(len(example.images) * len(example.texts)))
        if len(pairs) <= self.kept:
            return []
        bases = [len(pairs) + pair // len(example.texts) for pair in pairs]
        return [Contest(pairs, self.kept, bases, drops_lost=True)]


def write_groups(examples: str, of: Of, folder: str) -> Examples:
    """The pairs of an examples file by text (all its images) or by image (all its texts), an example each."""
    other = "image" if of == "text" else "text"
    query = f"""
        SELECT {of}, list({other} ORDER BY position, i, j) FROM (
            SELECT *, unnest(range(len(texts))) AS j, unnest(texts) AS text FROM (
                SELECT position, texts, unnest(range(len(images))) AS i, unnest(images) AS image
                FROM examples WHERE failure IS NULL))
        GROUP BY {of} ORDER BY min(position), {of}
    """
    connection = connect(examples=examples_dataset([examples]))

    def groups() -> Iterator[Example]:
        rows = (batch.columns for batch in connection.sql(query).to_arrow_reader(1000))
        lines = (zip(*(column.to_pylist() for column in columns), strict=True) for columns in rows)
        for one, others in itertools.chain.from_iterable(lines):
            pair = ((one,), tuple(dict.fromkeys(others)))
            images, texts = pair if of == "image" else pair[::-1]
            if len(images) > MOST_IMAGES:
                text = f": {len(images):,} images of one text are more than one actor races"
                raise InputError(f"{text} ({MOST_IMAGES:,}); leave it out", "racing")
            # Scores are normalised whatever is compared.
            yield Example(one, images, texts, "both")

    uri, _ = write_examples(Top.name, groups(), folder, None)
    return Examples(uri, storage.without_query(uri))


class TopRaces:
    """The races of groups over stored errors, one group after the other; `figure` is that of those so far."""

    def __init__(self, groups: Examples, store: Store, races: Races) -> None:
        self.groups, self.store, self.races = groups, store, races
        self.stats = RaceStats(races.plan, races.options)

    @property
    def figure(self) -> RaceFigure | None:
        """What the races took."""
        return self.stats.read(self.store.model, Top.name)

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The (image, text) of each group's winners, in no order."""
        plan, options = self.races.plan, self.races.options
        top = self.races.tasks[Top.name]
        scored = read_scored(self.groups.uri, self.store, plan.error, partial=True, lost=np.inf)
        for item in scored:
            if item.example.failure:
                continue
            images, texts = item.example.images, item.example.texts
            winners = list(range(len(images) * len(texts)))
            if contests := top.contests(item.example):
                errors = pair_values(item)
                (run,) = hold(contests, errors, plan)
                if not run.decided:
                    continue
                audited = options.is_audited(Top.name, item.example) and item.is_complete
                self.stats.add(item, [run], errors, audited)
                winners = run.race.winners
            for number in winners:
                yield images[number // len(texts)], texts[number % len(texts)]
