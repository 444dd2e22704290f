"""CLIP's cosine of image and text: the baseline, one similarity a pair."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from diffitm.core.schema import PairRow
from diffitm.models.clip import ClipSource, LoadedClip, load_clip
from diffitm.scoring.batching import Batch, measured
from diffitm.scoring.image_reader import Loaded
from diffitm.scoring.scorer import CLIP_IMAGE_COST, RowScorer, similarity_lines
from diffitm.scoring.text_cache import TEXT_CACHE_BYTES, TextCache


class ClipScorer(RowScorer):
    """Cosine similarity of image and text; every image and text encoded once.

    Raises InputError if the weights of a source cannot be loaded.
    """

    image_cost = CLIP_IMAGE_COST

    def __init__(
        self,
        source: ClipSource | LoadedClip,
        root: str,
        device: str = "cpu",
        batch_size: int = 64,
        text_cache_bytes: int = TEXT_CACHE_BYTES,
    ) -> None:
        self.root, self.device = root, torch.device(device)
        loaded = source if isinstance(source, LoadedClip) else load_clip(source, device)
        self.model, self.preprocess, self.tokenizer = loaded
        self.texts = TextCache(self.encode_texts, text_cache_bytes, batch_size)
        self.batches = [Batch(batch_size), self.texts.batch]

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Unit text embeddings, [B, W]."""
        tokens = self.tokenizer(list(texts)).to(self.device)
        return {"embedding": normalize(self.model.encode_text(tokens).float(), dim=-1)}

    @torch.inference_mode()
    def encode_images(self, pixels: Tensor) -> Tensor:
        """Unit image embeddings [B, W] of preprocessed pixels [B, 3, H, W]."""
        return normalize(self.model.encode_image(pixels.to(self.device)).float(), dim=-1)

    def cut(self, texts: Sequence[str]) -> list[int]:
        length = int(self.tokenizer.context_length)
        plain = getattr(
            self.tokenizer, "tokenizer", None
        )  # transformers', which adds its own marks

        def count(text: str) -> int:
            return (
                len(self.tokenizer.encode(text)) + 2
                if plain is None
                else len(plain(text).input_ids)
            )

        return [number for number, text in enumerate(texts) if count(text) > length]

    def measure_rate(self) -> float:
        """Of embedding images, as nothing else costs a CLIP much."""
        count = self.at_once
        pixels = [self.prepare(Image.new("RGB", (8, 8)))] * count
        return measured(count * self.image_cost, lambda: list(self._embedded(pixels)))

    def prepare(self, image: Image.Image) -> Tensor:
        """Pixels [3, H, W] as CLIP takes them."""
        pixels: Tensor = self.preprocess(image)
        return pixels

    @property
    def at_once(self) -> int:
        return self.batches[0].size

    def score_loaded(
        self, rows: Sequence[PairRow], loaded: Iterable[Sequence[Loaded]]
    ) -> list[dict[str, Any]]:
        """One cosine a pair."""
        items, cosines, left = list[Loaded](), list[Tensor](), iter(rows)
        for some in loaded:
            items += some
            embedded = self._embedded([item.value for item in some if item.failure is None])
            for item, row in zip(some, left):  # noqa: B905  # left has those of the next images, too
                if item.failure is None:
                    cosines.append(self.texts(row.texts)["embedding"] @ next(embedded))
        # Fetched once: each fetch makes a GPU wait.
        values = iter(torch.cat(cosines).cpu().numpy()) if cosines else iter(())
        similarities = [
            None if item.failure is not None else np.fromiter(values, np.float32, len(row.texts))
            for row, item in zip(rows, items, strict=True)
        ]
        return similarity_lines(rows, items, similarities)

    def _embedded(self, pixels: list[Tensor]) -> Iterator[Tensor]:
        def encode(start: int, end: int) -> Tensor:
            return self.encode_images(torch.stack(pixels[start:end]))

        return itertools.chain.from_iterable(list(self.batches[0].run(len(pixels), encode)))
