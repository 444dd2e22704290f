"""A bounded cache of encoded texts."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from diffitm.models.denoiser import Condition, rows_of, select, stack
from diffitm.scoring.batching import Batch

TEXT_CACHE_BYTES = 512 * 2**20


class TextCache:
    """Encodes each text once while it stays among the most recently used `limit_bytes`.

    `encode` maps texts to a condition [B, ...]; of a masked one the texts' own tokens alone are kept.
    `encoded` counts the texts encoded.
    `batch` is how many texts are encoded at once.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], Condition], limit_bytes: int, batch: int
    ) -> None:
        self.encode, self.limit = encode, limit_bytes
        self.batch = Batch(batch, "batch size of texts")
        self.kept: OrderedDict[str, Condition] = OrderedDict()
        self.used = 0
        self.encoded = 0

    def __call__(self, texts: Sequence[str]) -> Condition:
        """The encoded texts in order, [B, ...] each; `texts` are distinct."""
        missing = [text for text in texts if text not in self.kept]
        found = {text: self.kept[text] for text in texts if text in self.kept}
        parts = self.batch.run(len(missing), lambda i, j: rows_of(self.encode(missing[i:j])))
        found |= zip(missing, itertools.chain.from_iterable(parts), strict=True)
        self.encoded += len(missing)
        for text in texts:
            self._keep(text, found[text])
        return stack([found[text] for text in texts])

    def repeated(self, texts: Sequence[str]) -> Condition:
        """The same of texts that need not be distinct, as tensors that a graph may keep."""
        unique = list(dict.fromkeys(texts))
        found = {name: value.clone() for name, value in self(unique).items()}
        return select(found, torch.tensor([unique.index(text) for text in texts]))

    def _keep(self, text: str, value: Condition) -> None:
        if text in self.kept:
            self.kept.move_to_end(text)
            return
        self.kept[text] = value
        self.used += _size(value)
        while self.used > self.limit and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.used -= _size(dropped)


def _size(value: Condition) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in value.values())
