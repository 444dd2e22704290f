"""MMVP-VLM (Tong et al. 2024): pairs of images that CLIP takes for the same, by visual pattern."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from diffitm.core import storage
from diffitm.core.schema import Contest, Example
from diffitm.metrics.credit import Credit, Credits, raced_winoground, winoground, winogrounds
from diffitm.tasks.base import Task, image_contests

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
        images = self._images(root)
        for first, second in self._pairs(root):
            number, kind, _ = first
            yield Example(
                id=f"{number}-{second[0]}",
                images=tuple(f"{images}/{kind}/{row[0]}.jpg" for row in (first, second)),
                texts=tuple(f"a photo of {row[2]}" for row in (first, second)),
                direction="both",
                cluster=number,
                groups={"pattern": kind},
            )

    def _pairs(self, root: str) -> Iterator[tuple[list[str], list[str]]]:
        """Rows by twos: an odd id and the next one, of one type. A lost row would shift all others."""
        header, *rows = self.read_rows(root, FILE) or [[]]
        if not header or header[0].strip().isdigit():
            raise self.malformed(root, FILE, header, "a header: id, type, statement")
        rows = [[field.strip() for field in row[:3]] for row in rows]
        for row in rows:
            if len(row) < 3 or not row[0].isdigit() or not all(row) or "\n" in row[2]:
                raise self.malformed(root, FILE, row, "id (a number), type, statement (one line)")
        if len(rows) % 2:
            raise self.malformed(root, FILE, rows[-1], "an even number of rows, two a pair")
        seen: set[str] = set()
        for first, second in zip(rows[::2], rows[1::2], strict=True):
            odd, even = int(first[0]), int(second[0])
            if first[1] != second[1]:
                raise self.malformed(root, FILE, [first, second], "one type for both of a pair")
            if odd % 2 == 0 or even != odd + 1 or first[0] in seen:
                raise self.malformed(root, FILE, [first, second], "an odd id and the next, once")
            seen.add(first[0])
            yield first, second

    def _images(self, root: str) -> str:
        for name in FOLDERS:
            if storage.exists(storage.join(root, self.folder, name)):
                return f"{self.folder}/{name}"
        return f"{self.folder}/{FOLDERS[0]}"

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        """A pair counts when both statements pick their image."""
        return {"pair": winoground(scores)["image"]}

    def credits_each(
        self, examples: Sequence[Example], golds: np.ndarray, scores: np.ndarray
    ) -> dict[str, Credits]:
        """All at once, unless a subclass has its own."""
        if not self._is_same(MmvpVlm, "credits"):
            return super().credits_each(examples, golds, scores)
        return {"pair": winogrounds(scores)["image"]}

    def chance_each(self, examples: Sequence[Example]) -> dict[str, np.ndarray]:
        """All at once, unless a subclass has its own."""
        same = self._is_same(MmvpVlm, "chance")
        return self._chance_of_all(examples) if same else super().chance_each(examples)

    def contests(self, example: Example) -> list[Contest]:
        """Both images of either statement; a task with credits of its own has none."""
        if type(self).credits is not MmvpVlm.credits:
            return []
        return image_contests()

    def raced_credits(self, example: Example, standings: Sequence[np.ndarray]) -> dict[str, Credit]:
        """A pair counts when both statements pick their image."""
        return {"pair": raced_winoground([], standings)["image"]}

    def chance(self, example: Example) -> dict[str, float]:
        """Of continuous random scores."""
        return {"pair": CHANCE}
