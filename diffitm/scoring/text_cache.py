"""A bounded cache of encoded texts."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffitm.scoring.batching import Batch

TEXT_CACHE_BYTES = 512 * 2**20


class TextCache:
    """Encodes each text once while it stays among the most recently used `limit_bytes`.

    `encode` maps texts to a dictionary of tensors [B, ...]. `encoded` counts the texts encoded.
    `batch` is how many texts are encoded at once.
    """

    def __init__(
        self, encode: Callable[[Sequence[str]], dict[str, Tensor]], limit_bytes: int, batch: int
    ) -> None:
        self.encode, self.limit = encode, limit_bytes
        self.batch = Batch(batch, "batch size of texts")
        self.kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self.used = 0
        self.encoded = 0

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The encoded texts in order, [B, ...] each; `texts` are distinct."""
        missing = [text for text in texts if text not in self.kept]
        found = {text: self.kept[text] for text in texts if text in self.kept}
        parts = self.batch.run(len(missing), lambda i, j: _rows(self.encode(missing[i:j]), j - i))
        found |= zip(missing, itertools.chain.from_iterable(parts), strict=True)
        self.encoded += len(missing)
        for text in texts:
            self._keep(text, found[text])
        return {name: torch.cat([found[t][name] for t in texts]) for name in found[texts[0]]}

    def _keep(self, text: str, value: dict[str, Tensor]) -> None:
        if text in self.kept:
            self.kept.move_to_end(text)
            return
        self.kept[text] = value
        self.used += _size(value)
        while self.used > self.limit and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.used -= _size(dropped)


def _rows(encoded: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Each row as a copy, so that a kept one does not keep its whole batch alive."""
    return [{k: value[i : i + 1].clone() for k, value in encoded.items()} for i in range(count)]


def _size(value: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in value.values())
