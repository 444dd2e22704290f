"""A block of contests on a loaded model: each pair is scored as far as its races ask."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffitm.core.schema import Contest, PairRow, RaceBlock
from diffitm.metrics.score import column, error_values
from diffitm.scoring.diffusion import DiffusionScorer, MeasuredPair
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.racing import RacePlan, Run, hold
from diffitm.scoring.scorer import blank

COLUMNS = ("l2", "l1", "huber")
IMAGES_AT_ONCE = 64  # whose pixels are held, and those of as many that come next
Load = Callable[[Sequence[str]], Iterable[Loaded]]


def all_with_all(
    images: int, texts: Sequence[str], kept: int, of: Literal["image", "text"]
) -> RaceBlock:
    """Contests by the normalised score: the best texts of each image, or images of each text. Images are
    named by their numbers."""
    pairs = np.arange(images * len(texts)).reshape(images, len(texts))
    bases = np.repeat(len(pairs.ravel()) + np.arange(images), len(texts)).reshape(pairs.shape)
    groups = zip(pairs, bases, strict=True) if of == "image" else zip(pairs.T, bases.T, strict=True)
    nothing: list[list[Any]] = [[] for _ in range(images * (len(texts) + 1))]
    return RaceBlock(
        row=0,
        images=[str(number) for number in range(images)],
        texts=[*texts, ""],
        image_of=[*np.repeat(np.arange(images), len(texts)).tolist(), *range(images)],
        text_of=[*np.tile(np.arange(len(texts)), images).tolist(), *[len(texts)] * images],
        stored=nothing,
        errors=nothing,
        contests=[Contest(own.tolist(), kept, base.tolist()) for own, base in groups],
    )


class BlockRaces:
    """The contests of a block on a loaded model. `load` reads images by their names, those of the block,
    in order, no sooner than they are held; by default files below the scorer's root."""

    def __init__(
        self, scorer: DiffusionScorer, block: RaceBlock, plan: RacePlan, load: Load | None = None
    ) -> None:
        self.scorer, self.block, self.plan = scorer, block, plan
        pictures = (load or _loader(scorer, block))(block.images)
        self.refused = refused = [scorer.refuses(text) for text in block.texts]
        kept = [text for text, reason in zip(block.texts, refused, strict=True) if reason is None]
        # Before the first images are waited for: they are read meanwhile.
        self.condition = scorer.texts(kept) if kept else {}
        loaded, self.latents = _encoded(scorer, pictures)
        images = np.cumsum([item.failure is None for item in loaded]) - 1
        texts = np.cumsum([reason is None for reason in refused]) - 1
        self.pairs, self.failures = list[MeasuredPair](), list[str | None]()
        for i, t in zip(block.image_of, block.text_of, strict=True):
            row = PairRow(block.row, block.images[i], [])
            line = blank(row, block.texts[t], loaded[i].digest)
            self.pairs.append(MeasuredPair(line, int(images[i]), int(texts[t]), []))
            self.failures.append(loaded[i].failure or refused[t])
        self.kind = COLUMNS.index(column(plan.error))
        self.found = np.full((3, len(self.pairs), len(scorer.timesteps)), np.nan, np.float32)
        self.errors = np.full(self.found.shape[1:], np.nan)
        for p, (places, errors) in enumerate(zip(block.stored, block.errors, strict=True)):
            self.errors[p, places] = np.array(errors, np.float32)

    def run(self) -> list[Run]:
        """Hold all races to their end."""
        return hold(self.block.contests, self.errors, self.plan, self._measure)

    def _measure(self, asked: Mapping[int, int]) -> None:
        """Score what is asked of each pair and not known."""
        scored = []
        for number, length in asked.items():
            if self.failures[number] is not None:
                self.errors[number] = np.inf
                continue
            pair, places = self.pairs[number], self.plan.order[:length]
            pair.places = [place for place in places if np.isnan(self.errors[number, place])]
            scored.append(number)
        self.scorer.measure([self.pairs[n] for n in scored], self.latents, self.condition)
        for number in scored:
            pair = self.pairs[number]
            self.found[:, number, pair.places] = pair.errors
            # As the evaluation reads them from the store, so that it races alike.
            values = error_values(pair.errors[self.kind], self.plan.error, self.scorer.elements)
            self.errors[number, pair.places] = np.where(np.isnan(values), np.inf, values)

    def lines(self) -> list[dict[str, Any]]:
        """Lines of the store for what the races needed beyond what was stored: of each pair the errors at
        places that were asked for, or why its image or text cannot be scored."""
        lines = []
        for number, (pair, failure) in enumerate(zip(self.pairs, self.failures, strict=True)):
            if failure is not None:
                lines.append(pair.line | {"failure": failure})
            elif places := self._measured(number):
                pair.places, pair.errors = places, self.found[:, number, places]
                lines.append(self.scorer.line(pair))
        return lines

    def _measured(self, number: int) -> list[int]:
        """Places that this block scored of a pair; one that came out as NaN was scored, too."""
        stored = set(self.block.stored[number])
        known = np.flatnonzero(~np.isnan(self.errors[number])).tolist()
        return [place for place in known if place not in stored]


def _loader(scorer: DiffusionScorer, block: RaceBlock) -> Load:
    def load(names: Sequence[str]) -> Iterable[Loaded]:
        rows = [PairRow(block.row, name, []) for name in names]
        return itertools.chain.from_iterable(scorer.load(rows, IMAGES_AT_ONCE))

    return load


def _encoded(scorer: DiffusionScorer, images: Iterable[Loaded]) -> tuple[list[Loaded], Tensor]:
    """How each image's reading went, and the latents of those that are readable."""
    loaded, latents, left = list[Loaded](), list[Tensor](), iter(images)
    while some := list(itertools.islice(left, IMAGES_AT_ONCE)):
        if pixels := [item.value for item in some if item.failure is None]:
            latents.append(scorer.latents(pixels))
        loaded += [item._replace(value=None) for item in some]
    nothing = torch.zeros(0, *scorer.denoiser.latent_shape)
    return loaded, torch.cat(latents) if latents else nothing
