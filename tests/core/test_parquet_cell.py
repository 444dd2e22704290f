"""Row groups of images that are kept, by their bytes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core import parquet_cell as cell


def test_groups_are_kept_as_far_as_their_bytes_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest always, however large; none is read again while it is kept."""
    images = [bytes([number]) * 1000 for number in range(8)]
    uri = str(tmp_path / "images.parquet")
    parquet.write_table(pa.table({"image": images}), uri, row_group_size=2)
    cell._groups.clear()

    def kept() -> list[int]:
        return [group for _, _, group, _ in cell._groups]

    monkeypatch.setattr(cell, "KEPT_BYTES", 5000)  # two groups and a half
    found = [cell.parquet_cell(uri, row, "image") for row in (0, 2, 1, 4)]
    assert found == [images[row] for row in (0, 2, 1, 4)]
    assert kept() == [0, 2]
    monkeypatch.setattr(cell, "KEPT_BYTES", 10)
    assert cell.parquet_cell(uri, 7, "image") == images[7]
    assert kept() == [3]
    monkeypatch.setattr(parquet, "ParquetFile", lambda stream: pytest.fail("was read again"))
    assert cell.parquet_cell(uri, 6, "image") == images[6]
