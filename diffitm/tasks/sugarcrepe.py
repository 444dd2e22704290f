"""SugarCrepe (Hsieh et al. 2023): a caption and a fluent one that is wrong by what was added, replaced or
swapped in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffitm.core.schema import Example
from diffitm.metrics.figures import Decision, Figure
from diffitm.tasks.base import RetrievalTask, pictures, with_macro

PARTS = tuple("add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj".split())
IMAGES = "coco/val2017"


class SugarCrepe(RetrievalTask):
    """data/<part>.json: {number: {filename, caption, negative_caption}}; images below coco/val2017.

    Accuracy over all 7,511, by part (692, 2,062, 788, 1,652, 1,406, 666 and 245), and by category as in the
    paper, over the examples of its parts. `macro` is the mean of the seven parts. Numbers may be left out,
    as 108 is of swap_obj.
    """

    name = "sugarcrepe"
    published = 7511
    folder = "sugarcrepe"
    source = "RAIVNLab/sugar-crepe (MIT); COCO's val2017 images"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry; those of an image are a cluster."""
        images = pictures(root, IMAGES)
        for part in PARTS:
            for line in self.lines(root, f"data/{part}.json"):
                image = line.image("filename", images)
                yield Example(
                    id=f"{part}/{line.key}",
                    images=(image,),
                    texts=(line.text("caption"), line.text("negative_caption")),
                    direction="text",
                    cluster=image,
                    groups={"category": part.partition("_")[0], "part": part},
                )

    def figures(self, decisions: Sequence[Decision]) -> list[Figure]:
        """Accuracy, the mean of the parts, and each category's and part's."""
        return with_macro(decisions, "part")
