"""Winoground (Thrush et al. 2022): two images, two captions of the same words."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.tasks.base import PairTask, entry, pair_of

FIELDS = ["id", "caption_0", "caption_1", "collapsed_tag", "num_main_preds"]
FILES = ("data.json", "examples.jsonl", "data/examples.jsonl", "data.parquet")
IMAGE_FOLDERS = ("images", ".", "data/images")


class Winoground(PairTask):
    """data.json (or examples.jsonl, or Parquet) and images named ex_{id}_img_{0,1}.png; or
    data/test-*.parquet, or without data/, with the images inside, as the Hub's image_0 and image_1."""

    name = "winoground"
    folder = "winoground"
    source = "the Hub dataset facebook/winoground (accept its terms, set HF_TOKEN)"

    def examples(self, root: str) -> Iterator[Example]:
        """One example an entry, by collapsed tag and by number of main predicates."""
        if not any(storage.exists(storage.join(root, self.folder, file)) for file in FILES):
            yield from self._embedded(root)
            return
        name, entries = self._entries(root)
        images, seen = None, set[int]()
        for line in entries:
            found = entry(line, **dict(zip(FIELDS, (int, str, str, str, int), strict=True)))
            if found is None or found[0] in seen or isinstance(found[0], bool):
                wanted = f"the fields {', '.join(FIELDS)}, each id (a whole number) once"
                raise self.malformed(root, name, line, wanted)
            number, *texts, tag, predicates = found
            groups = {"collapsed_tag": tag, "num_main_preds": str(predicates)}
            seen.add(number)
            images = images or self._image_folder(root, number)
            yield Example(
                id=str(number),
                images=tuple(f"{images}/ex_{number}_img_{k}.png" for k in (0, 1)),
                texts=tuple(texts),
                direction="both",
                cluster=str(number),
                groups=groups,
            )

    def _embedded(self, root: str) -> Iterator[Example]:
        """The same of Parquet that holds the images. Raises InputError."""
        seen = set[int]()
        for line in self.parquet_lines(root, "test"):
            number = line.number("id")
            if number in seen:
                raise line.wrong("id", "there once")
            seen.add(number)
            groups = {
                "collapsed_tag": line.text("collapsed_tag"),
                "num_main_preds": str(line.number("num_main_preds")),
            }
            found = pair_of(line, ("image_0", "image_1"), ("caption_0", "caption_1"), groups)
            yield replace(found, id=str(number), cluster=str(number))

    def _entries(self, root: str) -> tuple[str, list[dict[str, Any]]]:
        name = next(f for f in FILES if storage.exists(storage.join(root, self.folder, f)))
        path = storage.join(root, self.folder, name)
        if name.endswith(".json"):
            entries = self.read_json(root, name)
            if not isinstance(entries, list):
                raise self.malformed(root, name, entries, "a list of entries")
            return name, entries
        try:
            if name.endswith(".jsonl"):
                lines = storage.read_text(path).split("\n")  # splitlines would cut in strings too
                return name, [json.loads(line) for line in lines if line.strip()]
            data = io.BytesIO(storage.read_bytes(path))
            return name, parquet.read_table(data, columns=FIELDS).to_pylist()
        except (OSError, ValueError) as error:
            raise InputError(f"task {self.name} cannot read {path}: {error}") from error

    def _image_folder(self, root: str, number: int) -> str:
        """Where the first entry's image lies, below the data root."""
        for folder in IMAGE_FOLDERS:
            below = self.folder if folder == "." else f"{self.folder}/{folder}"
            if storage.exists(storage.join(root, below, f"ex_{number}_img_0.png")):
                return below
        return f"{self.folder}/images"
