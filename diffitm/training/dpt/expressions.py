"""Texts whose phrases are of boxes in a picture, as DPT's grounding trains on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.training.row_table import DIGEST, mapped
from diffitm.training.sampler import seed_of

Box = tuple[float, float, float, float]
Span = tuple[int, int]
EXPRESSIONS = pa.schema(
    [
        ("image", pa.string()),
        ("caption", pa.string()),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("spans", pa.list_(pa.list_(pa.list_(pa.int32())))),
    ]
)


@dataclass(frozen=True)
class Expression:
    """A text of an image below the data root. Of each box, as centre, width and height in shares of the
    picture that the model sees, `spans` are the characters of the text that name it, from and to (not
    included)."""

    image: str
    caption: str
    boxes: tuple[Box, ...]
    spans: tuple[tuple[Span, ...], ...]


def seen_box(box: Sequence[float], size: tuple[int, int], resize: str) -> Box | None:
    """A box of pixels (left, top, width, height) of an image of `size` (width, height) where the model sees
    it, by core.images.to_pixels: cut at the picture's edges, None if nothing of it is left."""
    sides = (min(size), min(size)) if resize == "crop" else size
    found = []
    for start, extent, whole, side in zip(box[:2], box[2:], size, sides, strict=True):
        begin = (whole - side) / 2
        low, high = (min(max((x - begin) / side, 0.0), 1.0) for x in (start, start + extent))
        if high <= low:
            return None
        found.append(((low + high) / 2, high - low))
    (x, width), (y, height) = found
    return x, y, width, height


@dataclass(frozen=True)
class ExpressionsFile:
    """Where a run's expressions are, and what they are."""

    uri: str
    digest: str


@dataclass(frozen=True)
class GroundingWeights:
    """Of the losses of boxes in their sum: those of Qu et al. 2024."""

    classes: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    alignment: float = 1.0


@dataclass(frozen=True)
class GroundingData:
    """The expressions that a run trains on, those of other images that are measured at its validations, if
    any, and the weights of the losses."""

    file: ExpressionsFile
    check: ExpressionsFile | None
    weights: GroundingWeights


def digest_of(expressions: Iterable[Expression]) -> str:
    """sha256 of the expressions in their order."""
    total = hashlib.sha256()
    for one in expressions:
        total.update(json.dumps([one.image, one.caption, one.boxes, one.spans]).encode())
    return total.hexdigest()


def write_expressions(uri: str, expressions: Sequence[Expression], digest: str) -> None:
    """Write them, whole or not at all."""
    columns: dict[str, Any] = {
        name: [getattr(one, name) for one in expressions] for name in EXPRESSIONS.names
    }
    schema = EXPRESSIONS.with_metadata({DIGEST: digest.encode()})
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table(columns, schema=schema), sink, compression="zstd")
    storage.make_folder(storage.parent(uri))
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


class StoredExpressions(Sequence[Expression]):
    """The expressions of a file that write_expressions made, mapped into memory.

    Raises InputError if the file has others than it should.
    """

    def __init__(self, file: ExpressionsFile) -> None:
        self.table = mapped(file.uri)
        if (self.table.schema.metadata or {}).get(DIGEST) != file.digest.encode():
            raise InputError(f"{file.uri} has other expressions than this run: delete it")
        self.columns = [self.table.column(name) for name in EXPRESSIONS.names]
        self.places: dict[str, list[int]] = {}
        for place, image in enumerate(self.table.column("image").to_pylist()):
            self.places.setdefault(image, []).append(place)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: Any) -> Any:
        image, caption, boxes, spans = (column[int(position)].as_py() for column in self.columns)
        return Expression(
            image,
            caption,
            tuple(map(tuple, boxes)),
            tuple(tuple(map(tuple, own)) for own in spans),
        )

    def draw(self, image: str, seed: int) -> Expression | None:
        """One of an image's, which the seed determines; None of an image that has none."""
        places = self.places.get(image)
        if not places:
            return None
        found: Expression = self[places[seed_of("expression", seed) % len(places)]]
        return found
