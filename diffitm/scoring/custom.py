"""Scorers by name: ours beside diffusion and CLIP, an installed package's, the user's own."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffitm.core.errors import InputError, suggest
from diffitm.core.registry import load
from diffitm.core.schema import PairRow
from diffitm.core.storage import without_query
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.scorer import RowScorer, Scorer, similarity_lines

ENTRY_POINTS = "diffitm.scorers"
VERSION = 1  # grows when the same settings would give other scores
SCORERS = {"vqa": "diffitm.scoring.vqa:Vqa", "itm": "diffitm.scoring.itm:Itm"}
_OWN = re.compile(r"(?P<place>(?:.+\.py|\w+(?:\.\w+)*):\w+)(?::(?P<argument>.+))?")


@dataclass(frozen=True)
class CustomSource:
    """A scorer's `name` as typed, where its class is, and the argument that the name gives it."""

    name: str
    place: str
    argument: str | None
    score: str  # kind of score
    digest: str  # what its scores depend on beside the images and texts

    @property
    def file(self) -> str | None:
        """The file that the class is in, where the user named one."""
        file = self.place.rpartition(":")[0]
        return file if file.endswith(".py") else None

    def make(self, device: str) -> Scorer:
        """Raises InputError where it cannot be made."""
        return _make(_load(self.name, self.place), self.name, self.argument, device)


def find_scorer(name: str) -> CustomSource:
    """A scorer by name: `name` or `name:argument` of ours or of an installed package ('diffitm.scorers'
    entry point), or the user's own as 'folder/file.py:Class' or 'package.module:Class', with ':argument'
    behind it where the class takes one.

    Raises InputError if there is none, or it is not a scorer.
    """
    table = SCORERS | {e.name: e.value for e in entry_points(group=ENTRY_POINTS)}
    short, _, rest = name.partition(":")
    match = _OWN.fullmatch(name)
    if short in table:
        place, argument = table[short], rest or None
    elif match:
        place, argument = match["place"], match["argument"]
        if (file := place.rpartition(":")[0]).endswith(".py"):
            place = f"{Path(file).expanduser().absolute()}:{place.rpartition(':')[2]}"
    else:
        raise InputError(f"{name!r} is unknown{suggest(short, table)}", "scorer")
    kind = _load(name, place)
    identity = getattr(kind, "identity", None)
    try:
        own = {} if identity is None else identity(argument)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name!r}: its argument {argument!r}: {error}", "scorer") from error
    digest = {"version": kind.version, "argument": argument, **own}
    return CustomSource(name, place, argument, kind.score, repr(sorted(digest.items())))


def is_own(name: str) -> bool:
    """Whether a name can only be that of a scorer: of a known one, or of a file of Python."""
    table = SCORERS | {e.name: e.value for e in entry_points(group=ENTRY_POINTS)}
    match = _OWN.fullmatch(name)
    is_file = match is not None and match["place"].rpartition(":")[0].endswith(".py")
    return name.partition(":")[0] in table or is_file


def _load(name: str, place: str) -> Any:
    try:
        kind = load(place)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(f"{name!r} cannot be imported: {error}", "scorer") from error
    lacking = [
        f"{attribute} ({wanted.__name__})"
        for attribute, wanted in (("version", int), ("score", str))
        if not isinstance(getattr(kind, attribute, None), wanted)
    ]
    if lacking:
        text = f"{name!r}: its class has no {' and no '.join(lacking)}; see diffitm.Scorer"
        raise InputError(text, "scorer")
    if not (isinstance(kind, type) and callable(getattr(kind, "__call__", None))):  # noqa: B004
        raise InputError(f"{name!r}: is no class with __call__(images, texts)", "scorer")
    return kind


def _make(kind: Callable[..., Any], name: str, argument: str | None, device: str) -> Scorer:
    try:
        made: Scorer = kind(device=device) if argument is None else kind(argument, device=device)
        return made
    except TypeError as error:
        how = "with an argument behind the name" if argument is None else "without the argument"
        text = f"{name!r} cannot be made: {error}; perhaps {how}"
        raise InputError(text, "scorer") from error


@dataclass(frozen=True)
class CustomSpec:
    """A scorer by name on the images below `root`."""

    source: CustomSource
    root: str
    cost = 1
    image_cost = 0

    @property
    def label(self) -> str:
        """The scorer's name in tables."""
        return self.source.name

    def store_config(self) -> dict[str, Any]:
        """Everything that a score depends on."""
        return {
            "kind": "scorer",
            "version": VERSION,
            "score": self.source.score,
            "scorer": self.source.place.rpartition("/")[2],
            "depends": self.source.digest,
            "root": without_query(self.root),
        }

    def build(self, device: str) -> RowScorer:
        """Make it on this machine."""
        return CustomScorer(self.source.make(device), self.source.name, self.root)


class CustomScorer(RowScorer):
    """Calls a scorer with the images that have the same texts, at most `batch_size` at once."""

    def __init__(self, scorer: Scorer, name: str, root: str, batch_size: int = 16) -> None:
        self.scorer, self.name, self.root, self.batch_size = scorer, name, root, batch_size

    @property
    def at_once(self) -> int:
        return self.batch_size

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def score_loaded(
        self, rows: Sequence[PairRow], loaded: Iterable[Sequence[Loaded]]
    ) -> list[dict[str, Any]]:
        """One score a pair; one that is not finite is a failure of its pair."""
        lines, left = list[dict[str, Any]](), iter(rows)
        for some in loaded:
            lines += self._lines(list(itertools.islice(left, len(some))), some)
        return lines

    def _lines(self, rows: Sequence[PairRow], loaded: Sequence[Loaded]) -> list[dict[str, Any]]:
        values: list[np.ndarray | None] = [None] * len(rows)
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, (row, item) in enumerate(zip(rows, loaded, strict=True)):
            if item.failure is None:
                groups.setdefault(tuple(row.texts), []).append(number)
        for texts, numbers in groups.items():
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                scores = self._ask([loaded[number].value for number in part], texts)
                for number, line in zip(part, scores, strict=True):
                    values[number] = line
        lines = similarity_lines(rows, loaded, values)
        for line in lines:
            if line["similarity"] is not None and not np.isfinite(line["similarity"]):
                line["failure"] = f"the scorer gave {line['similarity']}"
                line["similarity"] = None
        return lines

    def _ask(self, images: list[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """float32 [images, texts]. Raises InputError for anything else."""
        found = self.scorer(images, list(texts))
        found = found.detach().cpu() if hasattr(found, "detach") else found
        try:
            scores = np.asarray(found, np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"{self.name!r} gave {found!r:.80}: {error}", "scorer") from error
        wanted = (len(images), len(texts))
        if scores.shape != wanted:
            text = (
                f"{self.name!r} gave scores of shape {scores.shape} for {wanted} images and texts"
            )
            raise InputError(text, "scorer")
        return scores
