"""Flickr30K retrieval among the ten candidates that a CLIP picked, the right one first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from diffitm import storage
from diffitm.errors import InputError
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure
from diffitm.metrics.variance import NAMES, shares
from diffitm.schema import Example
from diffitm.tasks.base import RetrievalTask, is_strings

# The published run scores every fifth caption: the first of each image's five.
EVERY = 5
AS_RETRIEVED = " as retrieved"


class Candidates(RetrievalTask):
    """A published list {query: [candidates, the right one first]}.

    The .info.json that candidates.py writes beside a list tells for which queries the right answer
    was put in; then each recall is also reported 'as retrieved', where such a query is lost.
    """

    folder = "flickr30k"
    source = "the GDBench authors' lists; images on request from Flickr30K's authors"
    recalls: ClassVar[dict[str, int]] = {"R@1": 1, "R@5": 5}
    file: ClassVar[str]

    def lists(self, root: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Query, candidates, and whether the right one was retrieved or inserted, if that is known."""
        entries = self.read_json(root, self.file)
        if not isinstance(entries, dict):
            raise self.malformed(root, self.file, entries, "{query: [candidate, ...]}")
        inserted = self._inserted(root)
        for query, candidates in entries.items():
            if not is_strings(candidates):
                raise self.malformed(root, self.file, {query: candidates}, "a list of strings")
            known = inserted is not None
            groups = {"gold": "inserted" if query in (inserted or ()) else "retrieved"}
            yield query, candidates, groups if known else {}

    def _inserted(self, root: str) -> set[str] | None:
        """The queries whose right answer was put in, None if the list's origin is not told."""
        name = self.file.removesuffix(".json") + ".info.json"
        path = storage.join(root, self.folder, name)
        if not storage.exists(path):
            return None
        try:
            return set(json.loads(storage.read_text(path))["inserted"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: expects an 'inserted' list of queries: {error}") from error

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Recalls; as retrieved, a query whose right answer was put in is lost."""
        found = super().credits(example, scores)
        if "gold" not in example.groups:
            return found
        lost = example.groups["gold"] == "inserted"
        return found | {
            name + AS_RETRIEVED: Credit(0.0, finite=credit.finite) if lost else credit
            for name, credit in found.items()
        }

    def chance(self, example: Example) -> dict[str, float]:
        """k of n candidates."""
        found = super().chance(example)
        if "gold" not in example.groups:
            return found
        reached = example.groups["gold"] == "retrieved"
        return found | {name + AS_RETRIEVED: value * reached for name, value in found.items()}


def _below_root(path: str) -> str:
    """The published paths start with the authors' folder 'datasets/'."""
    return path.removeprefix("datasets/")


class Flickr30kImage(Candidates):
    """val_top10_RN50x64.json: {caption: [10 image paths]}."""

    name = "flickr30k"
    file = "val_top10_RN50x64.json"

    def examples(self, root: str) -> Iterator[Example]:
        """One caption against ten images; captions of one image share a cluster."""
        for i, (caption, paths, groups) in enumerate(self.lists(root)):
            if i % EVERY == 0:
                images = tuple(_below_root(path) for path in paths)
                yield Example(str(i), images, (caption,), "image", 0, images[0], groups)


class Flickr30kText(Candidates):
    """val_top10_RN50x64_text.json: {image path: [10 captions]}."""

    name = "flickr30k_text"
    file = "val_top10_RN50x64_text.json"

    def examples(self, root: str) -> Iterator[Example]:
        """One image against ten captions."""
        for path, captions, groups in self.lists(root):
            image = _below_root(path)
            yield Example(path, (image,), tuple(captions), "text", 0, image, groups)


class Flickr30kVariance(Flickr30kImage):
    """The first captions and their right images, all with all: what the error's variance is due to.

    The paper's explanation of why naive image retrieval fails (Krojer et al. 2023, section 3.2).
    """

    name = "flickr30k_variance"
    graded: ClassVar[bool] = False
    size: ClassVar[int] = 24

    def examples(self, root: str) -> Iterator[Example]:
        """One example a pair, so that an unreadable image costs its own row of the matrix."""
        chosen: dict[str, str] = {}
        for example in super().examples(root):
            chosen.setdefault(example.images[0], example.texts[0])
            if len(chosen) == self.size:
                break
        for i, image in enumerate(chosen):
            for j, text in enumerate(chosen.values()):
                place = {"image": str(i), "text": str(j)}
                yield Example(f"{i}-{j}", (image,), (text,), "image", 0, image, place)

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """The score itself."""
        value = float(scores.squeeze())
        return {"score": Credit(value) if np.isfinite(value) else LOST}

    def chance(self, example: Example) -> dict[str, float]:
        """Nothing is guessed."""
        return {"score": 0.0}

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Shares of the variance, over the images that have every score."""
        matrix = _matrix(decisions)
        whole = matrix[np.isfinite(matrix).all(1)]
        blank = Figure("all", "", None, None, None, 0, None, 0, sum(d.failed for d in decisions))
        try:
            found = shares(whole)
        except ValueError:
            return [replace(blank, metric=f"var. {name}") for name in NAMES]
        return [
            replace(
                blank,
                metric=f"var. {name}",
                n=whole.size,
                value=s.value,
                low=s.low,
                high=s.high,
            )
            for name, s in found.items()
        ]


def _matrix(decisions: Sequence[Decision]) -> np.ndarray:
    """Scores [images, texts], NaN where there is none."""
    places = [(int(d.groups["image"]), int(d.groups["text"])) for d in decisions]
    matrix = np.full(tuple(np.max(places, axis=0) + 1), np.nan)
    for place, decision in zip(places, decisions, strict=True):
        if decision.credits is not None and decision.credits["score"].finite:
            matrix[place] = decision.credits["score"].value
    return matrix
