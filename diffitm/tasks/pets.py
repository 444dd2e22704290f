"""Oxford-IIIT Pets (Parkhi et al. 2012): which of the breeds an image shows."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask

CLASSES = "classes.txt"


class Pets(RetrievalTask):
    """images/<Breed_name_NNN>.jpg and classes.txt, a lower-case name a line."""

    name = "pets"
    folder = "pets"
    source = "images.tar.gz of the Oxford-IIIT Pets authors (CC BY-SA 4.0), classes.txt of GDBench"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an image, by file name; the prompt is 'a photo of a {class}'."""
        classes = [c.strip() for c in self.read_text(root, CLASSES).splitlines() if c.strip()]
        prompts = tuple(f"a photo of a {name}" for name in classes)
        folder = storage.join(root, self.folder, "images")
        for path in storage.files(folder, ".jpg"):
            file = path.rsplit("/", 1)[-1]
            breed = file.rsplit("_", 1)[0].replace("_", " ").lower()
            if breed not in classes:
                known = storage.join(root, self.folder, CLASSES)
                raise InputError(f"{folder}/{file}: its class {breed!r} is not a line of {known}")
            image = f"{self.folder}/images/{file}"
            gold = classes.index(breed)
            yield Example(file, (image,), prompts, "text", gold, cluster=file)
