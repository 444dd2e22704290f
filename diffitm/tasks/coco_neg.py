"""NegCLIP's COCO pairs with hard negatives (Yuksekgonul et al. 2023): what fine-tuning validates on."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import NamedTuple

from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask, is_strings
from diffitm.tasks.csv_files import Malformed

FILE = "valid_neg_clip.tsv"
FIELDS = ("title", "filepath", "neg_caption", "neg_image")


class NegClipRow(NamedTuple):
    """A line: caption, image below the data root, negative captions, lines of negative images."""

    title: str
    image: str
    neg_captions: list[str]
    neg_images: list[int]


class CocoNegText(RetrievalTask):
    """valid_neg_clip.tsv: title, filepath, neg_caption (a list of captions), neg_image (a list of
    lines of the same file). An image, its caption and the first negative caption that differs."""

    name = "coco_neg_text"
    folder = "coco_neg"
    source = "the NegCLIP authors' valid_neg_clip.tsv; COCO's val2014 images below coco/"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a line; lines of one image share a cluster."""
        for number, pair in enumerate(self.pairs(root)):
            wrong = [caption for caption in pair.neg_captions if caption != pair.title]
            texts = (pair.title, *wrong[:1])
            same = None if wrong else "no negative caption but the caption itself"
            yield Example(
                str(number), (pair.image,), texts, "text", cluster=pair.image, failure=same
            )

    def pairs(self, root: str) -> list[NegClipRow]:
        """All lines. Raises InputError for one of another form."""
        malformed = functools.partial(self.malformed, root, FILE)
        return read_pairs(self.read_table(root, FILE, "\t"), malformed)


def read_pairs(table: list[dict[str, str]], malformed: Malformed) -> list[NegClipRow]:
    """The rows of a file in the NegCLIP layout. Raises `malformed` for one of another form."""
    found = []
    for number, line in enumerate(table, 2):
        try:
            captions, images = (ast.literal_eval(line[name]) for name in FIELDS[2:])
            pair = NegClipRow(line["title"], line["filepath"], captions, images)
        except (KeyError, ValueError, SyntaxError, RecursionError, MemoryError):
            pair = NegClipRow("", "", [], [])
        if not _is_whole(pair):
            wanted = f"{', '.join(FIELDS)}, the last two Python lists"
            raise malformed({f"row {number}": line}, wanted)
        found.append(pair)
    return found


def _is_whole(pair: NegClipRow) -> bool:
    """A caption, an image, and lists of captions and of line numbers, which may be empty."""
    lists = isinstance(pair.neg_captions, list) and isinstance(pair.neg_images, list)
    texts = lists and is_strings([pair.title, pair.image, *pair.neg_captions])
    numbers = lists and all(type(i) is int for i in pair.neg_images)
    return bool(texts and numbers and pair.title.strip() and pair.image.strip())


class CocoNegImage(CocoNegText):
    """A caption, its image and the first negative image that the file holds."""

    name = "coco_neg_image"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a line; a line whose negatives lie outside of the file is a failure."""
        pairs = self.pairs(root)
        for number, pair in enumerate(pairs):
            inside = [pairs[i].image for i in pair.neg_images if 0 <= i < len(pairs)]
            wrong = [image for image in inside if image != pair.image][:1]
            failure = None if wrong else f"none of its neg_image lines {pair.neg_images} is usable"
            yield Example(
                id=str(number),
                images=(pair.image, *wrong),
                texts=(pair.title,),
                direction="image",
                cluster=pair.image,
                failure=failure,
            )
