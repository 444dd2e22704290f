"""A benchmark of one's own, without code: a file of pairs, of choices or of picks."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from diffitm.captions.lines import Line, read_lines
from diffitm.captions.shards import is_webdataset
from diffitm.captions.table import is_table
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Contest, Example
from diffitm.metrics.credit import Credit, Credits
from diffitm.tasks.base import PairTask, RetrievalTask, Task, pair_of

PAIRS, CHOICES, PICKS = (
    ("i0", "i1", "c0", "c1"),
    ("image", "texts", "right"),
    ("text", "images", "right"),
)
TAG, CLUSTER = "tag", "cluster"


def pair(line: Line) -> Example:
    """Of i0, i1, c0, c1: two images and their captions, c0 of i0 and c1 of i1."""
    return pair_of(line, ("i0", "i1"), ("c0", "c1"), _tag(line))


def choice(line: Line) -> Example:
    """Of image, texts, right: an image and the place of its text among some."""
    image, texts = line.image("image"), line.texts("texts")
    right = line.number("right", len(texts))
    return Example(line.key, (image,), texts, "text", right, cluster=image, groups=_tag(line))


def pick(line: Line) -> Example:
    """Of text, images, right: a text and the place of its image among some."""
    text, images = line.text("text"), line.images("images")
    right = line.number("right", len(images))
    return Example(
        line.key, images, (text,), "image", right, cluster=images[right], groups=_tag(line)
    )


def _tag(line: Line) -> dict[str, str]:
    tag = line.label(TAG)
    return {TAG: tag} if tag else {}


def _clustered(example: Example, line: Line) -> Example:
    """The example in the cluster that its line names; without one it shares that of its image."""
    cluster = line.label(CLUSTER)
    return replace(example, cluster=cluster) if cluster else example


READERS = {PAIRS: pair, CHOICES: choice, PICKS: pick}


class _Pairs(PairTask):
    def examples(self, root: str) -> Iterator[Example]:
        raise NotImplementedError


class _Candidates(RetrievalTask):
    def examples(self, root: str) -> Iterator[Example]:
        raise NotImplementedError


PAIR_TASK, CANDIDATE_TASK = _Pairs(), _Candidates()


class OwnFile(Task):
    """A file whose lines are all pairs (i0, i1, c0, c1), all choices (image, texts, right) or all picks
    (text, images, right), each with a `tag` and a `cluster` or without: JSON lines, JSON, CSV, TSV, Parquet
    or shards.

    Images are paths below the data root, or lie in the file.
    """

    folder = ""
    source = "you"
    uri: ClassVar[str]

    def examples(self, root: str) -> Iterator[Example]:
        """One example a line. Raises InputError that names the first wrong line, its field and value."""
        reader = None
        for line in read_lines(self._found(root), root):
            reader = reader or _reader(line)
            yield _clustered(reader(line), line)

    def _found(self, root: str) -> str:
        """The file, from here or from the data root. Raises InputError."""
        here, there = storage.absolute(self.uri), storage.join(root, self.uri)
        if any(mark in self.uri for mark in "*?[{") or "://" in self.uri:
            return here
        if not storage.exists(here) and not storage.exists(there):
            raise InputError(f"task {self.uri}: there is no file {here}, nor {there}")
        return here if storage.exists(here) else there

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Text, image and group credit of a pair; accuracy of a choice or pick."""
        return _kind(example).credits(example, scores)

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """All at once."""
        return _kind(examples[0]).credits_each(examples, golds, scores)

    def chance(self, example: Example) -> dict[str, float]:
        """Of continuous random scores."""
        return _kind(example).chance(example)

    def chance_each(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """All at once."""
        return _kind(examples[0]).chance_each(examples) if examples else {}

    def contests(self, example: Example) -> list[Contest]:
        """Those of a pair, or of the right candidate."""
        return _kind(example).contests(example)

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """As credits."""
        return _kind(example).raced_credits(example, standings)


def _kind(example: Example) -> Task:
    return PAIR_TASK if example.direction == "both" else CANDIDATE_TASK


def _reader(line: Line) -> Callable[[Line], Example]:
    """What reads the lines of a file, by the fields of its first one. Raises InputError."""
    fitting = [fields for fields in READERS if set(fields) <= set(line.fields)]
    if len(fitting) == 1:
        return READERS[fitting[0]]
    near = max(READERS, key=lambda fields: len(set(fields) & set(line.fields)))
    lacking = [name for name in near if name not in line.fields]
    if fitting or len(lacking) == len(near):
        told = "; or ".join(", ".join(fields) for fields in READERS)
        there = ", ".join(map(str, line.fields))[:200]
        raise InputError(
            f"{line.where}: its fields must be {told}, and {TAG} if you like; it has {there}"
        )
    raise line.wrong(
        lacking[0], f"which goes with {', '.join(n for n in near if n not in lacking)}"
    )


def is_own_file(name: str) -> bool:
    """Whether the name of a task is that of a file."""
    return is_table(name) or is_webdataset(name)


@functools.cache
def own_file(uri: str) -> type[OwnFile]:
    """The task that reads a file; it is named after it."""
    stem = storage.name(uri).rpartition(".")[0]
    name = re.sub(r"[^\w.-]+", "_", stem).strip("._") or "own"
    return type("OwnFile", (OwnFile,), {"name": name, "uri": uri, "__doc__": OwnFile.__doc__})
