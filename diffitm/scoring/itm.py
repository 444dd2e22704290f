"""The image-text matching heads of BLIP and BLIP-2 (Li et al. 2022, 2023): the probability of a match."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffitm.models.vision_language import find, load

AT_ONCE = 16  # pairs


class Itm:
    """A BLIP or BLIP-2 for retrieval; `argument` is a folder or Hub id."""

    version = 1
    score = "probability"

    def __init__(self, argument: str, device: str) -> None:
        from transformers import Blip2ForImageTextRetrieval, BlipForImageTextRetrieval

        kinds = {"blip": BlipForImageTextRetrieval, "blip-2": Blip2ForImageTextRetrieval}
        self.model, self.processor = load(argument, kinds, device)

    @classmethod
    def identity(cls, argument: str | None) -> dict[str, Any]:
        """The weights."""
        if argument is None:
            raise ValueError("name the model: itm:org/name")
        return {"argument": None, "weights": find(argument)[2]}

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> np.ndarray:
        """Probabilities [images, texts]."""
        pairs = [(image, text) for image in images for text in texts]
        found = [
            self._match(pairs[start : start + AT_ONCE]).float().cpu()
            for start in range(0, len(pairs), AT_ONCE)
        ]
        return torch.cat(found).view(len(images), len(texts)).numpy()

    def _match(self, pairs: Sequence[tuple[Image.Image, str]]) -> Tensor:
        inputs = self.processor(
            images=[image for image, _ in pairs],
            text=[text for _, text in pairs],
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        if self.model.config.model_type == "blip":
            scores = self.model(**inputs, use_itm_head=True).itm_score
        else:
            scores = self.model(**inputs, use_image_text_matching_head=True).logits_per_image
        matches: Tensor = scores.float().softmax(-1)[:, 1]
        return matches
