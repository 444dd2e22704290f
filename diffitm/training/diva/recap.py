"""Which of CLIP's visual tokens the teacher sees, and how they meet the text (DIVA, Wang et al. 2024).

recap = [class token] + some patch tokens        [B, K, W]
condition = text embedding + Linear(recap)       [B, K, D]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from diffitm.core.errors import InputError
from diffitm.training.sampler import seed_of

FORMS = "class-only, all, random:SHARE, random:SHARE:replaced or pool:WINDOW"


@dataclass(frozen=True)
class Recap:
    """The first token and, of P patch tokens, `strategy`:

    class-only  none
    all         every one
    random      floor(density x P) drawn for each image, each once or, `replaced`, any number of times
    pool        means over `window` in a row along the sequence; a rest that fills none is dropped
    """

    strategy: str
    density: float = 1.0
    window: int = 1
    replaced: bool = False

    def kept(self, patches: int) -> int:
        """How many tokens stand for `patches` patches; the class token comes on top.

        Raises InputError for a recap that keeps none of them without saying so.
        """
        if self.strategy == "class-only":
            return 0
        if self.strategy == "random":
            # 1e-9: 0.29 x 100 is 28.999..; 29 are meant.
            count = math.floor(self.density * patches + 1e-9)
        else:
            count = patches // self.window
        if count == 0:
            least = f"random:{1 / patches:.4f}" if self.strategy == "random" else f"pool:{patches}"
            raise InputError(
                f"{self}: keeps none of this CLIP's {patches} patch tokens; the sparsest is "
                f"{least}, without any it is class-only",
                "recap",
            )
        return count

    def __str__(self) -> str:
        if self.strategy == "random":
            return f"random:{self.density:g}" + (":replaced" if self.replaced else "")
        return f"pool:{self.window}" if self.strategy == "pool" else self.strategy

    def draw(self, seeds: Sequence[int], patches: int) -> Tensor | None:
        """Indices [B, K - 1] into the patches, each row a function of its seed; None if not random."""
        if self.strategy != "random":
            return None
        count = self.kept(patches)
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed_of(seed, "recap"))
            if self.replaced:
                rows.append(torch.randint(patches, (count,), generator=generator))
            else:
                rows.append(torch.randperm(patches, generator=generator)[:count])
        return torch.stack(rows)

    def __call__(self, tokens: Tensor, indices: Tensor | None = None) -> Tensor:
        """The recap [B, K, W] of tokens [B, 1 + P, W]; `indices` [B, K - 1] as draw() gives them."""
        first, patches = tokens[:, :1], tokens[:, 1:]
        if self.strategy == "class-only":
            return first
        if self.strategy == "random":
            if indices is None:
                raise ValueError("a random recap needs indices")
            places = indices.to(tokens.device)[..., None].expand(-1, -1, tokens.shape[-1])
            return torch.cat([first, patches.gather(1, places)], dim=1)
        if self.strategy == "pool":
            pooled = avg_pool1d(patches.transpose(1, 2), self.window).transpose(1, 2)
            return torch.cat([first, pooled], dim=1)
        return tokens


def parse_recap(text: str) -> Recap:
    """'random:0.3' and so on as a Recap.

    Raises InputError that says what is right.
    """
    name, *values = text.split(":")
    try:
        if name in ("class-only", "all") and not values:
            return Recap(name, 0.0 if name == "class-only" else 1.0)
        if name == "pool" and len(values) == 1 and int(values[0]) >= 1:
            return Recap(name, 1 / int(values[0]), window=int(values[0]))
        if name == "random" and values[1:] in ([], ["replaced"]) and 0 < float(values[0]) <= 1:
            return Recap(name, float(values[0]), replaced=bool(values[1:]))
    except (ValueError, IndexError):
        pass
    raise InputError(
        f"{text!r}: must be {FORMS}, with a share above 0 and at most 1, or a window in tokens",
        "recap",
    )


def add_text(recap: Tensor, text: Tensor, how: str) -> Tensor:
    """The projected recap [B, K, D] and the text's hidden states [L, D]: `how` 'none' leaves them
    out, 'mean' adds their mean to each token, 'tokens' adds them one to one, which needs K = L."""
    if how == "none":
        return recap
    if how == "mean":
        return recap + text.mean(0)
    return recap + text
