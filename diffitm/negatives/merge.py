"""Rows with the negatives that were made for them, in the files that training reads."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from pyarrow import parquet

from diffitm.captions.read import divide, read, tell_lost
from diffitm.captions.row import CaptionRow, Reading
from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.negatives.rules import normal, tidy
from diffitm.training.rows import TrainingRow, training_row

GIVEN, MODEL = "given", "llm"
TRUE, REPEATED, EQUAL = "another caption of the image", "repeats another", "equals the caption"
EMPTY = "empty"
TSV_HEADER = ("", "title", "filepath", "neg_caption", "neg_image")
ROWS = pa.schema(
    [
        ("image", pa.string()),
        ("caption", pa.string()),
        ("negative_captions", pa.list_(pa.string())),
        ("kinds", pa.list_(pa.string())),
        ("negative_images", pa.list_(pa.string())),
    ]
)


@dataclass(frozen=True)
class Rejected:
    """A negative caption that was left out, and why."""

    caption: str
    text: str
    kind: str
    reason: str


def read_pairs(uri: str) -> tuple[list[TrainingRow], list[CaptionRow]]:
    """A row for each caption of a table, a folder or shards, and what was left out: what has no image, no
    caption or a caption without a word.

    Raises InputError that names file, row and what is right.
    """
    good, lost = divide(read(uri, Reading(negatives=True, field="captions")))
    for row in good:
        if not normal(row.texts[0]):
            lost.append(row._replace(failure=f"its caption {row.texts[0]!r} has no word"))
    tell_lost(uri, lost)
    rows = [training_row(row) for row in good if normal(row.texts[0])]
    if not rows:
        raise InputError(f": {uri}: no caption has a word; {lost[0].place}", "captions")
    return rows, lost


def mine(
    rows: Sequence[TrainingRow],
    made: Mapping[str, Mapping[str, str]],
    answers: Mapping[str, tuple[str, str | None]],
    near: Mapping[str, Sequence[str]],
    check: Callable[[str, str], str | None],
) -> tuple[list[TrainingRow], list[tuple[str, ...]], list[Rejected]]:
    """The rows with more negatives, the kinds of their negative captions, and what was left out.

    `made` are captions of rules by caption and kind, `answers` a language model's (text, problem) by
    caption, which `check` (negatives.checker) judges, and `near` images by image. None says the same
    as the caption, as another caption of its image, or as another negative of its row.
    """
    true: dict[str, set[str]] = {}
    for row in rows:
        true.setdefault(row.image, set()).add(normal(row.caption))
    out, kinds, rejected = [], [], []
    for row in rows:
        offers: list[tuple[str, str, str | None]]
        offers = [(text, GIVEN, None) for text in row.negative_captions]
        offers += [(text, kind, None) for kind, text in made.get(row.caption, {}).items()]
        if row.caption in answers:
            text, problem = answers[row.caption]
            text = tidy(text)
            offers.append((text, MODEL, problem or check(row.caption, text)))
        kept: dict[str, tuple[str, str]] = {}
        for text, kind, problem in offers:
            reason = problem or _reason(normal(text), row, true[row.image], kept)
            if reason is None:
                kept[normal(text)] = (text, kind)
            else:
                rejected.append(Rejected(row.caption, text, kind, reason))
        images = dict.fromkeys((*row.negative_images, *near.get(row.image, ())))
        images.pop(row.image, None)
        captions = tuple(text for text, _ in kept.values())
        out.append(replace(row, negative_captions=captions, negative_images=tuple(images)))
        kinds.append(tuple(kind for _, kind in kept.values()))
    return out, kinds, rejected


def _reason(words: str, row: TrainingRow, true: set[str], kept: Mapping[str, object]) -> str | None:
    if not words:
        return EMPTY
    if words == normal(row.caption):
        return EQUAL
    if words in true:
        return TRUE
    return REPEATED if words in kept else None


def write_rows(uri: str, rows: Sequence[TrainingRow], kinds: Sequence[tuple[str, ...]]) -> None:
    """Write the NegCLIP layout (.tsv, where a negative image is the first line that has it) or
    Parquet (ROWS), whole or not at all. A .tsv has no place for kinds.
    """
    storage.make_folder(storage.parent(uri))
    with storage.replacing(uri) as sink:
        if storage.without_query(uri).endswith(".tsv"):
            _write_tsv(sink, rows)
            return
        columns = [
            [row.image for row in rows],
            [row.caption for row in rows],
            [row.negative_captions for row in rows],
            kinds,
            [row.negative_images for row in rows],
        ]
        table = pa.table(dict(zip(ROWS.names, columns, strict=True)), schema=ROWS)
        parquet.write_table(table, sink)


def _write_tsv(sink: pa.NativeFile, rows: Sequence[TrainingRow]) -> None:
    lines = first_lines(rows)
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(TSV_HEADER)
    for number, row in enumerate(rows):
        images = [lines[image] for image in row.negative_images]
        captions = list(row.negative_captions)
        writer.writerow([number, row.caption, row.image, repr(captions), repr(images)])
        sink.write(text.getvalue().encode())
        text.seek(0)
        text.truncate()


def first_lines(rows: Sequence[TrainingRow]) -> dict[str, int]:
    """The first row of each image."""
    found: dict[str, int] = {}
    for number, row in enumerate(rows):
        found.setdefault(row.image, number)
    return found
