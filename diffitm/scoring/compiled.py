"""A denoiser's forwards compiled for batches of one size; without compiling where that fails."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from diffitm.core.outside import causes
from diffitm.models.denoiser import Condition, Denoiser, padded
from diffitm.scoring.batching import Batch, is_out_of_memory

log = logging.getLogger("diffitm")
LONGEST = 300  # letters of a cause
CACHED = "Dynamo detected a call to a `functools.lru_cache`"  # of diffusers' checks of versions


class CompiledPredict:
    """Denoiser.predict, compiled by torch for whole batches of `batch`, whatever its size gets to be.

    Each further shape would be a minute of compiling, and other code rounds otherwise. So a batch that is
    not full is filled up with copies of its last row, whose results are dropped, and all scores come from
    the same code. Where compiling fails, `tell` is given the cause once, and everything runs without.
    """

    def __init__(self, denoiser: Denoiser, batch: Batch) -> None:
        self.denoiser, self.batch = denoiser, batch
        self.tell: Callable[[str], object] = lambda cause: log.warning(
            "--compile failed, so the model runs without: %s", cause
        )
        warnings.filterwarnings("ignore", CACHED)
        self._compiled: Callable[..., Tensor] | None = torch.compile(
            denoiser.predict, dynamic=False
        )

    def __call__(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """As Denoiser.predict. Raises what that raises, and torch.OutOfMemoryError of compiling, too."""
        count, size = len(noised), self.batch.size
        if self._compiled is None:
            return self.denoiser.predict(noised, timesteps, condition)
        rows = torch.arange(size, device=noised.device).clamp(max=count - 1)
        # Contiguous: of latents as a VAE leaves them, in another order, there would be other code.
        if "mask" in condition:  # as long as texts can be: each length would be another shape
            condition = padded(condition, max(self.denoiser.lengths.values()))
        filled = {name: value[rows].contiguous() for name, value in condition.items()}
        try:
            return self._compiled(noised[rows].contiguous(), timesteps[rows], filled)[:count]
        except Exception as error:
            if spent := next(filter(is_out_of_memory, causes(error)), None):
                raise spent from None  # the batch is halved then
            why = _told(error)
        # Raises what is wrong with the forward itself, which then is none of compiling's.
        predicted = self.denoiser.predict(noised, timesteps, condition)
        self._compiled = None
        self.tell(why)
        return predicted


def _told(error: Exception) -> str:
    """An error of the compiler in a line: what it was raised from says most, and its first lines."""
    first = list(causes(error))[-1]
    words = " ".join(str(first).partition("\n\n")[0].split())
    return f"{type(first).__name__}: {words}"[:LONGEST]
