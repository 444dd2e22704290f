"""Rows that workers read by position from a file."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from diffitm.core.errors import InputError
from diffitm.distributed.trainer import hand_over
from diffitm.training.image_pool import Paths
from diffitm.training.row_table import TOGETHER, StoredRows, digest_of, write_rows
from diffitm.training.rows import TrainingRow
from diffitm.training.sampler import BatchSampler

ROWS = [
    TrainingRow("a/\u00e9 #1.jpg", "a 'red' cup", ("a cap", ""), ("b.jpg",)),
    TrainingRow("", "no image"),
    TrainingRow("x.tar#bytes=3,4", "", (), ("c", "d")),
]


def test_rows_come_back_by_position(tmp_path: Path) -> None:
    """In any order, and which of them training can use."""
    file = hand_over(str(tmp_path / "out"), ROWS, [2, 0])
    stored = StoredRows(file)
    assert [stored[i] for i in (2, 0, 1)] == [ROWS[2], ROWS[0], ROWS[1]]
    assert list(stored) == ROWS
    assert stored.kept.tolist() == [0, 2]
    assert (len(stored), file.usable) == (3, 2)
    assert file.uri.startswith(str(tmp_path / "work"))


def test_the_same_rows_are_written_once(tmp_path: Path) -> None:
    """Runs beside each other read one file; other rows, or other usable ones, have another."""
    files = [hand_over(str(tmp_path / name), ROWS, [0, 2]) for name in ("a", "b")]
    written = Path(files[0].uri).stat().st_mtime_ns
    assert files[0] == files[1]
    other = hand_over(str(tmp_path / "c"), ROWS[::-1], [0, 2])
    fewer = hand_over(str(tmp_path / "c"), ROWS, [0])
    assert len({file.uri for file in (files[0], other, fewer)}) == 3
    assert Path(files[0].uri).stat().st_mtime_ns == written


def test_other_rows_than_the_runs_are_refused(tmp_path: Path) -> None:
    file = hand_over(str(tmp_path / "out"), ROWS, [0])
    write_rows(file.uri, ROWS[:1], [0], digest_of(ROWS[:1], [0]))
    with pytest.raises(InputError, match=r"rows\.parquet has other rows than this run: delete it"):
        StoredRows(file)


def test_many_rows(tmp_path: Path) -> None:
    """More than are decoded at once; a job carries their place alone."""
    paths: Sequence[TrainingRow] = Paths([f"{i:07}.jpg" for i in range(TOGETHER + 5)])
    file = hand_over(str(tmp_path / "out"), paths, range(len(paths)))
    stored = StoredRows(file)
    assert stored[TOGETHER + 4] == TrainingRow(f"{TOGETHER + 4:07}.jpg", "")
    assert len(stored.kept) == TOGETHER + 5
    assert len(pickle.dumps(file)) < 1000


def test_a_schedule_of_stored_rows_is_that_of_the_rows(tmp_path: Path) -> None:
    rows = [TrainingRow(f"{i}.jpg", f"c{i}", (f"n{i}",), (f"{i}-x.jpg",)) for i in range(30)]
    kept = [i for i in range(30) if i % 7]
    stored = StoredRows(hand_over(str(tmp_path / "out"), rows, kept))
    plain = BatchSampler(rows, kept, 4, 2, "mixed", False, 0)
    read = replace(plain, rows=stored, kept=stored.kept)
    assert all(read.batches(step) == plain.batches(step) for step in range(6))
