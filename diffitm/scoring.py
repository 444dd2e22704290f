"""Rows of the pair table to rows of the score store: the code that an actor runs."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from diffitm import images, storage
from diffitm.errors import InputError, Unavailable
from diffitm.matching.batch import Batch
from diffitm.matching.cache import TextCache
from diffitm.matching.errors import pair_errors
from diffitm.matching.plan import Plan
from diffitm.models.denoiser import Denoiser, select
from diffitm.outside import is_outside, patiently
from diffitm.schema import Work

TEXT_CACHE_BYTES = 512 * 2**20
PIXEL_SCALE = 127.5


class Scorer(Protocol):
    """What the distributed code needs of a model. One that runs a model in batches has them in
    `batches`, that of its forwards first."""

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
        self.resize, self.latent_seed = resize, latent_seed
        self.texts = TextCache(denoiser.encode_texts, text_cache_bytes, batch_size)
        # VAE batches are small: at 512 px an encode weighs more than a forward of the U-Net.
        images = Batch(max(1, batch_size // 4), "batch size of images")
        self.batches = [Batch(batch_size), images, self.texts.batch]
        self.cost = len(plan)
        self.timesteps = plan.timesteps.tolist()

    def score(self, rows: Sequence[Work]) -> list[dict[str, Any]]:
        """See Scorer. An unreadable image, or a text that the model refuses, becomes a failure of its
        own pairs."""
        loaded = load_images(rows, self.root, self._pixels)
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

    def _scored(self, good: Sequence[tuple[Work, Loaded]]) -> list[dict[str, Any]]:
        """The lines of rows whose image is readable and whose texts are conditions."""
        latents = self._latents([item.value for _, item in good])
        texts = list(dict.fromkeys(text for row, _ in good for text in row.texts))
        place = {text: t for t, text in enumerate(texts)}
        pairs = [(g, place[text]) for g, (row, _) in enumerate(good) for text in row.texts]
        errors = pair_errors(
            self.denoiser,
            latents,
            self.texts(texts),
            self.plan,
            torch.tensor(pairs),
            self.batches[0],
        )
        values = {name: getattr(errors, name).numpy() for name in ("l2", "l1", "huber")}
        scored = []
        for p, (g, t) in enumerate(pairs):
            row, item = good[g]
            line = blank(row, texts[t], item.digest)
            line.update({name: value[p] for name, value in values.items()})
            line.update(timesteps=self.timesteps, elements=errors.elements)
            scored.append(line)
        return scored

    @torch.inference_mode()
    def measure_rate(self) -> float:
        """See Scorer. The first of the two rounds warms up, and finds a batch that fits."""
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

    def _pixels(self, image: Any) -> Tensor:
        return to_input(image, self.denoiser, self.resize)

    def _latents(self, pixels: list[Tensor]) -> Tensor:
        def encode(start: int, end: int) -> Tensor:
            return self.denoiser.encode_images(torch.stack(pixels[start:end]), self.latent_seed)

        return torch.cat(list(self.batches[1].run(len(pixels), encode)))


def to_input(image: Any, denoiser: Denoiser, resize: str) -> Tensor:
    """An RGB image as the denoiser takes it, float32 [3, H, W] in [-1, 1]."""
    return scaled(images.to_pixels(image, denoiser.resolution, resize))


def scaled(pixels: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] to float32 [3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / PIXEL_SCALE - 1


class Loaded(NamedTuple):
    """A prepared image or why there is none; `outside`: the network or a server is to blame."""

    value: Any
    digest: str | None
    failure: str | None
    outside: bool = False


def load_images(
    rows: Sequence[Work], root: str, prepare: Callable[[Any], Any], threads: int = 4
) -> list[Loaded]:
    """Read, decode and prepare the rows' images in a few threads.

    Raises Unavailable where the network or a server keeps all of them from being read.
    """
    away = False  # once an image was waited for in vain, the others are asked for once

    def one(row: Work) -> Loaded:
        nonlocal away
        read = functools.partial(images.load, root, row.image)
        try:
            image, digest = read() if away else patiently(read)
            return Loaded(prepare(image), digest, None)
        except Exception as error:  # whatever a decoder raises is that image's failure
            outside = is_outside(error)
            away = away or outside
            return Loaded(None, None, _reason(error), outside)

    if len(rows) == 1:
        loaded = [one(rows[0])]
    else:
        with ThreadPoolExecutor(min(threads, len(rows))) as pool:
            loaded = list(pool.map(one, rows))
    if rows and not any(item.failure is None for item in loaded):
        _check_reachable(root, rows, loaded)
    return loaded


def _check_reachable(root: str, rows: Sequence[Work], loaded: Sequence[Loaded]) -> None:
    """Raises Unavailable where no image could be read for a reason that is not their own."""
    text = f"none of {len(rows)} images could be read, such as {rows[0].image}: {loaded[0].failure}"
    if all(item.outside for item in loaded) and len(loaded) > 1:
        raise Unavailable(text)
    try:
        gone = not storage.exists(root)
    except InputError as error:
        raise Unavailable(f"{text}; {error}") from error
    if gone:
        raise Unavailable(f"{text}; there is no folder {storage.title(root)} here")


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
