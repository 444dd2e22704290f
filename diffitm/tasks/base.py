"""What every task is: examples read from published files, and a credit for each decision."""

from __future__ import annotations

import functools
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from diffitm.captions.lines import Line, read_lines
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Contest, Example
from diffitm.core.zip_file import zip_members
from diffitm.metrics.credit import (
    Credit,
    Credits,
    raced_winoground,
    recall,
    recall_chance,
    recalls,
    together,
    winoground,
    winoground_chance,
    winogrounds,
)
from diffitm.metrics.figures import Decision, Figure, macro, means
from diffitm.tasks.csv_files import csv_rows, csv_table


class Task(ABC):
    """A benchmark. `version` grows whenever its examples or credits change.

    `folder` is where its files lie below the data root, `source` where they come from and what
    licence or login they need. `graded`: its credits are decisions, 1 for right and 0 for wrong.
    `published` is how many examples its authors tell of, where that is known. `right`: so many candidates,
    from the gold one on, are right; diagnostics and learned weights compare them with the others.
    """

    name: str
    folder: str
    source: str
    version = 1
    graded: ClassVar[bool] = True
    published: ClassVar[int | None] = None
    right: ClassVar[int] = 1

    @abstractmethod
    def examples(self, root: str) -> Iterator[Example]:
        """The examples in the published order. Raises InputError for missing or malformed files."""

    @abstractmethod
    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Metric name -> credit of one decision; `scores` is [images, texts], higher is better."""

    @abstractmethod
    def chance(self, example: Example) -> dict[str, float]:
        """Metric name -> expected credit of a constant or random scorer."""

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """`credits` of examples that have as many images and texts; `golds` [n] are theirs, scores are
        [n, images, texts]. What a task says of one example holds for each: others are only faster."""
        pairs = zip(examples, scores, strict=True)
        return together([self.credits(example, own) for example, own in pairs])

    def chance_each(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """`chance` of examples that have as many images and texts, NaN where one lacks a metric."""
        found = [self.chance(example) for example in examples]
        names = dict.fromkeys(name for chance in found for name in chance)
        return {name: np.array([c.get(name, np.nan) for c in found], float) for name in names}

    def _is_same(self, other: type[Any], *methods: str) -> bool:
        """Whether these methods are those of another class, so that what that one knows of them holds."""
        return all(getattr(type(self), name) is getattr(other, name) for name in methods)

    def _chance_of_all(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """`chance_each` where it depends on the numbers of images and texts alone."""
        found = self.chance(examples[0]) if examples else {}
        return {name: np.full(len(examples), value, float) for name, value in found.items()}

    def contests(self, example: Example) -> list[Contest]:
        """What a race must find out for the credits of an example; where it is nothing, all is scored.

        Pairs are numbered image by image, i * texts + j, and after them each image with the empty text,
        images * texts + i.
        """
        return []

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """The credits from the outcome of each contest: scores of its candidates that rank them as the race
        did."""
        raise NotImplementedError(f"task {self.name} has contests, but no raced_credits")

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """What the task reports: mean credits, of everything and by group, unless it says otherwise."""
        return means(decisions)

    def read_json(self, root: str, name: str) -> Any:
        """A JSON file of the task's folder. Raises InputError that names the file and its source."""
        return self.parse_json(root, name, self.read_text(root, name))

    def parse_json(self, root: str, name: str, text: str) -> Any:
        """The content of a JSON file that was read. Raises InputError that names the file."""
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{storage.join(root, self.folder, name)}: not JSON: {error}"
            ) from error

    def lines(self, root: str, name: str, columns: Sequence[str] = ()) -> Iterator[Line]:
        """The lines of a file of the task's folder, as read_lines gives them. Raises InputError."""
        path = storage.join(root, self.folder, name)
        if not storage.exists(path):
            raise InputError(f"task {self.name} needs {path} (from {self.source})")
        return read_lines(path, root, columns)

    def parquet_lines(self, root: str, split: str) -> Iterator[Line]:
        """The lines of a split as the Hub has it: data/<split>-*.parquet, or without data/. Raises
        InputError."""
        folders = [storage.join(root, self.folder, "data"), storage.join(root, self.folder)]
        for folder in folders:
            names = [storage.name(path) for path in storage.files(folder, ".parquet")]
            if kept := [name for name in names if name.startswith(f"{split}-")]:
                files = (read_lines(storage.join(folder, name), root) for name in kept)
                for number, line in enumerate(itertools.chain.from_iterable(files)):
                    yield replace(line, key=str(number))  # each file counts from 0
                return
        wanted = f"{folders[0]}/{split}-*.parquet"
        raise InputError(f"task {self.name} needs {wanted} (from {self.source})")

    def read_rows(self, root: str, name: str) -> list[list[str]]:
        """The rows of a CSV file that are not empty, its header too. Raises InputError."""
        where = storage.join(root, self.folder, name)
        return csv_rows(self.read_text(root, name), where)

    def read_table(self, root: str, name: str, delimiter: str = ",") -> list[dict[str, str]]:
        """The rows below a CSV file's header, by column. Raises InputError."""
        where = storage.join(root, self.folder, name)
        malformed = functools.partial(self.malformed, root, name)
        return csv_table(self.read_text(root, name), where, malformed, delimiter)

    def read_text(self, root: str, name: str) -> str:
        """A text file of the task's folder. Raises InputError that names the file and its source."""
        path = storage.join(root, self.folder, name)
        try:
            return storage.read_text(path)
        except FileNotFoundError:
            raise InputError(f"task {self.name} needs {path} (from {self.source})") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"task {self.name} cannot read {path}: {error}") from error

    def malformed(self, root: str, name: str, entry: Any, expected: str) -> InputError:
        """The error for an entry of another form than the published one."""
        shown = json.dumps(entry, default=str)[:120]
        where = storage.join(root, self.folder, name)
        return InputError(f"{where}: task {self.name} expects {expected}, found {shown}")


