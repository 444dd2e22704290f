"""Faults of examples: what can decide nothing."""

from __future__ import annotations

from pathlib import Path

from pyarrow import parquet

from diffitm.core.schema import Example, fault
from diffitm.store.pair_table import write_examples


def test_a_caption_with_half_a_character_costs_its_example(tmp_path: Path) -> None:
    """JSON can hold one; no file and no tokenizer takes it."""
    broken = Example("0", ("a.jpg",), ("x", "\ud800"), "text")
    assert fault(broken) == "caption 1 is not UTF-8"
    whole = Example("1", ("a.jpg",), ("x", "y"), "text")
    uri, _ = write_examples("own", [broken, whole], str(tmp_path), None)
    lines = parquet.read_table(uri).to_pylist()
    assert [line["failure"] for line in lines] == ["caption 1 is not UTF-8", None]
