"""VisMin (Awal et al. 2024): two images with a minimal change between them, and their captions."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, pair_of

CATEGORIES = ("object", "attribute", "relation", "counting")
IMAGES, TEXTS = ("image_0", "image_1"), ("text_0", "text_1")


class VisMin(PairTask):
    """data/test-*.parquet: 2,084 rows of image_0, image_1, text_0, text_1, id, category.

    Text, image and group score over all and by category: object, attribute, relation, counting.
    """

    name = "vismin"
    published = 2084
    folder = "vismin"
    source = "the Hub dataset mair-lab/vismin-bench (CC BY 4.0)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a row."""
        for line in self.parquet_lines(root, "test"):
            yield pair_of(line, IMAGES, TEXTS, {"category": line.one_of("category", CATEGORIES)})
