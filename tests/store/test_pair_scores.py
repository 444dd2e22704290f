"""Scores of people's own pairs: the file, its summary, the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from diffitm.captions.row import CaptionRow
from diffitm.core.schema import SCORES
from diffitm.store.pair_scores import summarise, write_pairs, write_top
from diffitm.store.pair_table import distinct_texts, write_own, write_work
from diffitm.store.score_store import Store, open_store
from tests.tiny import read_images, score_row

ROWS = [
    CaptionRow("row 0", "a.jpg", ("red", "blue"), source="s"),
    CaptionRow("row 1", "b.jpg", ("red",), source="t"),
    CaptionRow("row 2", "c.jpg", (), "the row has no text", source="t"),
    CaptionRow("row 3", "b.jpg", ("red",), source="s"),
    CaptionRow("row 4", "gone.jpg", ("red",), source="t"),
]
CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10, 20]}


def fill(store: Store, lines: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(lines, SCORES), f"{store.uri}/a.parquet")


@pytest.fixture
def examples(tmp_path: Path) -> str:
    uri, total, failed = write_own(iter(ROWS), str(tmp_path / "examples"))
    assert (total, failed) == (5, 1)
    return uri


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = open_store(str(tmp_path), "model", CONFIG)
    errors = {
        ("a.jpg", "red"): [3.0, 5.0], ("a.jpg", "blue"): [6.0, 6.0], ("a.jpg", ""): [5.0, 7.0],
        ("b.jpg", "red"): [1.0, 2.0], ("b.jpg", ""): [2.0, 2.0],
    }  # fmt: skip
    lines = [score_row(image, text, values, elements=4) for (image, text), values in errors.items()]
    lines += [score_row("gone.jpg", text, failure="no such file") for text in ("red", "")]
    fill(made, lines)
    return made


def test_each_pair_is_asked_for_once_with_its_empty_text(
    tmp_path: Path, examples: str, store: Store
) -> None:
    empty = open_store(str(tmp_path / "empty"), "model", CONFIG)
    work = write_work([examples], empty, str(tmp_path / "work.parquet"))
    asked = {row.image: row.texts for row in read_images(work.uri)}
    assert asked == {
        "a.jpg": ["", "blue", "red"], "b.jpg": ["", "red"], "gone.jpg": ["", "red"]
    }  # fmt: skip
    done = write_work([examples], store, str(tmp_path / "work2.parquet"))
    assert (done.images, done.pairs) == (1, 2), "what failed is tried again"


def test_scores_by_hand(tmp_path: Path, examples: str, store: Store) -> None:
    """Normalised: the mean error without the text less that with it; failures say why."""
    lines = parquet.read_table(write_pairs(str(tmp_path), examples, store, "l2")).to_pylist()
    found = [
        (x["row"], x["image"], x["text"], x["source"], x["score"], x["failure"]) for x in lines
    ]
    assert found == [
        (0, "a.jpg", "red", "s", 2.0, None),
        (0, "a.jpg", "blue", "s", 0.0, None),
        (1, "b.jpg", "red", "t", 0.5, None),
        (3, "b.jpg", "red", "s", 0.5, None),
        (4, "gone.jpg", "red", "t", None, "no such file"),
        (2, "c.jpg", None, "t", None, "row 2: the row has no text"),
    ]
    assert (lines[0]["conditional_error"], lines[0]["unconditional_error"]) == (4.0, 6.0)
    assert lines[4]["conditional_error"] is None
    assert "conditional_errors" not in lines[0]


def test_weights_kinds_of_error_and_timesteps(tmp_path: Path, examples: str, store: Store) -> None:
    path = write_pairs(
        str(tmp_path), examples, store, "mse", np.array([1.0, 3.0]), by_timestep=True
    )
    first = parquet.read_table(path).to_pylist()[0]
    assert first["conditional_errors"] == [9 / 4, 25 / 4]
    assert first["unconditional_errors"] == [25 / 4, 49 / 4]
    assert first["conditional_error"] == pytest.approx((9 / 4 + 3 * 25 / 4) / 4)
    expected = (25 / 4 + 3 * 49 / 4) / 4 - (9 / 4 + 3 * 25 / 4) / 4
    assert first["score"] == pytest.approx(expected)
    failed = parquet.read_table(path).to_pylist()[4]
    assert failed["conditional_errors"] is None


def test_a_single_score_a_pair(tmp_path: Path, examples: str) -> None:
    """No errors; a score that is not finite counts as none."""
    store = open_store(str(tmp_path), "clip", {"kind": "clip"})
    values = {("a.jpg", "red"): 0.25, ("a.jpg", "blue"): float("nan"), ("b.jpg", "red"): 0.5}
    fill(store, [score_row(i, t, similarity=v) for (i, t), v in values.items()])
    table = parquet.read_table(write_pairs(str(tmp_path), examples, store, "l2"))
    assert table.column_names == ["row", "image", "text", "source", "score", "failure"]
    assert table["score"].to_pylist() == [0.25, None, 0.5, 0.5, None, None]
    assert table["failure"].to_pylist()[1] == "the score is not finite"
    assert table["failure"].to_pylist()[4] == "not scored yet"


def test_an_error_that_is_not_finite(tmp_path: Path, examples: str) -> None:
    """Its pair has no score, and another dtype is named."""
    store = open_store(str(tmp_path), "m", {**CONFIG, "dtype": "fp16"})
    pairs = [("a.jpg", "red"), ("a.jpg", "blue"), ("b.jpg", "red"), ("a.jpg", ""), ("b.jpg", "")]
    infinite = [float("inf"), 1.0]
    fill(store, [score_row(i, t, infinite if t == "blue" else [1.0, 1.0]) for i, t in pairs])
    table = parquet.read_table(write_pairs(str(tmp_path), examples, store, "l2"))
    failure = table["failure"].to_pylist()[1]
    assert failure == "the score is not finite in fp16: try --dtype bf16 or fp32"


def test_the_summary(tmp_path: Path, examples: str, store: Store) -> None:
    found = summarise(write_pairs(str(tmp_path), examples, store, "l2"), 2)
    assert (found.pairs, found.failures) == (6, 2)
    assert sum(found.counts) == 4 and found.counts[0] == 1 and found.counts[-1] == 1
    assert (found.edges[0], found.edges[-1]) == (0.0, 2.0)
    assert found.quantiles["50%"] == 0.5
    assert [line["score"] for line in found.best] == [2.0, 0.5]
    assert [line["row"] for line in found.worst] == [0, 1]
    assert [line["row"] for line in found.failed] == [2, 4]
    assert [(s["source"], s["pairs"], s["failures"]) for s in found.sources] == [
        ("s", 3, 0), ("t", 3, 2)
    ]  # fmt: skip
    assert found.sources[0]["mean"] == pytest.approx(2.5 / 3)


def test_nothing_scored(tmp_path: Path, examples: str) -> None:
    store = open_store(str(tmp_path), "model", CONFIG)
    fill(store, [])
    found = summarise(write_pairs(str(tmp_path), examples, store, "l2"), 2)
    assert (found.pairs, found.failures, found.quantiles, found.edges) == (6, 6, {}, [])


def test_the_best(tmp_path: Path, examples: str, store: Store) -> None:
    """Images of each text, or texts of each image; of equal ones the earlier."""
    path = write_pairs(str(tmp_path), examples, store, "l2")
    lines = parquet.read_table(write_top(path, str(tmp_path), 2, "text")).to_pylist()
    assert [(x["text"], x["rank"], x["image"], x["row"]) for x in lines] == [
        ("blue", 1, "a.jpg", 0), ("red", 1, "a.jpg", 0), ("red", 2, "b.jpg", 1)
    ]  # fmt: skip
    lines = parquet.read_table(write_top(path, str(tmp_path), 1, "image")).to_pylist()
    assert [(x["image"], x["text"]) for x in lines] == [("a.jpg", "red"), ("b.jpg", "red")]


def test_a_bad_text_of_a_row_costs_itself(tmp_path: Path) -> None:
    """The row's other texts are asked for, under its own place in the input."""
    rows = [
        CaptionRow("row 0", "a.jpg", ("red",)),
        CaptionRow("row 1", "b.jpg", ("x", ""), "no text", text_failures=(None, "no text")),
    ]
    uri, total, failed = write_own(rows, str(tmp_path / "examples"))
    assert (total, failed) == (3, 1)
    made = open_store(str(tmp_path), "model", CONFIG)
    scored = [("a.jpg", "red"), ("a.jpg", ""), ("b.jpg", "x"), ("b.jpg", "")]
    fill(made, [score_row(*pair, [1.0, 2.0], elements=4) for pair in scored])
    lines = parquet.read_table(write_pairs(str(tmp_path), uri, made, "l2")).to_pylist()
    found = [(line["row"], line["image"], line["text"], line["failure"]) for line in lines]
    assert found == [
        (0, "a.jpg", "red", None),
        (1, "b.jpg", "x", None),
        (1, "b.jpg", "", "row 1: no text"),
    ]
    assert list(distinct_texts([uri])) == ["red", "x"]
