"""Latents and encoded texts of a training set, computed once by a Ray Data stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save

from diffitm.core import images, storage
from diffitm.core.provenance import fingerprint
from diffitm.core.schema import PairRow
from diffitm.core.storage import join
from diffitm.distributed.item_stage import ItemStage, run_items, work_folder
from diffitm.distributed.session import ActorPool
from diffitm.models.denoiser import rows_of
from diffitm.models.loading import ModelSource, load_denoiser
from diffitm.scoring.diffusion import to_input
from diffitm.scoring.image_reader import load_images
from diffitm.training.latent_cache import CACHED, ROW_GROUP

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other values
AT_ONCE = {"image": 16, "text": 64}  # items of a forward
ROWS_PER_BLOCK = 4


@dataclass(frozen=True)
class Encoder:
    """What an encoded image or text depends on, beside itself."""

    source: ModelSource
    variant: str | None
    dtype: str
    root: str
    resize: str


class EncodeActor:
    """Loads the model once; encodes images (`kind`) or texts."""

    def __init__(self, kind: str, encoder: Encoder, device: str, counter: Any) -> None:
        self.kind, self.encoder, self.counter = kind, encoder, counter
        self.denoiser = load_denoiser(encoder.source, encoder.dtype, device, encoder.variant)

    def __call__(self, table: pa.Table) -> pa.Table:
        lines = []
        for group in table.to_pylist():
            names = group["names"]
            made = self._images(names) if self.kind == "image" else self._texts(names)
            for position, (name, (value, failure)) in enumerate(
                zip(names, made, strict=True), group["start"]
            ):
                line = {"row": group["row"], "position": position, "name": name}
                lines.append({**line, "failure": failure, "value": value})
            self.counter.add.remote(len(names))
        return pa.Table.from_pylist(lines, CACHED)

    def _images(self, names: list[str]) -> list[tuple[bytes | None, str | None]]:
        """Mean and deviation of each image's latents."""
        model = self.denoiser
        rows = [PairRow(i, name, []) for i, name in enumerate(names)]
        loaded = load_images(
            rows, self.encoder.root, lambda image: to_input(image, model, self.encoder.resize)
        )
        good = [item.value for item in loaded if item.failure is None]
        values: Iterator[bytes] = iter(())
        if good:
            mean, deviation = model.encode_posterior(torch.stack(good))
            values = iter(_packed({"mean": mean, "deviation": deviation}))
        return [(None if item.failure else next(values), item.failure) for item in loaded]

    def _texts(self, names: list[str]) -> list[tuple[bytes | None, str | None]]:
        return [(value, None) for value in _packed(self.denoiser.encode_texts(names))]


def _packed(values: dict[str, torch.Tensor]) -> list[bytes]:
    """Each row of the tensors [B, ...] as safetensors, of masked texts without their padding."""
    rows = rows_of({name: value.cpu() for name, value in values.items()})
    return [save({name: value[0].contiguous() for name, value in row.items()}) for row in rows]


def encode(
    out: str,
    kind: str,
    names: list[str],
    encoder: Encoder,
    pool: ActorPool,
    first: Callable[[], None] | None = None,
) -> str:
    """Encode the images or texts (`kind`) that are not encoded yet; the folder of all of them.

    It lies below work/ beside `out`, so that runs beside each other share it. `first` is called where
    nothing is encoded yet.
    """
    settings: dict[str, Any] = {
        "version": VERSION,
        "weights": encoder.source.digest,
        "variant": encoder.variant,
        "dtype": encoder.dtype,
        "names": fingerprint(names),
    }
    if kind == "image":
        stamp = storage.stamp(encoder.root, sorted(set(map(images.holder, names))))
        root = storage.without_query(encoder.root)
        settings |= {"root": root, "resize": encoder.resize, "files": stamp}
    what = "latents" if kind == "image" else "texts"
    folder = join(work_folder(out, f"cache-{what}", settings), "encoded")
    if first is not None and not storage.exists(folder):
        first()
    stage = ItemStage(
        f"caching {what}",
        folder,
        CACHED,
        EncodeActor,
        (kind, encoder),
        AT_ONCE[kind],
        ROWS_PER_BLOCK,
        ROW_GROUP,
    )
    return run_items(stage, names, pool)
