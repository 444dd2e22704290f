"""DiT in the diffusers layout: a transformer conditioned on a class of ImageNet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from diffitm.models.denoiser import Condition
from diffitm.models.folder import Folder
from diffitm.models.latent_diffusion import LatentDiffusion


class Dit(LatentDiffusion):
    """A class-conditional diffusion transformer (Peebles and Xie 2023).

    The condition is {"hidden": [B, L, D]}: vectors whose mean stands where a class's embedding
    stands. A text stands for the classes whose labels it contains as whole words, whatever the case
    and the longest label at each place; '' for the null class. Raises OSError if a part cannot be read,
    there are no labels or the blocks' class tables differ.
    """

    takes_lora = False

    def __init__(self, parts: Folder) -> None:
        self.transformer = parts.model(DiTTransformer2DModel, "transformer")
        super().__init__(parts, self.transformer, parts.vae())
        self.table = _take_table(self.transformer)
        self.null = int(self.transformer.config.num_embeds_ada_norm)
        self.classes = _classes(parts.index().get("id2label"), self.null)
        longest_first = sorted(self.classes, key=len, reverse=True)
        labels = "|".join(re.escape(label) for label in longest_first)
        self.pattern = re.compile(rf"(?<!\w)(?:{labels})(?!\w)")

    def refuses(self, text: str) -> str | None:
        """See Denoiser."""
        return None if self._rows(text) else "the text names no class of this model's id2label"

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str]) -> Condition:
        """See Denoiser. L is 1: the mean of the classes that a text names.

        Raises ValueError for a text that names none.
        """
        for text in texts:
            if reason := self.refuses(text):
                raise ValueError(f"{text!r}: {reason}")
        hidden = [self.table[self._rows(text)].mean(0, keepdim=True) for text in texts]
        return {"hidden": torch.stack(hidden)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See Denoiser. The learned variance, the output's other channels, is left out."""
        given = condition["hidden"].mean(1).to(self.dtype)
        out = self.transformer(noised.to(self.dtype), timesteps, given, return_dict=False)[0]
        return out[:, : self.latent_shape[0]].float()

    def _rows(self, text: str) -> list[int]:
        """Rows of the table that a text stands for."""
        if not text:
            return [self.null]
        found = self.pattern.findall(_plain(text))
        return sorted({number for label in found for number in self.classes[label]})


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _classes(id2label: Any, count: int) -> dict[str, list[int]]:
    """Label -> its classes, from class -> 'label one, label two'; a label may name several."""
    found: dict[str, list[int]] = {}
    for number, labels in id2label.items() if isinstance(id2label, dict) else ():
        if not number.isdigit() or int(number) >= count:
            raise OSError(f"id2label of model_index.json: {number!r} is not one of {count} classes")
        for label in filter(None, map(_plain, str(labels).split(","))):
            found.setdefault(label, []).append(int(number))
    if not found:
        raise OSError("model_index.json has no id2label (class -> 'label one, label two')")
    return found


def _take_table(transformer: Any) -> Tensor:
    """The class embeddings [classes + 1, D]; the blocks then take such vectors instead of classes.

    diffusers gives each block a copy of the table, and the published conversion copies one.
    """
    embeddings = [block.norm1.emb for block in transformer.transformer_blocks]
    tables = [part.class_embedder.embedding_table.weight for part in embeddings]
    if not all(torch.equal(table, tables[0]) for table in tables[1:]):
        raise OSError("the transformer's blocks have different class tables, not copies of one")
    given = nn.Identity()
    for part in embeddings:
        part.class_embedder = given
    return tables[0]
