"""SugarCrepe++ (Dumpala et al. 2024): two captions of one meaning, and a wrong one that is nearer to the
first in its words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diffitm.core.schema import Contest, Example
from diffitm.metrics.credit import LOST, Credit, recall
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.base import RetrievalTask, pictures, with_macro
from diffitm.tasks.sugarcrepe import IMAGES

PARTS = tuple("replace_att replace_obj replace_rel swap_att swap_obj".split())
TEXTS = ("caption", "caption2", "negative_caption")
WRONG = 2  # the place of the wrong one


class SugarCrepePp(RetrievalTask):
    """data/<part>.json: [{id, filename, caption, caption2, negative_caption}]; images below coco/val2017.

    Right if both captions are above the wrong one (the paper's ITT, chance 1/3), over all 4,757 and by part.
    Its text-only half (TOT) compares texts and is not measured here.
    """

    name = "sugarcrepe_pp"
    published = 4757
    folder = "sugarcrepe_pp"
    source = "Sri-Harsha/scpp (CC BY 4.0); COCO's val2017 images"
    right = 2

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry; those of an image are a cluster."""
        images = pictures(root, IMAGES)
        for part in PARTS:
            for line in self.lines(root, f"data/{part}.json"):
                image = line.image("filename", images)
                texts = tuple(line.text(name) for name in TEXTS)
                groups = {"part": part}
                yield Example(f"{part}/{line.key}", (image,), texts, "text", 0, image, groups)

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """Whether the wrong one is the last; of equal scores the share of orders."""
        return self.raced_credits(example, [scores.ravel()])

    def contests(self, example: Example) -> list[Contest]:
        """Whether the wrong one is among the first two."""
        return [Contest([0, 1, WRONG], self.right, about=WRONG)]

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """As credits."""
        found = recall(standings[0], WRONG, self.right)
        return {"accuracy": found._replace(value=1 - found.value) if found.finite else LOST}

    def chance(self, example: Example) -> dict[str, float]:
        """One order of three."""
        return {"accuracy": 1 / len(TEXTS)}

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, the mean of the parts, and each part's."""
        return with_macro(decisions, "part")
