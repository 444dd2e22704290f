"""GDBench's CLEVR: an image, a caption and a foil, in seven subtasks."""

from __future__ import annotations

from collections.abc import Iterator

from diffitm.core.schema import Example
from diffitm.tasks.base import RetrievalTask, is_strings

SUBTASKS = (
    "pair_binding_size",
    "pair_binding_color",
    "recognition_color",
    "recognition_shape",
    "spatial",
    "binding_color_shape",
    "binding_shape_color",
)


class Clevr(RetrievalTask):
    """captions/<subtask>.json: {image file: [[caption, foil], ...]}; images/<file>."""

    name = "clevr"
    folder = "clevr"
    source = "the GDBench authors' CLEVR2 archive"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a row; every image has rows in every subtask, so the image is the cluster."""
        for subtask in SUBTASKS:
            name = f"captions/{subtask}.json"
            entries = self.read_json(root, name)
            if not isinstance(entries, dict):
                raise self.malformed(root, name, entries, "{image file: [[caption, foil], ...]}")
            for file, rows in entries.items():
                for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
                    if not is_strings(row, 2):
                        raise self.malformed(root, name, {file: row}, "a [caption, foil] pair")
                    yield Example(
                        id=f"{subtask}/{file}/{i}",
                        images=(f"{self.folder}/images/{file}",),
                        texts=tuple(row),
                        direction="text",
                        cluster=file,
                        groups={"subtask": subtask},
                    )
