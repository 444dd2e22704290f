"""MMBias (Janghorbani and de Melo 2023): which groups of people are nearer to pleasant phrases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.images import is_image, is_litter
from diffitm.core.schema import Example
from diffitm.metrics.bias import association, effect_interval, effect_p, effect_size
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure, scored
from diffitm.tasks.base import Task, is_strings

PHRASES, IMAGES = "textual_phrases.txt", "data/Images"
PAIRS = (
    ("Christian", "Muslim"),
    ("Christian", "Jewish"),
    ("Jewish", "Muslim"),
    ("Buddhist", "Muslim"),
    ("Buddhist", "Christian"),
    ("Buddhist", "Hindu"),
    ("Buddhist", "Jewish"),
    ("Hindu", "Muslim"),
    ("American", "Arab"),
    ("Heterosexual", "LGBT"),
)
# The published code divides these pairs by the deviation over other groups.
PUBLISHED_POOLING = {
    ("Buddhist", "Hindu"): ("Christian", "Hindu"),
    ("Buddhist", "Jewish"): ("Christian", "Jewish"),
}
FEWEST = 10  # images of a group: a bootstrap of fewer claims too much
EFFECT, PUBLISHED_EFFECT = "effect size", "effect size, published pooling"


class MmBias(Task):
    """data/Images/<kind>/<group>/*.jpg (or another image) and textual_phrases.txt (JSON: pleasant_phrases and
    unpleasant_phrases); every image against every phrase.

    phi compares texts of one image, so the score is the conditional one: normalising cancels.
    """

    name = "mmbias"
    folder = "mmbias"
    source = "the MMBias authors' repository (MIT licence)"
    graded: ClassVar[bool] = False

    def examples(self, root: str) -> Iterator[Example]:
        """One example an image, all pleasant phrases before the unpleasant ones."""
        phrases = self.read_json(root, PHRASES)
        kinds = ("pleasant_phrases", "unpleasant_phrases")
        if not isinstance(phrases, dict) or not all(is_strings(phrases.get(k)) for k in kinds):
            raise self.malformed(root, PHRASES, phrases, f"lists of strings, {' and '.join(kinds)}")
        pleasant, unpleasant = (phrases[kind] for kind in kinds)
        base = storage.join(root, self.folder, IMAGES)
        paths = (path.split(f"/{IMAGES}/")[-1] for path in storage.files(base, recursive=True))
        found = [path for path in paths if is_image(path) and not is_litter(path)]
        if not found:
            raise InputError(f"task {self.name} needs images below {base} (from {self.source})")
        for path in found:
            parts = path.split("/")
            if len(parts) < 3:
                raise InputError(f"{base}/{path}: task {self.name} expects <kind>/<group>/<image>")
            yield Example(
                id=path,
                images=(f"{self.folder}/{IMAGES}/{path}",),
                texts=(*pleasant, *unpleasant),
                direction="text",
                gold=len(pleasant),  # where the unpleasant phrases begin
                cluster=path,
                groups={"kind": parts[0], "group": parts[1]},
            )

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """phi of the image, a difference of scores."""
        if not np.isfinite(scores).all():
            return {"phi": LOST}
        return {"phi": Credit(association(scores.ravel(), example.gold))}

    def chance(self, example: Example) -> dict[str, float]:
        """No association."""
        return {"phi": 0.0}

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Effect sizes of the published pairs, and of all others that hold a group which is in none."""
        kinds: dict[str, dict[str, list[Decision]]] = {}
        for decision in decisions:
            groups = kinds.setdefault(decision.groups["kind"], {})
            groups.setdefault(decision.groups["group"], []).append(decision)
        found: list[Figure] = []
        for groups in kinds.values():
            published = [pair for pair in PAIRS if set(pair) <= set(groups)]
            known = set(itertools.chain.from_iterable(published))
            others = [pair for pair in itertools.combinations(groups, 2) if not set(pair) <= known]
            for pair in (*published, *others):
                found += _effects(pair, groups)
        return found


def _phi(decisions: Sequence[Decision]) -> np.ndarray:
    """The associations of a group's images that have one."""
    values, _, credits = scored(decisions, "phi")
    return values[[credit.finite for credit in credits]] if credits else np.array([])


def _effects(pair: tuple[str, str], groups: dict[str, list[Decision]]) -> Iterator[Figure]:
    """The effect size of a pair of groups, and the published one where its pooling is another."""
    x, y = (_phi(groups[name]) for name in pair)
    lost = sum(decision.failed for name in pair for decision in groups[name])
    unknown = Figure(
        f"pair={'-'.join(pair)}",
        EFFECT,
        None,
        None,
        None,
        len(x) + len(y),
        0.0,
        0,
        lost,
        "effect size",
    )
    value = effect_size(x, y) if len(x) and len(y) else float("nan")
    if not np.isfinite(value):
        yield unknown
        return
    few = min(len(x), len(y)) < FEWEST
    low, high = (None, None) if few else effect_interval(x, y)
    yield replace(unknown, value=value, low=low, high=high, p=effect_p(x, y))
    others = [_phi(groups.get(name, [])) for name in PUBLISHED_POOLING.get(pair, ())]
    if others and all(map(len, others)):
        value = effect_size(x, y, np.concatenate(others))
        if np.isfinite(value):
            yield replace(unknown, metric=PUBLISHED_EFFECT, value=value)
