"""Flickr30K retrieval among the ten candidates that CLIP RN50x64 picked, the right one first."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.schema import Example
from diffitm.tasks.base import RetrievalTask, is_strings

SOURCE = "the GDBench authors' candidate lists; images from Flickr30K, on request from its authors"
RECALLS = {"R@1": 1, "R@5": 5}
# The published run scores every fifth caption: the first of each image's five.
EVERY = 5


def _below_root(path: str) -> str:
    """The published paths start with the authors' folder 'datasets/'."""
    return path.removeprefix("datasets/")


class Flickr30kImage(RetrievalTask):
    """val_top10_RN50x64.json: {caption: [10 image paths]}."""

    name = "flickr30k"
    folder = "flickr30k"
    source = SOURCE
    recalls = RECALLS

    def examples(self, root: str) -> Iterator[Example]:
        """One caption against ten images; captions of one image share a cluster."""
        name = "val_top10_RN50x64.json"
        entries = self.read_json(root, name)
        if not isinstance(entries, dict):
            raise self.malformed(root, name, entries, "{caption: [image path, ...]}")
        for i, (caption, paths) in enumerate(entries.items()):
            if not is_strings(paths):
                raise self.malformed(root, name, {caption: paths}, "a list of image paths")
            if i % EVERY == 0:
                images = tuple(_below_root(path) for path in paths)
                yield Example(str(i), images, (caption,), "image", cluster=images[0])


class Flickr30kText(RetrievalTask):
    """val_top10_RN50x64_text.json: {image path: [10 captions]}."""

    name = "flickr30k_text"
    folder = "flickr30k"
    source = SOURCE
    recalls = RECALLS

    def examples(self, root: str) -> Iterator[Example]:
        """One image against ten captions."""
        name = "val_top10_RN50x64_text.json"
        entries = self.read_json(root, name)
        if not isinstance(entries, dict):
            raise self.malformed(root, name, entries, "{image path: [caption, ...]}")
        for path, captions in entries.items():
            if not is_strings(captions):
                raise self.malformed(root, name, {path: captions}, "a list of captions")
            image = _below_root(path)
            yield Example(path, (image,), tuple(captions), "text", cluster=image)
