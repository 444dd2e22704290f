"""ColorSwap (Burapacheep et al. 2024): two captions of the same words whose colours are swapped."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core import storage
from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, pair_of, pictures

FILE, SPLIT = "data/test.json", "test"
IMAGES, TEXTS = ("image_1", "image_2"), ("caption_1", "caption_2")


class ColorSwap(PairTask):
    """The test split, 300 entries: data/test.json with data/images or data/images.zip (the authors' drive),
    or data/test-*.parquet with the images inside (the Hub).

    Fields id, caption_1, caption_2, image_1, image_2, image_source, caption_source; caption_1 is of image_1.
    """

    name = "colorswap"
    published = 300
    folder = "colorswap"
    source = "Top34051/colorswap (MIT); the Hub's copy, stanfordnlp/colorswap, asks for a login"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry, by what made its images."""
        if storage.exists(storage.join(root, self.folder, FILE)):
            lines, images = self.lines(root, FILE), pictures(root, f"{self.folder}/data/images")
            below = images.removesuffix("/images")  # a path is images/<name>
        else:
            lines, below = self.parquet_lines(root, SPLIT), ""
        for line in lines:
            yield pair_of(line, IMAGES, TEXTS, {"image_source": line.label("image_source")}, below)
