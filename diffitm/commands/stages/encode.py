"""Latents and encoded texts, computed once by a Ray Data stage: of a training set, texts of scores."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import save

from diffitm.core import images, storage
from diffitm.core.provenance import fingerprint
from diffitm.core.schema import PairRow
from diffitm.core.storage import join
from diffitm.distributed.item_stage import ItemStage, folder_below, run_items, work_folder
from diffitm.distributed.session import ActorPool
from diffitm.models.denoiser import rows_of
from diffitm.models.loading import (
    ModelSource,
    around_texts,
    gigabytes,
    load_denoiser,
    lora_digest,
)
from diffitm.models.sides import Side
from diffitm.scoring.batching import Batch
from diffitm.scoring.diffusion import to_input
from diffitm.scoring.encoded_items import CACHED, ROW_GROUP, Cache
from diffitm.scoring.image_reader import load_images

log = logging.getLogger("diffitm")
VERSION = 1  # grows when the same settings would give other values
AT_ONCE = {"image": 16, "text": 64}  # items of a forward
ROWS_PER_BLOCK = 4
# What large encoders (T5-XXL, Mistral-3) make of a text takes megabytes, and a block of them lies in memory.
LARGE, LARGE_AT_ONCE = 4 * 10**9, 16  # bytes of their weights in half precision


@dataclass(frozen=True)
class Encoder:
    """What an encoded image or text depends on, beside itself."""

    source: ModelSource
    variant: str | None
    dtype: str
    root: str
    resize: str
    lora: str | None = None  # one that changes text encoders

    def settings(self, kind: str) -> dict[str, Any]:
        """What encoded items depend on, beside images' files."""
        found = {
            "version": VERSION,
            "weights": self.source.digest,
            "variant": self.variant,
            "dtype": self.dtype,
        }
        if kind == "image":
            return found
        if self.lora is not None:
            found["lora"] = lora_digest(self.lora)
        if around := around_texts(self.source):
            found["around_texts"] = around
        return found


class EncodeActor:
    """Loads a side of the model once; encodes images (`kind`) or texts."""

    def __init__(self, kind: str, encoder: Encoder, device: str, counter: Any) -> None:
        self.kind, self.encoder, self.counter = kind, encoder, counter
        source = encoder.source
        side: Side = "texts" if kind == "text" and source.has_text_encoders else "network"
        self.denoiser = load_denoiser(
            source, encoder.dtype, device, encoder.variant, encoder.lora, side
        )
        self.batch = Batch(AT_ONCE["text"], "batch size of texts")

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
        """Each text's condition, or why the model refuses it."""
        model = self.denoiser
        refused = [model.refuses(name) for name in names]
        good = [name for name, why in zip(names, refused, strict=True) if why is None]
        parts = self.batch.run(len(good), lambda i, j: _packed(model.encode_texts(good[i:j])))
        values = itertools.chain.from_iterable(parts)
        return [(next(values), None) if why is None else (None, why) for why in refused]


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
    settings = encoder.settings(kind) | {"names": fingerprint(names)}
    if kind == "image":
        stamp = storage.stamp(encoder.root, sorted(set(map(images.holder, names))))
        root = storage.without_query(encoder.root)
        settings |= {"root": root, "resize": encoder.resize, "files": stamp}
    what = "latents" if kind == "image" else "texts"
    folder = join(work_folder(out, f"cache-{what}", settings), "encoded")
    if first is not None and not storage.exists(folder):
        first()
    return run_items(_stage(f"caching {what}", folder, kind, encoder), names, pool)


def encode_more_texts(
    out: str, texts: Iterable[str], encoder: Encoder, pool: ActorPool
) -> tuple[str, ...]:
    """Encode the texts that no run into `out` has encoded before; the folders with all of them, below
    OUT/work.

    What a killed run left whole counts, so the next one goes on from there.
    """
    base = folder_below(out, "texts", encoder.settings("text"))
    folders = list[str]()
    while storage.exists(part := join(base, f"{len(folders):04d}")):
        folders.append(join(part, "encoded"))
    there = Cache(*folders).place
    asked = dict.fromkeys(texts)
    missing = [text for text in asked if text not in there]
    name, known = encoder.source.name, len(asked) - len(missing)
    if known:
        log.info("%s: %s of %s texts are encoded already", name, f"{known:,}", f"{len(asked):,}")
    if missing:
        stage = _stage(f"{name}: encoding texts", join(part, "encoded"), "text", encoder)
        folders.append(run_items(stage, missing, pool))
        size = sum(size for one in folders for size, _ in storage.sizes(one).values())
        log.info("%s: its encoded texts take %s in %s", name, gigabytes(size), base)
    return tuple(folders)


def _stage(what: str, folder: str, kind: str, encoder: Encoder) -> ItemStage:
    at_once, rows = AT_ONCE[kind], ROWS_PER_BLOCK
    if kind == "text" and encoder.source.memory("bf16", "texts") > LARGE:
        at_once, rows = LARGE_AT_ONCE, 1
    return ItemStage(what, folder, CACHED, EncodeActor, (kind, encoder), at_once, rows, ROW_GROUP)
