"""Noise-prediction errors of a diffusion model for the pairs of work rows: what an actor runs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.core import images
from diffitm.core.schema import PairRow
from diffitm.models.denoiser import Condition, Denoiser, select
from diffitm.scoring.batching import Batch
from diffitm.scoring.noise_plan import NoisePlan
from diffitm.scoring.pair_errors import errors_at
from diffitm.scoring.scorer import Loaded, RowScorer, blank
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES, TextCache

PIXEL_SCALE = 127.5


@dataclass
class MeasuredPair:
    """A pair to be measured: its line of the store as yet without errors, its rows among latents and
    texts, the places of the plan, and its errors there (l2, l1, huber), [3, places]."""

    line: dict[str, Any]
    image: int
    text: int
    places: list[int]
    errors: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.float32))


class DiffusionScorer(RowScorer):
    """Scores pairs with a diffusion model: every image and text encoded once, every pair once.

    `root` is the data root, `resize` 'squash' or 'crop', `latent_seed` None for the posterior mean.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: NoisePlan,
        root: str,
        resize: str = "squash",
        batch_size: int = 64,
        latent_seed: int | None = None,
        text_cache_bytes: int = TEXT_CACHE_BYTES,
    ) -> None:
        self.denoiser, self.plan, self.root = denoiser, plan, root
        self.resize, self.latent_seed = resize, latent_seed
        self.texts = TextCache(denoiser.encode_texts, text_cache_bytes, batch_size)
        # VAE batches are small: at 512 px an encode weighs more than a forward of the U-Net.
        images = Batch(max(1, batch_size // 4), "batch size of images")
        self.batches = [Batch(batch_size), images, self.texts.batch]
        self.cost = len(plan)
        self.timesteps = plan.timesteps.tolist()
        self.elements = int(np.prod(denoiser.latent_shape))

    def cut(self, texts: Sequence[str]) -> list[int]:
        return [number for number, text in enumerate(texts) if self.denoiser.cuts(text)]

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels [3, H, W] as the denoiser takes them."""
        return to_input(image, self.denoiser, self.resize)

    def score_loaded(
        self, rows: Sequence[PairRow], loaded: Sequence[Loaded]
    ) -> list[dict[str, Any]]:
        """Errors of every kind a pair; a text that the model refuses is a failure of its own pairs."""
        asked = dict.fromkeys(text for row in rows for text in row.texts)
        refused = {t: reason for t in asked if (reason := self.denoiser.refuses(t)) is not None}
        failed, good = [], []
        for row, item in zip(rows, loaded, strict=True):
            for text in row.texts:
                if reason := item.failure or refused.get(text):
                    failed.append({**blank(row, text, item.digest), "failure": reason})
            kept = [text for text in row.texts if text not in refused]
            if kept and item.failure is None:
                good.append((row._replace(texts=kept), item))
        return failed + (self._scored(good) if good else [])

    def _scored(self, good: Sequence[tuple[PairRow, Loaded]]) -> list[dict[str, Any]]:
        """The lines of rows whose image is readable and whose texts are conditions."""
        latents = self.latents([item.value for _, item in good])
        texts = list(dict.fromkeys(text for row, _ in good for text in row.texts))
        number = {text: t for t, text in enumerate(texts)}
        asked = []
        for i, (row, item) in enumerate(good):
            stored = row.stored or [[] for _ in row.texts]
            for text, there in zip(row.texts, stored, strict=True):
                line = blank(row, text, item.digest)
                asked.append(MeasuredPair(line, i, number[text], self.lacking(there)))
        self.measure(asked, latents, self.texts(texts))
        return [self.line(pair) for pair in asked]

    def lacking(self, stored: Sequence[int]) -> list[int]:
        """Places of the plan that are not stored."""
        return sorted(set(range(len(self.plan))) - set(stored))

    def measure(self, pairs: Sequence[MeasuredPair], latents: Tensor, condition: Condition) -> None:
        """Fill in the errors of pairs of (rows of) latents and texts of a condition."""
        items = [(p.image, p.text, place) for p in pairs for place in p.places]
        places = torch.tensor(items).view(-1, 3)
        errors = errors_at(self.denoiser, latents, condition, self.plan, places, self.batches[0])
        start = 0
        for pair in pairs:
            pair.errors = errors[:, start : start + len(pair.places)].numpy()
            start += len(pair.places)

    def line(self, pair: MeasuredPair) -> dict[str, Any]:
        """The line of the store for a pair that was measured."""
        is_whole = pair.places == list(range(len(self.plan)))
        l2, l1, huber = pair.errors
        return pair.line | {
            "timesteps": [self.timesteps[place] for place in pair.places],
            "positions": None if is_whole else pair.places,
            "l2": l2,
            "l1": l1,
            "huber": huber,
            "elements": self.elements,
        }

    @torch.inference_mode()
    def measure_rate(self) -> float:
        """The first of the two rounds warms up, and finds a batch that fits."""
        device, total = self.denoiser.device, self.batches[0].size
        condition = self.texts([""])

        def forward(start: int, end: int) -> Tensor:
            zeros = torch.zeros(end - start, dtype=torch.long, device=device)
            noised = torch.zeros(end - start, *self.denoiser.latent_shape, device=device)
            return self.denoiser.predict(noised, zeros, select(condition, zeros)).cpu()

        for _ in range(2):
            start = time.perf_counter()
            list(self.batches[0].run(total, forward))
        return total / (time.perf_counter() - start)

    def latents(self, pixels: list[Tensor]) -> Tensor:
        def encode(start: int, end: int) -> Tensor:
            return self.denoiser.encode_images(torch.stack(pixels[start:end]), self.latent_seed)

        return torch.cat(list(self.batches[1].run(len(pixels), encode)))


def to_input(image: Any, denoiser: Denoiser, resize: str) -> Tensor:
    """An RGB image as the denoiser takes it, float32 [3, H, W] in [-1, 1]."""
    return scaled(images.to_pixels(image, denoiser.resolution, resize))


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / PIXEL_SCALE - 1
