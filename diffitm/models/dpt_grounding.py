"""DPT's queries that find the boxes of a text's phrases, with their heads, which are MDETR's.

Qu et al. 2024; Kamath et al. 2021, MDETR. Tokens are those of the model's own text encoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

WIDTH = 256  # of a query
QUERIES = 100
CLASSES = 256  # places of tokens in the text, the last one for no object
ALIGNED = 64


@dataclass(frozen=True)
class Boxes:
    """What the queries found, float32: which tokens of the text a box is of, logits [B, Q, CLASSES]; boxes
    [B, Q, 4] as centre, width and height in shares of the picture; and unit vectors [B, Q, ALIGNED] to
    be compared with those of tokens."""

    logits: Tensor
    boxes: Tensor
    aligned: Tensor


class Grounding(nn.Module):
    """The queries, and the heads of what they have read."""

    def __init__(self, clip_dim: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, WIDTH))
        self.of_classes = nn.Linear(WIDTH, CLASSES)
        self.of_boxes = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
            *(nn.Linear(WIDTH, WIDTH), nn.ReLU()),
            nn.Linear(WIDTH, 4),
        )
        self.of_queries = nn.Linear(WIDTH, ALIGNED)
        self.of_tokens = nn.Linear(clip_dim, ALIGNED)

    def forward(self, read: Tensor) -> Boxes:
        """Of what the queries have read, [B, Q, WIDTH]."""
        return Boxes(
            self.of_classes(read),
            self.of_boxes(read).sigmoid(),
            normalize(self.of_queries(read), dim=-1),
        )

    def tokens(self, hidden: Tensor) -> Tensor:
        """The unit vectors [B, L, ALIGNED] of the text encoder's states float32 [B, L, clip_dim]."""
        return normalize(self.of_tokens(hidden), dim=-1)
