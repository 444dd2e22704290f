"""COLA (Ray et al. 2023): two images whose things have each other's attributes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diffitm.core.schema import Contest, Example
from diffitm.metrics.credit import Credit, Credits, winoground_chance, winogrounds
from diffitm.tasks.base import PairTask, pictures

FIELDS = ("url 1", "caption 1", "url 2", "caption 2")
FILE = "data/COLA_multiobjects_matching_benchmark.json"
# Published is the image side; the others are Winoground's of the same scores.
NAMES = {"image": "image", "text": "text (ours)", "group": "group (ours)"}


class Cola(PairTask):
    """The multi-object part, data/COLA_multiobjects_matching_benchmark.json: 210 lists of url 1, caption 1,
    url 2, caption 2; images/<last part of the url>.

    `image` is the published metric: either caption picks its image (chance 25).
    """

    name = "cola"
    published = 210
    folder = "cola"
    source = "arijitray1993/COLA (MIT); images of Visual Genome and GQA by their addresses"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry."""
        images = pictures(root, f"{self.folder}/images")
        for line in self.lines(root, FILE, FIELDS):
            files = [line.text(name).rpartition("/")[2] for name in FIELDS[::2]]
            for name, file in zip(FIELDS[::2], files, strict=True):
                if not file:
                    raise line.wrong(name, "the address of an image")
            first, second = (f"{images}/{file}" for file in files)
            texts = line.text(FIELDS[1]), line.text(FIELDS[3])
            yield Example(line.key, (first, second), texts, "both", cluster=first)

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Image credit, and ours of text and group."""
        return _named(super().credits(example, scores))

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """All at once."""
        found = winogrounds(scores)
        return {shown: found[name] for name, shown in NAMES.items()}

    def contests(self, example: Example) -> list[Contest]:
        """Winoground's."""
        return self.pair_contests()

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """As credits."""
        return _named(super().raced_credits(example, standings))

    def chance(self, example: Example) -> dict[str, float]:
        """Of continuous random scores."""
        found = winoground_chance()
        return {shown: found[name] for name, shown in NAMES.items()}


def _named(found: dict[str, Credit]) -> dict[str, Credit]:
    return {shown: found[name] for name, shown in NAMES.items()}
