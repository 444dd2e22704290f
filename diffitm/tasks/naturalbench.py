"""NaturalBench-Retrieval (Li et al. 2024): natural images that matchers confuse, in pairs."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, pair_of, pictures

IMAGES, TEXTS = ("image_0", "image_1"), ("caption_0", "caption_1")


class NaturalBench(PairTask):
    """metadata.json: [{index, image_0, image_1, caption_0, caption_1}], with images/.

    The retrieval set, not NaturalBench itself, which asks questions.
    """

    name = "naturalbench"
    folder = "NaturalBench-Retrieval"
    source = "NaturalBench-Retrieval.zip of the Hub dataset BaiqiL/NaturalBench (Apache-2.0)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry."""
        images = pictures(root, f"{self.folder}/images")
        for line in self.lines(root, "metadata.json"):
            within = line.image("image_0").startswith("images/")
            folder = images.removesuffix("/images") if within else images
            yield pair_of(line, IMAGES, TEXTS, folder=folder)
