"""What training sees: images with captions and their hard negatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
from pyarrow import parquet

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.tasks.coco_neg import read_pairs
from diffitm.tasks.csv_files import csv_table, malformed_in

# 'none' is what objectives without wrong pairs see.
NEGATIVES = ("hard-text", "random-text", "hard-image", "mixed", "none")
COLUMNS = ("image", "caption")
LISTS = ("negative_captions", "negative_images")


@dataclass(frozen=True)
class TrainingRow:
    """An image below the data root, its caption, and captions and images that do not fit."""

    image: str
    caption: str
    negative_captions: tuple[str, ...] = ()
    negative_images: tuple[str, ...] = ()

    def lacks(self, negatives: str) -> str | None:
        """What the row misses for this kind of negatives, None if nothing."""
        if not self.image.strip():
            return "no image"
        if not self.caption.strip():
            return "no caption"
        if negatives in ("hard-text", "mixed") and not self.negative_captions:
            return "no negative caption"
        if negatives in ("hard-image", "mixed") and not self.negative_images:
            return "no negative image"
        return None


def read_rows(uri: str, field: str = "data") -> list[TrainingRow]:
    """Rows of a file in the NegCLIP layout (.tsv) or of Parquet with the columns image, caption and,
    if there are any, negative_captions and negative_images (lists of texts).

    Raises InputError that names file, row and what is right; `field` is what the user gave the file
    with.
    """
    if storage.without_query(uri).endswith(".tsv"):
        malformed = malformed_in(uri)
        pairs = read_pairs(csv_table(_text(uri, field), uri, malformed, "\t"), malformed)
        return [
            TrainingRow(
                pair.image,
                pair.title,
                tuple(pair.neg_captions),
                tuple(pairs[i].image for i in pair.neg_images if 0 <= i < len(pairs)),
            )
            for pair in pairs
        ]
    return _read_parquet(uri, field)


def drop_equal(rows: Sequence[TrainingRow]) -> tuple[list[TrainingRow], int]:
    """The rows without negatives that are empty or equal the row's own caption or image, and how many
    negatives that were."""
    kept = [
        replace(
            row,
            negative_captions=tuple(
                c for c in row.negative_captions if c.strip() and c.strip() != row.caption.strip()
            ),
            negative_images=tuple(i for i in row.negative_images if i and i != row.image),
        )
        for row in rows
    ]
    return kept, sum(map(_negatives, rows)) - sum(map(_negatives, kept))


def _negatives(row: TrainingRow) -> int:
    return len(row.negative_captions) + len(row.negative_images)


def _text(uri: str, field: str) -> str:
    try:
        return storage.read_text(uri)
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", field) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f": {uri} cannot be read: {error}", field) from error


def _read_parquet(uri: str, field: str) -> list[TrainingRow]:
    found, path = storage.filesystem(uri)
    try:
        table = parquet.read_table(path, filesystem=found)
    except FileNotFoundError:
        raise InputError(f": there is no file {uri}", field) from None
    except (OSError, pa.ArrowInvalid) as error:
        raise InputError(f": {uri} is neither .tsv nor Parquet: {error}", field) from error
    for name in COLUMNS:
        if name not in table.column_names:
            raise InputError(f"{uri}: no column {name}; it has {', '.join(table.column_names)}")
    rows = []
    for number, line in enumerate(table.to_pylist()):
        texts = [line[name] or "" for name in COLUMNS]
        lists = [line.get(name) or [] for name in LISTS]
        if not all(isinstance(text, str) for text in (*texts, *lists[0], *lists[1])):
            wanted = f"texts in {', '.join(COLUMNS)}, lists of texts in {', '.join(LISTS)}"
            raise InputError(f"{uri}, row {number}: expects {wanted}, found {str(line)[:120]}")
        rows.append(TrainingRow(texts[0], texts[1], tuple(lists[0]), tuple(lists[1])))
    return rows


def images_of(rows: Sequence[TrainingRow]) -> list[str]:
    """Every image once, sorted: whichever of them an objective needs, runs share what is encoded."""
    return sorted({path for row in rows for path in (row.image, *row.negative_images) if path})


def texts_of(rows: Sequence[TrainingRow]) -> list[str]:
    """Every text once, sorted, with '', the unconditional one."""
    return sorted({"", *(text for row in rows for text in (row.caption, *row.negative_captions))})


def usable(rows: Sequence[TrainingRow], negatives: str, uri: str) -> tuple[list[int], Counter[str]]:
    """Positions of the rows that training can use, and why how many others cannot.

    Raises InputError if none can.
    """
    reasons = [row.lacks(negatives) for row in rows]
    kept = [position for position, reason in enumerate(reasons) if reason is None]
    lost = Counter(reason for reason in reasons if reason is not None)
    if not kept:
        why = summarise_dropped(lost) or "it holds no row"
        raise InputError(f"{uri}: no row is usable with --negatives {negatives}: {why}")
    return kept, lost


def summarise_dropped(lost: Iterable[tuple[str, int]] | Counter[str]) -> str:
    """'3 rows: no image, 1 row: no caption'."""
    found = lost.items() if isinstance(lost, Counter) else lost
    return ", ".join(f"{n:,} row{'s' * (n > 1)}: {reason}" for reason, n in found)
