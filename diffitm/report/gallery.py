"""The pictures of a page, as large as its bound allows."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from diffitm.core import images


@dataclass(frozen=True)
class Quality:
    """Pixels of the longer side of thumbnails, generated images and strips of reconstructions, JPEG's
    quality, and how many examples of a kind are shown."""

    thumbnail: int
    sample: int
    strip: int
    jpeg: int
    cases: int


QUALITIES = (
    Quality(160, 256, 1024, 85, 3),
    Quality(128, 224, 896, 75, 3),
    Quality(112, 192, 768, 65, 3),
    Quality(96, 160, 640, 55, 3),
    Quality(96, 144, 640, 50, 2),
    Quality(88, 128, 640, 45, 1),
)


class Gallery:
    """Encodes pictures at one quality until `budget` bytes are spent; what is left out is counted, as
    are the examples that the page leaves out."""

    def __init__(self, quality: Quality, budget: int, thumbnails: Thumbnails) -> None:
        self.quality, self.budget, self.thumbnails = quality, budget, thumbnails
        self.shown = self.left_out = self.cases_left_out = 0

    def thumbnail(self, reference: str) -> str | None:
        """A data URI, '' if left out, None if the image cannot be read (any more)."""
        image = self.thumbnails.read(reference)
        if image is None:
            return None
        return self._spend(lambda: jpeg(image, self.quality.thumbnail, self.quality.jpeg))

    def sample(self, data: bytes) -> str:
        """A generated image, a PNG: a data URI, '' if left out."""
        return self._png(data, self.quality.sample)

    def strip(self, data: bytes) -> str:
        """Reconstructions, a PNG: a data URI, '' if left out."""
        return self._png(data, self.quality.strip)

    def shortened(self, most: int) -> str:
        """What was done to stay below `most` bytes; nothing if all is there at its best."""
        if self.quality == QUALITIES[0] and not self.left_out:
            return ""
        done = ["pictures are smaller"]
        if self.cases_left_out:
            done.append(f"{self.cases_left_out} examples are left out")
        if self.left_out:
            done.append(f"{self.left_out} of {self.left_out + self.shown} pictures are left out")
        return f"To keep this page below {most / 1e6:g} MB, {', '.join(done)}."

    def _png(self, data: bytes, most: int) -> str:
        image = Image.open(io.BytesIO(data))
        if max(image.size) <= most:
            return self._spend(lambda: "data:image/png;base64," + base64.b64encode(data).decode())
        return self._spend(lambda: jpeg(image, most, self.quality.jpeg))

    def _spend(self, encode: Callable[[], str]) -> str:
        """What is encoded, if it and all before it fit."""
        uri = "" if self.left_out else encode()
        if self.left_out or len(uri) > self.budget:
            self.left_out += 1
            return ""
        self.budget -= len(uri)
        self.shown += 1
        return uri


class Thumbnails:
    """Images below a data root, each read once and made small."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.read = functools.cache(self._read)

    def _read(self, reference: str) -> Image.Image | None:
        try:
            image, _ = images.load(self.root, reference)
        except Exception:  # whatever a decoder raises: the report shows a blank
            return None
        side = QUALITIES[0].thumbnail
        image.thumbnail((side, side))
        return image


def jpeg(image: Image.Image, most: int, quality: int) -> str:
    """A data URI, no larger than `most` pixels."""
    small = image.convert("RGB")
    small.thumbnail((most, most))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
