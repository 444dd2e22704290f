"""What a loader makes of an image, uint8 squares; nothing here imports torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from diffitm.core import images

RATIOS = (3 / 4, 4 / 3)
TRIES = 10


@dataclass(frozen=True)
class Whole:
    """The image squashed to a square of `side` pixels, or its centre ('crop')."""

    side: int
    resize: str

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.side,)

    def __call__(self, image: Image.Image, seed: int) -> list[np.ndarray]:
        return [images.to_pixels(image, self.side, self.resize)]


@dataclass(frozen=True)
class Views:
    """What the teacher and CLIP see of one random crop: squashed to `teacher` pixels, and that to
    `clip` pixels. `share` is the least part of the area, 1 the whole image; without `both`, CLIP's
    view alone."""

    teacher: int
    clip: int
    share: float
    both: bool = True

    @property
    def sides(self) -> tuple[int, ...]:
        return (self.teacher, self.clip) if self.both else (self.clip,)

    def __call__(self, image: Image.Image, seed: int) -> list[np.ndarray]:
        if self.share < 1:
            image = image.crop(random_box(image.size, self.share, seed))
        squashed = images.to_pixels(image, self.teacher, "squash")
        seen = images.to_pixels(Image.fromarray(squashed), self.clip, "squash")
        return [squashed, seen] if self.both else [seen]


def random_box(size: tuple[int, int], share: float, seed: int) -> tuple[int, int, int, int]:
    """left, top, right, bottom of a random resized crop (Szegedy et al. 2015): `share` to all of the
    area, aspect ratio 3/4 to 4/3; the largest centred box of such a ratio if none fits."""
    width, height = size
    rng = np.random.default_rng([seed, 1])
    for _ in range(TRIES):
        area = width * height * rng.uniform(share, 1)
        ratio = math.exp(rng.uniform(math.log(RATIOS[0]), math.log(RATIOS[1])))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, top = (int(rng.integers(n + 1)) for n in (width - across, height - down))
            return left, top, left + across, top + down
    ratio = min(max(width / height, RATIOS[0]), RATIOS[1])
    across, down = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, top = (width - across) // 2, (height - down) // 2
    return left, top, left + across, top + down
