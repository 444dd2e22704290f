"""Blocks of a work table: cut by cost, between images, kept and read as they were cut."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.core.schema import BLOCK, WORK, block_rows
from diffitm.store import blocks
from diffitm.store.blocks import LEAST_SECONDS, SECONDS, UNMEASURED, Cost, Sizes
from tests.tiny import read_images

Pair = tuple[str, str, list[int] | None]


def work_of(folder: Path, pairs: list[Pair]) -> str:
    """A work table of (image, text, stored places)."""
    lines = [dict(zip(WORK.names, pair, strict=True)) for pair in pairs]
    uri = str(folder / "work.parquet")
    parquet.write_table(pa.Table.from_pylist(lines, WORK), uri, row_group_size=3)
    return uri


def of(images: dict[str, int]) -> list[Pair]:
    """So many texts for each image."""
    return [(image, f"{t:03d}", None) for image, count in images.items() for t in range(count)]


def cut(uri: str, size: float, cost: Cost = Cost(1)) -> list[list[tuple[str, int]]]:  # noqa: B008
    """Blocks of so many forwards: the images of each, and how many texts they have there."""
    blocks.cut(uri, cost, 1e9, lambda left: size)
    found = [block_rows(line) for table in blocks.read_blocks(uri) for line in table.to_pylist()]
    assert [row.row for rows in found for row in rows] == [
        number for number, rows in enumerate(found) for _ in rows
    ]
    return [[(row.image, len(row.texts)) for row in rows] for rows in found]


@pytest.fixture(params=[1, 3, 10_000])
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pairs are read at a time."""
    monkeypatch.setattr(blocks, "READ", request.param)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(
    ("images", "size", "expected"),
    [
        ({"a": 2, "b": 2, "c": 2}, 4, [[("a", 2), ("b", 2)], [("c", 2)]]),
        # No image is begun that would be cut, as long as half a block is full.
        ({"a": 2, "b": 3, "c": 1}, 4, [[("a", 2)], [("b", 3), ("c", 1)]]),
        ({"a": 1, "b": 5, "c": 1}, 4, [[("a", 1), ("b", 3)], [("b", 2), ("c", 1)]]),
        ({"a": 9}, 4, [[("a", 4)], [("a", 4)], [("a", 1)]]),
        ({"a": 1, "b": 1}, 0.5, [[("a", 1)], [("b", 1)]]),
        ({"a": 1, "b": 1}, 99, [[("a", 1), ("b", 1)]]),
        ({}, 4, []),
    ],
)
def test_blocks_end_between_images(
    tmp_path: Path, images: dict[str, int], size: float, expected: list[list[tuple[str, int]]]
) -> None:
    assert cut(work_of(tmp_path, of(images)), size) == expected


@pytest.mark.usefixtures("small_batches")
def test_costs(tmp_path: Path) -> None:
    """A pair costs what is not stored, an image of a CLIP more than its pairs."""
    places: list[Pair] = [("a", "x", [0, 1, 2, 3]), ("a", "y", None), ("b", "x", [0])]
    uri = work_of(tmp_path, places)
    assert cut(uri, 6, Cost(5)) == [[("a", 2)], [("b", 1)]]
    index = blocks.read_index(uri)
    assert index is not None
    assert index.select(["pairs", "images", "stored"]).to_pylist() == [
        {"pairs": 2, "images": 1, "stored": 4}, {"pairs": 1, "images": 1, "stored": 1}
    ]  # fmt: skip
    assert Cost(5, 2).total(2, 3, 5) == 14
    images = of({"a": 1, "b": 1, "c": 30, "d": 1})
    whole = cut(work_of(tmp_path, images), 131, Cost(1, 64))
    assert whole == [[("a", 1), ("b", 1)], [("c", 30)], [("d", 1)]]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("size", [1e9, float("inf"), float("nan")])
def test_blocks_have_no_more_pairs_than_an_actor_can_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float
) -> None:
    """However fast a model is said to be: a CLIP's cosines cost nothing, and its images are still read."""
    monkeypatch.setattr(blocks, "MOST", 4)
    found = cut(work_of(tmp_path, of({"a": 2, "b": 3, "c": 9, "d": 1})), size, Cost(1, 64))
    pairs = [pair for block in found for pair in block]
    assert sum(count for _, count in pairs) == 15
    assert max(sum(count for _, count in block) for block in found) <= 4
    if blocks.READ > 15 and size == 1e9:
        assert found[:2] == [[("a", 2)], [("b", 3)]]


def test_a_block_has_everything_of_its_pairs(tmp_path: Path) -> None:
    """In the order of the table, with places only where some pair of the block has any."""
    pairs: list[Pair] = [("a", "", None), ("a", "x", [3, 1]), ("b", "x", None), ("c", "y", None)]
    uri = work_of(tmp_path, pairs)
    blocks.cut(uri, Cost(9), 36, lambda left: 27)
    first, second = blocks.read_blocks(uri)
    assert (first.schema, second.schema) == (BLOCK, BLOCK)
    assert [*map(tuple, block_rows(first.to_pylist()[0]))] == [
        (0, "a", ["", "x"], [[], [3, 1]]), (0, "b", ["x"], [[]])
    ]  # fmt: skip
    assert [*map(tuple, block_rows(second.to_pylist()[0]))] == [(1, "c", ["y"], None)]
    assert [row.texts for row in read_images(uri)] == [["", "x"], ["x"], ["y"]]


def test_sizes() -> None:
    """A minute's work at most, less as the end comes near, and never so little that it does not pay."""
    size = Sizes(4, 100.0).next
    assert size(1e9) == SECONDS * 100
    assert size(6000) == 500  # a third of an actor's part
    assert size(10) == LEAST_SECONDS * 100
    unknown = Sizes(4, 0.0).next
    assert (unknown(1e9), unknown(120)) == (UNMEASURED, 10)
