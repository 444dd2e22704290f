"""All randomness of training, as functions of a seed: nothing depends on workers or on a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffitm.core.errors import InputError
from diffitm.models.noise_schedule import Schedule
from diffitm.training.rows import TrainingRow

# DiffusionITM's: half of the micro-batches a near image, a quarter each kind of caption.
MIXED = {"hard-image": 0.5, "hard-text": 0.25, "random-text": 0.25}


@dataclass(frozen=True)
class Item:
    """An example of a step: its row, what it is contrasted with, and the seed of its noise. Random ones are
    drawn beside the negatives of kind 'all' alone."""

    position: int
    image: str
    caption: str
    negative_image: str
    negative_caption: str
    seed: int
    random_image: str = ""
    random_caption: str = ""

    @property
    def images(self) -> list[str]:
        """Those that it needs."""
        return list(filter(None, (self.image, self.negative_image, self.random_image)))


# Items of a micro-batch, what was loaded of their images by path, and what could not be read.
Loaded = tuple[list[Item], dict[str, Any], list[str]]


def images_in(items: Sequence[Item]) -> list[str]:
    """The images of a micro-batch, each once."""
    return list(dict.fromkeys(path for item in items for path in item.images))


@dataclass
class BatchSampler:
    """Which rows make up which step.

    A step has `micro` batches of `size` examples. An epoch is a permutation of the rows that its seed
    and number give; the rest that fills no step is left out. `negatives` is one of rows.NEGATIVES;
    'mixed' is drawn for each micro-batch or, with `per_example`, for each example; 'all' gives every example
    a hard negative caption and image, and a caption and an image of two random rows.
    """

    rows: Sequence[TrainingRow]
    kept: Sequence[int] | np.ndarray
    size: int
    micro: int
    negatives: str
    per_example: bool
    seed: int
    order: tuple[int, np.ndarray] | None = field(default=None, init=False, repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was seen once; 0 if the rows do not fill one."""
        return len(self.kept) // (self.size * self.micro)

    def batches(self, step: int, rank: int = 0, world: int = 1) -> list[list[Item]]:
        """The micro-batches of a step, counted from 0, that fall to one of `world` workers: none where
        there are more workers than micro-batches."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)
        start = place * self.size * self.micro
        return [
            [
                self._item(int(position), epoch, step, number)
                for position in order[start + number * self.size :][: self.size]
            ]
            for number in range(rank, self.micro, world)
        ]

    def _order(self, epoch: int) -> np.ndarray:
        if self.order is None or self.order[0] != epoch:
            rng = np.random.default_rng(seed_of(self.seed, "epoch", epoch))
            self.order = (epoch, rng.permutation(np.asarray(self.kept)))
        return self.order[1]

    def _item(self, position: int, epoch: int, step: int, number: int) -> Item:
        row, seed = self.rows[position], seed_of(self.seed, "example", epoch, position)
        rng = np.random.default_rng(seed)
        kind = self.negatives
        if kind == "mixed":
            batch = np.random.default_rng(seed_of(self.seed, "kind", step, number))
            kind = str(
                (rng if self.per_example else batch).choice(list(MIXED), p=list(MIXED.values()))
            )
        image, caption = row.image, row.caption
        if kind in ("hard-image", "all"):
            image = row.negative_images[rng.integers(len(row.negative_images))]
        if kind in ("hard-text", "all"):
            caption = row.negative_captions[rng.integers(len(row.negative_captions))]
        if kind == "random-text":
            caption = self._random_row(row, rng).caption
        item = Item(position, row.image, row.caption, image, caption, seed)
        if kind != "all":
            return item
        one, two = self._random_row(row, rng), self._random_row(row, rng)
        return replace(item, random_image=one.image, random_caption=two.caption)

    def _random_row(self, row: TrainingRow, rng: np.random.Generator) -> TrainingRow:
        """Another row; those with the row's own caption or image are drawn again."""
        for _ in range(100):
            other = self.rows[self.kept[int(rng.integers(len(self.kept)))]]
            if other.caption != row.caption and other.image != row.image:
                return other
        raise InputError(
            f"no other caption was found for {row.caption!r}: random negatives need rows with other captions "
            "and other images"
        )


def seed_of(*parts: object) -> int:
    """A seed below 2**63 that the parts determine on every machine."""
    text = "\n".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Noise:
    """Timesteps [B] (int64, of a flow float32), noise and the posterior's noise [B, C, h, w], on the CPU."""

    timesteps: Tensor
    noise: Tensor
    posterior: Tensor


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int], schedule: Schedule) -> Noise:
    """Each example's own, whatever batch it is in: a timestep that the schedule draws, noise."""
    drawn = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        drawn.append(
            (
                schedule.draw(generator),
                torch.randn(1, *shape, generator=generator),
                torch.randn(1, *shape, generator=generator),
            )
        )
    at, noise, posterior = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return Noise(at, noise, posterior)
