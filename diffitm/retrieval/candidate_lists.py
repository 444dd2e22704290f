"""Candidate lists: captions files, and the lists in the published layout with what they are."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.metrics.intervals import interval, wilson

Direction = Literal["image", "text"]

FOUND = pa.schema([("position", pa.int64()), ("candidates", pa.list_(pa.int64()))])


@dataclass(frozen=True)
class Captions:
    """Unique images and captions in file order, and which is true for which (by position).

    `digest` identifies the file's content.
    """

    images: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    of_image: list[list[int]] = field(default_factory=list)
    of_caption: list[list[int]] = field(default_factory=list)
    digest: str = ""


def read_captions(uri: str) -> Captions:
    """Read [{"image": path, "caption": [..]}], {path: [captions]}, or .tsv/.csv with a header.

    Quotes mean nothing in a .tsv. An image or a caption that comes again is the same one. Raises
    InputError that names file, row and what is right.
    """
    try:
        data = storage.read_bytes(uri)
        text = data.decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", "captions") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f": {uri} cannot be read: {error}", "captions") from error
    found = Captions(digest=hashlib.sha256(data).hexdigest())
    places: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for where, image, captions in _rows(uri, text):
        captions = [captions] if isinstance(captions, str) else captions
        for value in (image, *captions) if isinstance(captions, list) and captions else (None,):
            if not isinstance(value, str) or not value.strip():
                shown = json.dumps([image, captions], default=str)[:120]
                raise InputError(
                    f"{uri}, {where}: expects an image path and one or more captions that are not "
                    f"empty, found {shown}"
                )
        for caption in captions:
            _add(found, places, image, caption)
    if not found.images:
        raise InputError(f"{uri} holds no image with a caption")
    return found


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


def _rows(uri: str, text: str) -> Iterator[tuple[str, Any, Any]]:
    """Where a row stands, its image and its caption or captions, unchecked."""
    name = storage.without_query(uri).lower()
    if name.endswith((".tsv", ".csv")):
        plain: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        lines = csv.DictReader(io.StringIO(text), **(plain if name.endswith(".tsv") else {}))
        if not {"image", "caption"} <= set(lines.fieldnames or ()):
            raise InputError(f"{uri}: its first line must name the columns image and caption")
        try:
            for line in lines:
                yield f"line {lines.line_num}", line["image"], line["caption"]
        except csv.Error as error:
            raise InputError(f"{uri}, line {lines.line_num}: not CSV: {error}") from error
        return
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{uri}: neither JSON nor named .tsv or .csv: {error}") from error
    if isinstance(entries, dict):
        yield from ((f"key {key!r}", key, value) for key, value in entries.items())
        return
    if not isinstance(entries, list):
        raise InputError(f'{uri}: must hold [{{"image": .., "caption": [..]}}] or {{image: [..]}}')
    for number, entry in enumerate(entries, 1):
        known = entry if isinstance(entry, dict) else {}
        yield f"row {number}", known.get("image"), known.get("caption")


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
