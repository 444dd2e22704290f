"""ARO's order tasks (Yuksekgonul et al. 2023): a caption against four orders of its own words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask, entry, is_strings
from diffitm.tasks.perturb import clean, foils


class Order(RetrievalTask):
    """A Karpathy file with rows {image, caption: [...]}."""

    recalls: ClassVar[dict[str, int]] = {"P@1": 1}
    file: ClassVar[str]

    def examples(self, root: str) -> Iterator[Example]:
        """One example a caption; the captions of an image share its cluster."""
        rows = self.read_json(root, self.file)
        if not isinstance(rows, list):
            raise self.malformed(root, self.file, rows, "a list of {image, caption: [...]}")
        for row in rows:
            found = entry(row, image=str, caption=list)
            if found is None or not is_strings(found[1]):
                raise self.malformed(root, self.file, row, "{image, caption: [...]}")
            image, captions = found
            for i, caption in enumerate(captions):
                right = clean(caption)
                wrong = foils(right)
                yield Example(
                    id=f"{image}/{i}",
                    images=(self.place(image),),
                    texts=(right, *wrong),
                    direction="text",
                    cluster=image,
                    failure=None if wrong else f"caption {caption!r} has no other order",
                )

    def place(self, image: str) -> str:
        """Where an image of the file lies below the data root."""
        return f"{self.folder}/{image}"


class CocoOrder(Order):
    """coco_karpathy_test.json; images as the file names them, val2014/..."""

    name = "coco_order"
    folder = "coco"
    file = "coco_karpathy_test.json"
    source = "the Karpathy split of COCO and COCO's val2014 images (CC BY 4.0 annotations)"


class FlickrOrder(Order):
    """flickr30k_val.json; the images are those of the retrieval tasks, flickr30k/images."""

    name = "flickr30k_order"
    folder = "flickr30k"
    file = "flickr30k_val.json"
    source = "the Karpathy split of Flickr30K; images on request from Flickr30K's authors"

    def place(self, image: str) -> str:
        """The file names images flickr30k-images/..."""
        return f"{self.folder}/images/{image.removeprefix('flickr30k-images/')}"
