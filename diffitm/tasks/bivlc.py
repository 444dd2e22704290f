"""BiVLC (Miranda et al. 2024): SugarCrepe's captions with an image for the wrong one, too."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, pair_of

IMAGES, TEXTS = ("image", "negative_image"), ("caption", "negative_caption")


class BiVlc(PairTask):
    """data/test-*.parquet: 2,933 rows of image, caption, negative_caption, negative_image, type, subtype.

    `text` is the paper's I2T (either image picks its text), `image` its T2I, and `group` both; by type
    (add, replace, swap) and subtype (obj, att, rel).
    """

    name = "bivlc"
    published = 2933
    folder = "bivlc"
    source = "the Hub dataset imirandam/BiVLC (MIT)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a row."""
        for line in self.parquet_lines(root, "test"):
            groups = {"type": line.label("type"), "subtype": line.label("subtype")}
            yield pair_of(line, IMAGES, TEXTS, groups)