class RetrievalTask(Task):
    """One gold candidate among several images or several texts."""

    recalls: ClassVar[dict[str, int]] = {"accuracy": 1}

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Recall at each k over the candidates."""
        return self.raced_credits(example, [scores.ravel()] * len(self.recalls))

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """All at once, unless a task has credits of its own."""
        if not self._is_same(RetrievalTask, "credits", "raced_credits"):
            return super().credits_each(examples, golds, scores)
        flat = scores.reshape(len(scores), -1)
        return {name: recalls(flat, golds, k) for name, k in self.recalls.items()}

    def chance_each(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """All at once, unless a task has its own."""
        same = self._is_same(RetrievalTask, "chance")
        return self._chance_of_all(examples) if same else super().chance_each(examples)

    def contests(self, example: Example) -> list[Contest]:
        """Whether the right one is among the first k, for each k; a task with credits of its own has none."""
        if not self.graded or type(self).credits is not RetrievalTask.credits:
            return []
        pairs = list(range(len(example.images) * len(example.texts)))
        bases = [len(pairs) + pair // len(example.texts) for pair in pairs]
        used = bases if example.needs_unconditional else []
        return [Contest(pairs, k, used, example.gold) for k in self.recalls.values()]

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """Recall at each k."""
        ranked = zip(self.recalls.items(), standings, strict=True)
        return {name: recall(scores, example.gold, k) for (name, k), scores in ranked}

    def chance(self, example: Example) -> dict[str, float]:
        """k of n candidates."""
        count = len(example.images) * len(example.texts)
        return {name: recall_chance(count, k) for name, k in self.recalls.items()}


class PairTask(Task):
    """Two images and two texts, image i with text i: Winoground's metrics."""

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Text, image and group credit."""
        return winoground(scores)

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """All at once, unless a task has credits of its own."""
        if not self._is_same(PairTask, "credits"):
            return super().credits_each(examples, golds, scores)
        return winogrounds(scores)

    def chance_each(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """All at once, unless a task has its own."""
        same = self._is_same(PairTask, "chance")
        return self._chance_of_all(examples) if same else super().chance_each(examples)

    def contests(self, example: Example) -> list[Contest]:
        """Both texts of either image, and both images of either text; a task with credits of its own has
        none."""
        return self.pair_contests() if type(self).credits is PairTask.credits else []

    @staticmethod
    def pair_contests() -> list[Contest]:
        """Those of two images and two texts."""
        return [*(Contest([2 * i, 2 * i + 1], 1) for i in (0, 1)), *image_contests()]

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """Text, image and group credit."""
        return raced_winoground(standings[:2], standings[2:])

    def chance(self, example: Example) -> dict[str, float]:
        """Of continuous random scores."""
        return winoground_chance()


def image_contests() -> list[Contest]:
    """Of two images and two texts: both images of either text, by what the text explains."""
    return [Contest([j, 2 + j], 1, [4, 5]) for j in (0, 1)]


def pair_of(
    line: Line,
    images: tuple[str, str],
    texts: tuple[str, str],
    groups: dict[str, str] | None = None,
    folder: str = "",
) -> Example:
    """The example of a line with two images and their texts in these fields. Raises InputError."""
    first, second = (line.image(name, folder) for name in images)
    said = tuple(line.text(name) for name in texts)
    return Example(line.key, (first, second), said, "both", cluster=first, groups=groups or {})


def with_macro(decisions: Sequence[Decision], key: str) -> list[Figure]:
    """The accuracy over all, the mean of the parts' accuracies, and each group's."""
    whole, *groups = means(decisions)
    kept = {decision.groups[key] for decision in decisions}
    return [whole, macro(decisions, "accuracy", key, kept), *groups]


def pictures(root: str, folder: str) -> str:
    """Where the images of a folder lie below the data root: in it or, where it is not there, in the zip of
    its name, which may have that folder inside. Raises InputError for a broken zip."""
    archive = storage.join(root, f"{folder}.zip")
    if storage.exists(storage.join(root, folder)) or not storage.exists(archive):
        return folder
    last = folder.rpartition("/")[2]
    try:
        names = zip_members(archive)
    except (OSError, ValueError) as error:
        raise InputError(f"{archive} cannot be read: {error}") from error
    inside = any(name.startswith(f"{last}/") for name in names)
    return f"{folder}.zip/{last}" if inside else f"{folder}.zip"


def entry(line: Any, **kinds: type | tuple[type, ...]) -> list[Any] | None:
    """The named fields of a line, None if one is missing or of another kind."""
    if not isinstance(line, dict):
        return None
    found = [line.get(name) for name in kinds]
    fits = all(isinstance(v, kind) for v, kind in zip(found, kinds.values(), strict=True))
    return found if fits else None


def is_strings(value: Any, length: int | None = None) -> bool:
    """Whether the value is a list of strings (of this length)."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        return False
    return len(value) == length if length is not None else len(value) > 0
