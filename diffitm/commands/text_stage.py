"""Texts that are encoded before they are scored, by actors that hold text encoders alone: of which models,
and into what."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffitm.core.errors import InputError
from diffitm.models.loading import gigabytes
from diffitm.models.lora import read_lora
from diffitm.models.lora_formats import changes_texts
from diffitm.scoring.specs import DiffusionSpec
from diffitm.store.pair_table import WorkTable, work_texts

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool

log = logging.getLogger("diffitm")
SMALL = 4 * 10**9  # bytes that every GPU is taken to have, as asking one takes seconds


@dataclass(frozen=True)
class TextPlaces:
    """Where texts are encoded: by the scoring actors of `pool`, or in a stage before. `where` is 'auto',
    'resident' or 'stage', `generates` whether the models also make images, which takes all of a model."""

    where: str
    pool: ActorPool
    generates: bool = False

    def place(self, specs: Sequence[DiffusionSpec]) -> list[DiffusionSpec]:
        """The specs, each with `staged` set.

        Raises InputError for a stage of a model without text encoders, and for what no GPU has room for.
        """
        return [replace(spec, staged=self._is_staged(spec)) for spec in specs]

    def _is_staged(self, spec: DiffusionSpec) -> bool:
        source, dtype = spec.source, spec.dtype
        if self.where == "resident":
            return False
        if not source.has_text_encoders:
            if self.where == "stage":
                raise InputError(f"stage: {source.name!r} has no text encoders", "text_encoders")
            return False
        whole = source.memory(dtype)
        if whole <= SMALL or not self.pool.gpus or not self.free:
            return self.where == "stage"
        if self.where == "auto" and whole <= min(self.free) * min(1.0, self.pool.gpus):
            return False
        texts, network = source.memory(dtype, "texts"), source.memory(dtype, "network")
        sizes = f"its network and VAE are {gigabytes(network)} in {dtype}"
        sizes += f", its text encoders {gigabytes(texts)}"
        room = f"a GPU has {gigabytes(max(self.free))} free"
        if max(texts, network) > max(self.free):
            raise InputError(
                f"{source.name!r}: {sizes}, {room}: --dtype fp16 or bf16, a smaller model, or a larger GPU",
                source.field,
            )
        if self.where == "stage":
            return True
        if self.generates:
            raise InputError(
                f"{source.name!r}: {sizes}, {room}, and images are made with both on one GPU: --dtype fp16 "
                "or bf16, a smaller model, a larger GPU, or a run that makes no images",
                source.field,
            )
        text = "%s: %s, %s: its texts are encoded in a stage before (--text-encoders stage)"
        log.info(text, source.name, sizes, room)
        return True

    @functools.cached_property
    def free(self) -> list[int]:
        """Bytes that GPUs have free, one of each node that has some."""
        from diffitm.distributed import session

        return session.free_gpu_memory(self.pool.gpus)


def with_texts(spec: DiffusionSpec, table: WorkTable, out: str, pool: ActorPool) -> DiffusionSpec:
    """The spec with the texts of a work table encoded, below OUT/work."""
    from diffitm.commands.stages.encode import Encoder, encode_more_texts

    lora = spec.lora if spec.lora and changes_texts(read_lora(spec.lora)[0]) else None
    encoder = Encoder(spec.source, spec.variant, spec.dtype, spec.root, spec.resize, lora)
    # With the empty text an actor measures its rate.
    texts = dict.fromkeys(["", *work_texts(table)])
    return replace(spec, encoded=encode_more_texts(out, texts, encoder, pool))
