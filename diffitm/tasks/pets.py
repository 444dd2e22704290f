"""Oxford-IIIT Pets (Parkhi et al. 2012): which of the breeds an image shows."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core import storage
from diffitm.core.images import is_image
from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask

CLASSES = "classes.txt"


class Pets(RetrievalTask):
    """images/<Breed_name_NNN>.jpg (or another image) and classes.txt, a lower-case name a line."""

    name = "pets"
    folder = "pets"
    source = "images.tar.gz of the Oxford-IIIT Pets authors (CC BY-SA 4.0), classes.txt of GDBench"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an image, by file name; the prompt is 'a photo of a {class}'."""
        classes = [c.strip() for c in self.read_text(root, CLASSES).splitlines() if c.strip()]
        prompts = tuple(f"a photo of a {name}" for name in classes)
        folder = storage.join(root, self.folder, "images")
        names = (path.rsplit("/", 1)[-1] for path in storage.files(folder))
        for file in filter(is_image, names):
            breed = file.rsplit("_", 1)[0].replace("_", " ").lower()
            known = breed in classes
            yield Example(
                file,
                (f"{self.folder}/images/{file}",),
                prompts,
                "text",
                classes.index(breed) if known else 0,
                cluster=file,
                failure=None if known else f"its class {breed!r} is not a line of {CLASSES}",
            )
