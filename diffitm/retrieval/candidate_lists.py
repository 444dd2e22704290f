"""Candidate lists: captions, and the lists in the published layout with what they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from diffitm.captions.read import divide, read, tell_lost
from diffitm.captions.row import CaptionRow, Reading
from diffitm.core import storage
from diffitm.core.provenance import fingerprint
from diffitm.metrics.intervals import interval, wilson

Direction = Literal["image", "text"]

FOUND = pa.schema([("position", pa.int64()), ("candidates", pa.list_(pa.int64()))])


@dataclass(frozen=True)
class Captions:
    """Unique images and captions in file order, and which is true for which (by position).

    `digest` identifies all that, `lost` is what was left out.
    """

    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    of_image: list[list[int]] = field(default_factory=list)
    of_caption: list[list[int]] = field(default_factory=list)
    digest: str = ""
    lost: list[CaptionRow] = field(default_factory=list)


def read_captions(uri: str) -> Captions:
    """The images and captions of a table, a folder or shards. An image or a caption that comes again is
    the same one.

    Raises InputError that names file, row and what is right.
    """
    good, lost = divide(read(uri, Reading(field="captions")))
    tell_lost(uri, lost)
    found = Captions(lost=lost)
    places: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for row in good:
        _add(found, places, row.image, row.texts[0])
    digest = fingerprint([found.images, found.captions, found.of_image])
    return replace(found, digest=digest)


def _add(found: Captions, places: Sequence[dict[str, int]], image: str, caption: str) -> None:
    i = places[0].setdefault(image, len(found.images))
    if i == len(found.images):
        found.images.append(image)
        found.of_image.append([])
    c = places[1].setdefault(caption, len(found.captions))
    if c == len(found.captions):
        found.captions.append(caption)
        found.of_caption.append([])
    if i not in found.of_caption[c]:
        found.of_image[i].append(c)
        found.of_caption[c].append(i)


@dataclass(frozen=True)
class Side:
    """One direction: names of queries and gallery, what is true for a query (its gold first), and
    the unreadable images, position -> reason."""

    direction: Direction
    queries: Sequence[str]
    gallery: Sequence[str]
    truth: list[list[int]]
    failed: dict[int, str]

    def image(self, query: int) -> int:
        """The image whose failure costs the query."""
        return self.truth[query][0] if self.direction == "image" else query


def write_lists(
    uri: str, found: Iterable[tuple[int, list[int]]], side: Side, k: int, insert_gold: bool
) -> dict[str, Any]:
    """Stream `found`, (query, best gallery positions) by query, to the published JSON layout.

    Returns what the list's .info.json says of it.
    """
    hits, images, inserted, short, digest = [], [], [], 0, hashlib.sha256()
    lost = dict.fromkeys(side.failed, 0)
    with storage.replacing(uri) as sink:

        def put(piece: bytes) -> None:
            sink.write(piece)
            digest.update(piece)

        put(b"{")
        separator = b"\n"
        for query, candidates in found:
            if side.image(query) in lost:
                lost[side.image(query)] += 1
                continue
            gold, name = side.truth[query][0], side.queries[query]
            hits.append(gold in candidates)
            images.append(side.image(query))
            if not hits[-1] and not insert_gold:
                continue
            if not hits[-1]:
                inserted.append(name)
            chosen = [gold, *(c for c in candidates if c != gold)][:k]
            short += len(chosen) < k
            line = f"{json.dumps(name)}: {json.dumps([side.gallery[c] for c in chosen])}"
            put(separator + line.encode())
            separator = b",\n"
        put(b"\n}\n")
    low, high = _interval(side.direction, np.array(hits, float), np.array(images))
    names = side.gallery if side.direction == "image" else side.queries
    return {
        "direction": side.direction,
        "sha256": digest.hexdigest(),
        "top_k": k,
        "queries": len(hits),
        "gallery": len(side.gallery) - (len(lost) if side.direction == "image" else 0),
        "recall_ceiling": float(np.mean(hits)) if hits else None,
        "low": low,
        "high": high,
        "gold_inserted": insert_gold,
        "left_out": 0 if insert_gold else len(hits) - sum(hits),
        "short_lists": short,
        "inserted": inserted,
        "failures": [
            {"image": names[i], "reason": side.failed[i], "queries": count}
            for i, count in lost.items()
        ],
    }


def write_info(uri: str, info: dict[str, Any]) -> None:
    """Write a list's .info.json in pieces."""
    with storage.replacing(uri) as sink:
        for piece in json.JSONEncoder(indent=1).iterencode(info):
            sink.write(piece.encode())


def _interval(
    direction: Direction, hits: np.ndarray, images: np.ndarray
) -> tuple[float | None, float | None]:
    """The recall ceiling's: captions of one image are not independent, images are."""
    if not len(hits):
        return None, None
    if direction == "text":
        return wilson(float(hits.sum()), len(hits))
    return interval(hits, images)
