"""Rows of the pair table to rows of the score store: the code that an actor runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffitm import images
from diffitm.matching.cache import TextCache
from diffitm.matching.errors import pair_errors
from diffitm.matching.plan import Plan
from diffitm.models.denoiser import Denoiser

TEXT_CACHE_BYTES = 512 * 2**20
PIXEL_SCALE = 127.5


class Work(NamedTuple):
    """One row of the pair table: an image and the texts that need a score against it."""

    row: int
    image: str
    texts: list[str]


class Scorer(Protocol):
    """What the distributed code needs of a model."""

    cost: int  # forwards of the model a pair

    def measure_rate(self) -> float:
        """Forwards a second of the bare model, 0 if they cost next to nothing."""

    def score(self, rows: Sequence[Work]) -> list[dict[str, Any]]:
        """The rows of the score store for all pairs of the work rows."""


class DenoiserScorer:
    """Scores pairs with a diffusion model: every image and text encoded once, every pair once.

    `root` is the data root, `resize` 'squash' or 'crop', `latent_seed` None for the posterior mean.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Plan,
        root: str,
        resize: str = "squash",
        batch_size: int = 64,
        latent_seed: int | None = None,
        text_cache_bytes: int = TEXT_CACHE_BYTES,
    ) -> None:
        self.denoiser, self.plan, self.root = denoiser, plan, root
        self.resize, self.batch_size, self.latent_seed = resize, batch_size, latent_seed
        self.texts = TextCache(denoiser.encode_texts, text_cache_bytes, batch_size)
        self.cost = len(plan)
        self.timesteps = plan.timesteps.tolist()

    def score(self, rows: Sequence[Work]) -> list[dict[str, Any]]:
        """See Scorer. An unreadable image becomes a failure of its own pairs."""
        loaded = load_images(rows, self.root, self._pixels)
        good = [i for i, item in enumerate(loaded) if item.failure is None]
        out = [_failure(rows[i], loaded[i]) for i in range(len(rows)) if i not in set(good)]
        if not good:
            return [line for lines in out for line in lines]
        latents = self._latents([loaded[i].value for i in good])
        texts = list(dict.fromkeys(text for i in good for text in rows[i].texts))
        place = {text: t for t, text in enumerate(texts)}
        pairs = [(g, place[text]) for g, i in enumerate(good) for text in rows[i].texts]
        errors = pair_errors(
            self.denoiser,
            latents,
            self.texts(texts),
            self.plan,
            torch.tensor(pairs),
            self.batch_size,
        )
        values = {name: getattr(errors, name).numpy() for name in ("l2", "l1", "huber")}
        scored = []
        for p, (g, t) in enumerate(pairs):
            line = blank(rows[good[g]], texts[t], loaded[good[g]].digest)
            line.update({name: value[p] for name, value in values.items()})
            line.update(timesteps=self.timesteps, elements=errors.elements)
            scored.append(line)
        return [line for lines in out for line in lines] + scored

    @torch.inference_mode()
    def measure_rate(self) -> float:
        """See Scorer. The first of the two batches warms up."""
        size = self.batch_size
        noised = torch.zeros(size, *self.denoiser.latent_shape, device=self.denoiser.device)
        steps = torch.zeros(size, dtype=torch.long, device=self.denoiser.device)
        condition = self.denoiser.encode_texts([""] * size)
        for _ in range(2):
            start = time.perf_counter()
            self.denoiser.predict(noised, steps, condition).cpu()
        return size / (time.perf_counter() - start)

    def _pixels(self, image: Any) -> Tensor:
        return to_input(image, self.denoiser, self.resize)

    def _latents(self, pixels: list[Tensor]) -> Tensor:
        """VAE batches are small: at 512 px an encode weighs more than a forward of the U-Net."""
        size = max(1, self.batch_size // 4)
        chunks = [torch.stack(pixels[i : i + size]) for i in range(0, len(pixels), size)]
        return torch.cat([self.denoiser.encode_images(c, self.latent_seed) for c in chunks])


def to_input(image: Any, denoiser: Denoiser, resize: str) -> Tensor:
    """An RGB image as the denoiser takes it, float32 [3, H, W] in [-1, 1]."""
    return scaled(images.to_pixels(image, denoiser.resolution, resize))


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / PIXEL_SCALE - 1


class Loaded(NamedTuple):
    """A prepared image or why there is none."""

    value: Any
    digest: str | None
    failure: str | None


def load_images(
    rows: Sequence[Work], root: str, prepare: Callable[[Any], Any], threads: int = 4
) -> list[Loaded]:
    """Read, decode and prepare the rows' images in a few threads."""

    def one(row: Work) -> Loaded:
        try:
            image, digest = images.load(root, row.image)
            return Loaded(prepare(image), digest, None)
        except Exception as error:  # whatever a decoder raises is that image's failure
            return Loaded(None, None, _reason(error))

    if len(rows) == 1:
        return [one(rows[0])]
    with ThreadPoolExecutor(min(threads, len(rows))) as pool:
        return list(pool.map(one, rows))


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"unreadable image: {type(error).__name__}: {error}"


def blank(row: Work, text: str, digest: str | None) -> dict[str, Any]:
    """A line of the store without any score yet."""
    return {
        "row": row.row,
        "image": row.image,
        "text": text,
        "timesteps": None,
        "l2": None,
        "l1": None,
        "huber": None,
        "elements": None,
        "similarity": None,
        "digest": digest,
        "failure": None,
    }


def _failure(row: Work, loaded: Loaded) -> list[dict[str, Any]]:
    return [{**blank(row, text, loaded.digest), "failure": loaded.failure} for text in row.texts]


def similarity_lines(
    rows: Sequence[Work], loaded: Sequence[Loaded], similarities: Sequence[np.ndarray | None]
) -> list[dict[str, Any]]:
    """Lines of the store for a model with one similarity a pair; None where the image failed."""
    out = []
    for row, item, values in zip(rows, loaded, similarities, strict=True):
        if values is None:
            out += _failure(row, item)
            continue
        for text, value in zip(row.texts, values, strict=True):
            out.append({**blank(row, text, item.digest), "similarity": float(value)})
    return out
