"""MMVP-VLM (Tong et al. 2024): pairs of images that CLIP takes for the same, by visual pattern."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

import numpy as np

from diffitm import storage
from diffitm.metrics.credit import Credit, winoground
from diffitm.schema import Example
from diffitm.tasks.base import Task

FILE = "Questions.csv"
FOLDERS = ("MLLM_VLM_Images", "MLLM_VLM Images")
CHANCE = 0.25


class MmvpVlm(Task):
    """Questions.csv (id, type, statement; consecutive rows a pair), MLLM_VLM_Images/<type>/<id>.jpg."""

    name = "mmvp_vlm"
    folder = "mmvp_vlm"
    source = "the Hub dataset MMVP/MMVP_VLM"

    def examples(self, root: str) -> Iterator[Example]:
        """One example a pair: two images, two statements, by pattern."""
        lines = [line for line in csv.reader(io.StringIO(self.read_text(root, FILE))) if line][1:]
        for line in lines:
            if len(line) < 3:
                raise self.malformed(root, FILE, line, "the columns id, type, statement")
        if len(lines) % 2:
            raise self.malformed(root, FILE, lines[-1], "an even number of rows, two a pair")
        images = self._images(root)
        for first, second in zip(lines[::2], lines[1::2], strict=True):
            if first[1].strip() != second[1].strip():
                raise self.malformed(root, FILE, [first, second], "one type for both of a pair")
            kind = first[1].strip()
            yield Example(
                id=f"{first[0].strip()}-{second[0].strip()}",
                images=tuple(f"{images}/{kind}/{row[0].strip()}.jpg" for row in (first, second)),
                texts=tuple(f"a photo of {row[2].strip()}" for row in (first, second)),
                direction="both",
                cluster=first[0].strip(),
                groups={"pattern": kind},
            )

    def _images(self, root: str) -> str:
        for name in FOLDERS:
            if storage.exists(storage.join(root, self.folder, name)):
                return f"{self.folder}/{name}"
        return f"{self.folder}/{FOLDERS[0]}"

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """A pair counts when both statements pick their image."""
        return {"pair": winoground(scores)["image"]}

    def chance(self, example: Example) -> dict[str, float]:
        """Of continuous random scores."""
        return {"pair": CHANCE}
