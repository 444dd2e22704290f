"""Noise-prediction errors of a diffusion model for the pairs of work rows: what an actor runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.core import images
from diffitm.core.schema import PairRow
from diffitm.models.denoiser import Condition, Denoiser, Encode, encode_with_zeros, select
from diffitm.models.noise_schedule import FLOW_TIME
from diffitm.scoring.batching import Batch, measured
from diffitm.scoring.compiled import CompiledPredict
from diffitm.scoring.encoded_items import Cache
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.noise_plan import NoisePlan
from diffitm.scoring.pair_errors import error_batches
from diffitm.scoring.scorer import RowScorer, blank
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
    `compiled` has the denoiser's forwards compiled (scoring/compiled.py). `empty` is what no text is: 'text',
    the encoded '', or 'zeros'. With `encoded` all texts, '' too, are read from there, and the denoiser needs
    no text encoders.
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
        compiled: bool = False,
        empty: str = "text",
        encoded: Cache | None = None,
    ) -> None:
        self.denoiser, self.root, self.device = denoiser, root, denoiser.device
        self.plan = replace(plan, noise=plan.noise.to(self.device))
        self.resize, self.latent_seed = resize, latent_seed
        self.encoded = encoded
        encode: Encode = denoiser.encode_texts if encoded is None else self._read
        if empty != "text":
            encode = partial(encode_with_zeros, encode)
        self.texts = TextCache(encode, text_cache_bytes, batch_size)
        # VAE batches are small: at 512 px an encode weighs more than a forward of the U-Net.
        images = Batch(max(1, batch_size // 4), "batch size of images")
        self.batches = [Batch(batch_size), images, self.texts.batch]
        self.compiled = CompiledPredict(denoiser, self.batches[0]) if compiled else None
        self.cost = len(plan)
        self.timesteps: list[float] = plan.timesteps.tolist()
        self.is_flow = plan.timesteps.is_floating_point()
        self.elements = int(np.prod(denoiser.latent_shape))

    def _read(self, texts: Sequence[str]) -> Condition:
        """Texts that were encoded before."""
        assert self.encoded is not None, "the constructor asks for it"
        return {name: value.to(self.device) for name, value in self.encoded(texts).items()}

    def refuses(self, text: str) -> str | None:
        """Why a text has no score; None if it has one."""
        failures = self.encoded.failures if self.encoded else {}
        return failures.get(text) or self.denoiser.refuses(text)

    def cut(self, texts: Sequence[str]) -> list[int]:
        return [number for number, text in enumerate(texts) if self.denoiser.cuts(text)]

    @property
    def at_once(self) -> int:
        return self.batches[1].size

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels [3, H, W] as the denoiser takes them."""
        return to_input(image, self.denoiser, self.resize)

    def score_loaded(
        self, rows: Sequence[PairRow], loaded: Iterable[Sequence[Loaded]]
    ) -> list[dict[str, Any]]:
        """Errors of every kind a pair; a text that the model refuses is a failure of its own pairs."""
        asked = dict.fromkeys(text for row in rows for text in row.texts)
        refused = {t: reason for t in asked if (reason := self.refuses(t)) is not None}
        texts = [text for text in asked if text not in refused]
        number = {text: t for t, text in enumerate(texts)}
        # Before the first images are waited for: they are read meanwhile.
        forwards = _Forwards(self, self.texts(texts) if texts else {})
        failed, left = list[dict[str, Any]](), iter(rows)
        for some in loaded:
            pixels, pairs = list[Tensor](), list[MeasuredPair]()
            for item, row in zip(some, left):  # noqa: B905  # left has those of the next images, too
                at = forwards.images + len(pixels)
                pairs_of = list[MeasuredPair]()
                for text, there in zip(row.texts, row.stored or [[]] * len(row.texts), strict=True):
                    line = blank(row, text, item.digest)
                    if reason := item.failure or refused.get(text):
                        failed.append({**line, "failure": reason})
                    else:
                        pairs_of.append(MeasuredPair(line, at, number[text], self.lacking(there)))
                if pairs_of:
                    pixels.append(item.value)
                    pairs += pairs_of
            if pixels:
                forwards.add(pairs, self.latents(pixels))
        return failed + [self.line(pair) for pair in forwards.finish()]

    def lacking(self, stored: Sequence[int]) -> list[int]:
        """Places of the plan that are not stored."""
        return sorted(set(range(len(self.plan))) - set(stored))

    def batches_of(self, latents: Tensor, condition: Condition, items: Tensor) -> Iterator[Tensor]:
        """What is measured of items [M, 3] as error_batches takes them: errors of each kind, a batch each."""
        batch = self.batches[0]
        return error_batches(
            self.denoiser, latents, condition, self.plan, items, batch, self.compiled
        )

    def measure(self, pairs: Sequence[MeasuredPair], latents: Tensor, condition: Condition) -> None:
        """Fill in the errors of pairs of (rows of) latents and texts of a condition."""
        forwards = _Forwards(self, condition)
        forwards.add(pairs, latents)
        forwards.finish()

    def line(self, pair: MeasuredPair) -> dict[str, Any]:
        """The line of the store for a pair that was measured."""
        is_whole = pair.places == list(range(len(self.plan)))
        l2, l1, huber = pair.errors
        steps = [self.timesteps[place] for place in pair.places]
        return pair.line | {
            "timesteps": None if self.is_flow else steps,
            "sigmas": [step / FLOW_TIME for step in steps] if self.is_flow else None,
            "positions": None if is_whole else pair.places,
            "l2": l2,
            "l1": l1,
            "huber": huber,
            "elements": self.elements,
        }

    @torch.inference_mode()
    def measure_rate(self) -> float:
        """The first of two rounds warms up, and finds a batch that fits; a slow model has one."""
        device, total = self.denoiser.device, self.batches[0].size
        condition = self.texts([""])

        def forward(start: int, end: int) -> Tensor:
            zeros = torch.zeros(end - start, dtype=torch.long, device=device)
            at = self.plan.timesteps.to(device)[zeros]
            noised = torch.zeros(end - start, *self.denoiser.latent_shape, device=device)
            predict = self.compiled or self.denoiser.predict
            return predict(noised, at, select(condition, zeros)).cpu()

        return measured(total, lambda: list(self.batches[0].run(total, forward)))

    def latents(self, pixels: list[Tensor]) -> Tensor:
        def encode(start: int, end: int) -> Tensor:
            return self.denoiser.encode_images(torch.stack(pixels[start:end]), self.latent_seed)

        return torch.cat(list(self.batches[1].run(len(pixels), encode)))


