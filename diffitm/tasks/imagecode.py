"""ImageCoDe (Krojer et al. 2022): a description of one image among ten that are nearly alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask

IMAGES = 10
FILE = "valid_data.json"


class ImageCoDe(RetrievalTask):
    """valid_data.json: {set id: {image index: text}}; image-sets/<set id>/img<k>.jpg, ten a set.

    The static sets alone (open-images), which is what the published figure uses.
    """

    name = "imagecode"
    folder = "imagecode"
    source = (
        "the ImageCoDe authors: image-sets.zip on Zenodo (record 6518944), annotations on GitHub"
    )
    recalls: ClassVar[dict[str, int]] = {"R@1": 1, "R@5": 5}
    static_only: ClassVar[bool] = True

    def examples(self, root: str) -> Iterator[Example]:
        """One example a description; those of one set share a cluster."""
        sets = self.read_json(root, FILE)
        if not isinstance(sets, dict):
            raise self.malformed(root, FILE, sets, "{set id: {image index: text}}")
        for set_id, texts in sets.items():
            kind = "static" if "open-images" in set_id else "video"
            if kind == "video" and self.static_only:
                continue
            if not isinstance(texts, dict):
                raise self.malformed(root, FILE, {set_id: texts}, "{image index: text}")
            folder = f"{self.folder}/image-sets/{set_id}"
            images = tuple(f"{folder}/img{k}.jpg" for k in range(IMAGES))
            for index, text in texts.items():
                if not (isinstance(text, str) and index in map(str, range(IMAGES))):
                    wanted = f"an image index below {IMAGES} and a text"
                    raise self.malformed(root, FILE, {set_id: {index: text}}, wanted)
                yield Example(
                    id=f"{set_id}/{index}",
                    images=images,
                    texts=(text,),
                    direction="image",
                    gold=int(index),
                    cluster=set_id,
                    groups={"kind": kind},
                )


class ImageCoDeVideo(ImageCoDe):
    """All sets, static ones and video frames."""

    name = "imagecode_video"
    static_only = False
