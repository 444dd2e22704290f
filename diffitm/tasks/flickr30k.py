"""Flickr30K retrieval among the ten candidates that a CLIP picked, the right one first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure
from diffitm.metrics.variance import NAMES, shares
from diffitm.tasks.base import RetrievalTask, is_strings

# The published run scores every fifth caption: the first of each image's five.
EVERY = 5
AS_RETRIEVED, WHERE_RETRIEVED = " as retrieved", " where retrieved"
ONLY_RETRIEVED = "only retrieved"  # the list leaves out queries whose right answer was not found


class Candidates(RetrievalTask):
    """A published list {query: [candidates, the right one first]}.

    The .info.json that candidates.py writes beside a list tells for which queries the right answer
    was put in; then each recall is also reported 'as retrieved', where such a query is lost. Of a
    list that leaves such queries out, the recalls are those 'where retrieved'.
    """

    folder = "flickr30k"
    source = "the GDBench authors' lists; images on request from Flickr30K's authors"
    recalls: ClassVar[dict[str, int]] = {"R@1": 1, "R@5": 5}
    file: ClassVar[str]

    def lists(self, root: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
        """Query, candidates, and how the right one got among them, if that is known."""
        text = self.read_text(root, self.file)
        entries = self.parse_json(root, self.file, text)
        if not isinstance(entries, dict):
            raise self.malformed(root, self.file, entries, "{query: [candidate, ...]}")
        info = self.info(root, hashlib.sha256(text.encode()).hexdigest())
        inserted = set(info["inserted"]) if info else set()
        for query, candidates in entries.items():
            if not is_strings(candidates) or len(candidates) < 2:
                wanted = "a list of strings, two or more"
                raise self.malformed(root, self.file, {query: candidates}, wanted)
            how = "inserted" if query in inserted else "retrieved"
            if info and not info.get("gold_inserted", True):
                how = ONLY_RETRIEVED
            yield query, candidates, {"gold": how} if info else {}

    def info(self, root: str, digest: str) -> dict[str, Any] | None:
        """What candidates.py tells of the list with this sha256, None of a published one."""
        path = storage.join(root, self.folder, self.file.removesuffix(".json") + ".info.json")
        if not storage.exists(path):
            return None
        wanted = f"{path}: expects an 'inserted' list of queries"
        try:
            found = json.loads(storage.read_text(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{wanted}, but is not JSON: {error}") from error
        inserted = found.get("inserted") if isinstance(found, dict) else None
        if inserted != [] and not is_strings(inserted):
            raise InputError(f"{wanted}, found {json.dumps(inserted)[:120]}")
        if found.get("sha256") != digest:
            raise InputError(f"{path} belongs to another list than {self.file}: move it away")
        return dict(found)

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """Recalls; as retrieved, a query whose right answer was put in is lost."""
        found, how = super().raced_credits(example, standings), example.groups.get("gold")
        if how == ONLY_RETRIEVED:
            return {name + WHERE_RETRIEVED: credit for name, credit in found.items()}
        lost = {n + AS_RETRIEVED: Credit(0.0, finite=c.finite) for n, c in found.items()}
        same = {n + AS_RETRIEVED: c for n, c in found.items()}
        return found | {"inserted": lost, "retrieved": same, None: {}}[how]

    def chance(self, example: Example) -> dict[str, float]:
        """k of n candidates."""
        found, how = super().chance(example), example.groups.get("gold")
        if how == ONLY_RETRIEVED:
            return {name + WHERE_RETRIEVED: value for name, value in found.items()}
        if how is None:
            return found
        return found | {n + AS_RETRIEVED: v * (how == "retrieved") for n, v in found.items()}


def _below_root(path: str) -> str:
    """The published paths start with the authors' folder 'datasets/'."""
    return path.removeprefix("datasets/")


class Flickr30kImage(Candidates):
    """val_top10_RN50x64.json: {caption: [10 image paths]}."""

    name = "flickr30k"
    file = "val_top10_RN50x64.json"

    def examples(self, root: str) -> Iterator[Example]:
        """One caption against ten images, every fifth of the file: the first of each image's. In a
        list of ours, the first caption of each right image; all of them where queries were left
        out, since the first that was retrieved is an easier one."""
        seen: set[str] = set()
        for i, (caption, paths, groups) in enumerate(self.lists(root)):
            first = paths[0] not in seen or groups.get("gold") == ONLY_RETRIEVED
            if first if groups else i % EVERY == 0:
                seen.add(paths[0])
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