class _Forwards:
    """The forwards of a block whose images come some at a time: batches fill over all of its images, and
    results stay on the device until the end, so that nothing waits for a batch."""

    def __init__(self, scorer: DiffusionScorer, condition: Condition) -> None:
        self.scorer, self.condition = scorer, condition
        self.latents = torch.zeros(0, *scorer.denoiser.latent_shape)
        self.pairs: list[MeasuredPair] = []
        self.left: list[tuple[int, int, int]] = []  # too few for a batch as yet
        self.found: list[Tensor] = []

    @property
    def images(self) -> int:
        """How many were added."""
        return len(self.latents)

    def add(self, pairs: Sequence[MeasuredPair], latents: Tensor) -> None:
        """Pairs of images, whose rows among all latents they name; runs the batches that are full."""
        self.latents = torch.cat([self.latents, latents]) if self.images else latents
        self.pairs += pairs
        self.left += [(p.image, p.text, place) for p in pairs for place in p.places]
        size = self.scorer.batches[0].size
        self._run(len(self.left) // size * size)

    def finish(self) -> list[MeasuredPair]:
        """All pairs with their errors."""
        self._run(len(self.left))
        errors = torch.cat(self.found, 1).cpu().numpy() if self.found else np.zeros((3, 0))
        start = 0
        for pair in self.pairs:
            pair.errors = errors[:, start : start + len(pair.places)]
            start += len(pair.places)
        return self.pairs

    def _run(self, count: int) -> None:
        now, self.left = self.left[:count], self.left[count:]
        items = torch.tensor(now).view(-1, 3)
        self.found += self.scorer.batches_of(self.latents, self.condition, items)


def to_input(image: Any, denoiser: Denoiser, resize: str) -> Tensor:
    """An RGB image as the denoiser takes it, float32 [3, H, W] in [-1, 1]."""
    return scaled(images.to_pixels(image, denoiser.resolution, resize))


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / PIXEL_SCALE - 1
