"""SPEC (Peng et al. 2024): size, position, existence and count, from images to texts and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffitm.core.schema import Example
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.base import RetrievalTask, with_macro

PARTS = (
    *("absolute_size", "relative_size", "absolute_spatial", "relative_spatial"),
    *("existence", "count"),
)


class SpecText(RetrievalTask):
    """data/<part>/image2text.json: [{query: image, keys: [text, ..], label}], paths relative to the part.

    Accuracy over all, the mean of the six parts (`macro`), and by part.
    """

    name = "spec_i2t"
    folder = "spec"
    source = "data.zip of the Hub dataset wjpoom/SPEC (its licence is not stated)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry."""
        for part in PARTS:
            for line in self.lines(root, f"data/{part}/image2text.json"):
                image, texts = line.image("query", f"{self.folder}/data/{part}"), line.texts("keys")
                right = line.number("label", len(texts))
                yield Example(
                    f"{part}/{line.key}", (image,), texts, "text", right, image, {"part": part}
                )

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, the mean of the parts, and each part's."""
        return with_macro(decisions, "part")


class SpecImage(SpecText):
    """data/<part>/text2image.json: [{query: text, keys: [image, ..], label}]."""

    name = "spec_t2i"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry."""
        for part in PARTS:
            for line in self.lines(root, f"data/{part}/text2image.json"):
                images = line.images("keys", f"{self.folder}/data/{part}")
                right, text = line.number("label", len(images)), line.text("query")
                groups = {"part": part}
                yield Example(
                    f"{part}/{line.key}", images, (text,), "image", right, images[right], groups
                )
