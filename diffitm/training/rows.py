"""What training sees: images with captions and their hard negatives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from diffitm.captions.read import divide, read, tell_lost
from diffitm.captions.row import CaptionRow, Reading
from diffitm.core.errors import InputError

# 'none' is what objectives without wrong pairs see, 'all' what DPT does: hard and random ones of both.
NEGATIVES = ("hard-text", "random-text", "hard-image", "mixed", "all", "none")


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
        if negatives in ("hard-text", "mixed", "all") and not self.negative_captions:
            return "no negative caption"
        if negatives in ("hard-image", "mixed", "all") and not self.negative_images:
            return "no negative image"
        return None


def training_row(row: CaptionRow) -> TrainingRow:
    """The row of an image with a text."""
    return TrainingRow(row.image, row.texts[0], row.negative_captions, row.negative_images)


def read_rows(uri: str, field: str = "data") -> tuple[list[TrainingRow], dict[str, int]]:
    """A row for each caption of a table, a folder or shards, with its hard negatives if there are any; and
    what was left out (what and why -> how often).

    Raises InputError that names file, row and what is right; `field` is what the user gave the file
    with.
    """
    good, lost = divide(read(uri, Reading(negatives=True, field=field)))
    tell_lost(uri, lost)
    return list(map(training_row, good)), dict(Counter(f"{r.place}: {r.failure}" for r in lost))


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
        asked = "--objective dpt" if negatives == "all" else f"--negatives {negatives}"
        raise InputError(f"{uri}: no row is usable with {asked}: {why}")
    return kept, lost


def summarise_dropped(lost: Iterable[tuple[str, int]] | Counter[str]) -> str:
    """'3 rows: no image, 1 row: no caption'."""
    found = lost.items() if isinstance(lost, Counter) else lost
    return ", ".join(f"{n:,} row{'s' * (n > 1)}: {reason}" for reason, n in found)
