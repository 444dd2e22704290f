"""EqBen (Wang et al. 2023): two images that differ little, and their captions, from seven sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, pair_of, pictures

IMAGES, TEXTS = ("image0", "image1"), ("caption0", "caption1")


class EqBenMini(PairTask):
    """eqben_vllm/all_select.json: [{image0, image1, caption0, caption1}]; eqben_vllm/images/<image>.

    The part is the first folder of an image: eqbensd, eqbenkubric_cnt, .._loc, .._attr, eqbengebc, eqbenag,
    eqbenyoucook2. A part has few items: mind the intervals. A .npy holds blue, green, red.
    """

    name = "eqben_mini"
    folder = "eqben"
    source = "Wangt-CN/EqBen (code Apache-2.0): eqben_vllm.zip of t2v_metrics' Google Drive"
    file: ClassVar[str] = "eqben_vllm/all_select.json"
    images: ClassVar[str] = "eqben_vllm/images"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry, by part."""
        images = pictures(root, f"{self.folder}/{self.images}")
        for line in self.lines(root, self.file):
            part, slash, _ = line.image("image0").partition("/")
            if not slash:
                raise line.wrong("image0", "PART/NAME")
            yield pair_of(line, IMAGES, TEXTS, {"part": part}, images)


class EqBen(EqBenMini):
    """The 10 % sub-set, or all, in the same form: ann.json with images/<image>."""

    name = "eqben"
    source = "Wangt-CN/EqBen (code Apache-2.0)"
    file = "ann.json"
    images = "images"
