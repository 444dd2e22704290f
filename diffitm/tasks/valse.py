"""VALSE (Parcalabescu et al. 2022): a caption and a foil, by linguistic phenomenon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffitm.core.schema import Example
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.base import RetrievalTask, pictures, with_macro

COCO, VISUAL7W, SWIG = "coco/val2017", "visual7w/images", "swig/images_512"
# Piece -> where its images lie, below the data root.
PIECES = {
    "existence": VISUAL7W,
    "plurals": COCO,
    "counting-hard": VISUAL7W,
    "counting-small-quant": VISUAL7W,
    "counting-adversarial": VISUAL7W,
    "relations": COCO,
    "action-replacement": SWIG,
    "actant-swap": SWIG,
    "coreference-standard": "coco/train2014",
    "coreference-hard": "visdial/VisualDialog_val2018",
    "foil-it": "coco/val2014",
}
LEAST_VOTES = 2  # of three annotators for the caption alone


class Valse(RetrievalTask):
    """data/<piece>.json: {id: {image_file, caption, foil, mturk: {caption, ..}, ..}} of eleven pieces.

    The valid items alone, those with two votes or more of `mturk` for the caption; the accuracy is the
    paper's acc_r, caption above foil. The others of its metrics need a threshold, which an error has not.
    A coreference text is a dialogue that encoders of few tokens cut off: see what is told of cut texts.
    """

    name = "valse"
    published = 7702
    folder = "valse"
    source = "Heidelberg-NLP/VALSE (MIT); images of COCO, Visual7W, SWiG and VisDial"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a valid item; those of an image are a cluster."""
        for piece, folder in PIECES.items():
            images = pictures(root, folder)
            for line in self.lines(root, f"data/{piece}.json"):
                if line.within("mturk").number("caption") < LEAST_VOTES:
                    continue
                image = line.image("image_file", images)
                texts = line.text("caption"), line.text("foil")
                groups = {"piece": piece}
                yield Example(f"{piece}/{line.key}", (image,), texts, "text", 0, image, groups)

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, the mean of the pieces, and each piece's."""
        return with_macro(decisions, "piece")
