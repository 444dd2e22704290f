"""The store joined back to examples: every number in its place, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffitm.core.schema import Example
from diffitm.store import pair_table
from diffitm.store.join import ScoredExample, read_scored
from diffitm.store.score_store import Store, open_store
from diffitm.store.stored_lines import ScoredPairs, StoredLines, rows_at_once
from tests.tiny import score_row, write_scores

STEPS = [10, 110, 210]
CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": STEPS}
SHAPES = [(1, 2), (2, 3), (3, 1), (1, 4), (2, 2)]


def written(root: Path, *examples: Example) -> str:
    return pair_table.write_examples("t", examples, str(root / "examples"), None)[0]


def value(n: int, image: int, text: int, step: int) -> float:
    """Tells its place: example, image, text, timestep."""
    return 1000.0 * n + 100 * image + 10 * text + step


@pytest.fixture
def numbered(tmp_path: Path) -> tuple[str, Store]:
    """Examples of several shapes whose errors tell their place; the empty text is text 9."""
    examples, lines = [], []
    for n, (images, texts) in enumerate(SHAPES):
        names = tuple(f"i{n}-{i}" for i in range(images))
        words = tuple(f"t{n}-{j}" for j in range(texts))
        examples.append(Example(str(n), names, words, "text" if images == 1 else "image"))
        for i, image in enumerate(names):
            for j, word in [*enumerate(words), (9, "")]:
                errors = [value(n, i, j, k) for k in range(3)]
                lines.append(score_row(image, word, errors, l1=[-e for e in errors]))
    store = open_store(str(tmp_path), "m", CONFIG)
    write_scores(store, lines[::-1])
    return written(tmp_path, *examples), store


def place(n: int, images: int, texts: int) -> np.ndarray:
    return np.array(
        [[[value(n, i, j, k) for k in range(3)] for j in range(texts)] for i in range(images)]
    )


@pytest.mark.parametrize("size", [1, 3, 5, 1000])
def test_pairs_of_an_example_may_lie_in_several_batches(
    numbered: tuple[str, Store], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Batches that end within examples, and that hold several of them."""
    real = StoredLines.pairs

    def small(self: StoredLines, *arguments: Any, **more: bool) -> Iterator[ScoredPairs]:
        for pairs in real(self, *arguments, **more):
            starts = range(0, len(pairs.keys), size)
            yield from (pairs.slice(start, start + size) for start in starts)

    monkeypatch.setattr(StoredLines, "pairs", small)
    found = list(read_scored(*numbered, "l2"))
    assert [item.example.id for item in found] == [str(n) for n in range(len(SHAPES))]
    for n, (item, (images, texts)) in enumerate(zip(found, SHAPES, strict=True)):
        assert item.failure is None and item.similarity is None
        np.testing.assert_array_equal(item.conditional, place(n, images, texts))
        if images == 1:  # texts alone are compared: the empty one is not asked for
            assert np.isnan(item.unconditional).all()
            continue
        empty = [[[value(n, i, 9, k) for k in range(3)]] * texts for i in range(images)]
        np.testing.assert_array_equal(item.unconditional, empty)


def test_each_kind_of_error_is_read_as_it_is(numbered: tuple[str, Store]) -> None:
    """The mean squared error is made of the norm; the latents have 4 elements."""
    l2, mse, l1 = (
        [item.conditional for item in read_scored(*numbered, kind)] for kind in ("l2", "mse", "l1")
    )
    for norm, square, absolute in zip(l2, mse, l1, strict=True):
        np.testing.assert_allclose(square, norm**2 / 4, rtol=1e-6)
        np.testing.assert_array_equal(absolute, -norm)


def test_squares_are_divided_by_the_elements_of_their_own_pair(tmp_path: Path) -> None:
    """Also behind a pair without errors."""
    uri = written(tmp_path, *(Example(n, (n,), ("x", "y"), "text") for n in "abc"))
    store = open_store(str(tmp_path), "m", CONFIG)
    lines = [score_row("a", "x", [2.0] * 3), score_row("a", "y", failure="torn")]
    lines += [score_row("b", text, [4.0] * 3, elements=8) for text in "xy"]
    lines += [score_row("c", text, [4.0] * 3, elements=2) for text in "xy"]
    write_scores(store, lines)
    torn, b, c = read_scored(uri, store, "mse")
    assert torn.failure == "a: torn"
    assert (b.conditional == 2.0).all() and (c.conditional == 8.0).all()


def test_a_failure_names_the_image_of_its_pair(tmp_path: Path) -> None:
    """The first in order; an example that could not be written has its own reason and no pairs."""
    images, texts = ("a", "b"), ("x", "y", "z")
    broken = Example("0", images, ("x", "y", " "), "image")
    uri = written(tmp_path, broken, Example("1", images, texts, "image"))
    store = open_store(str(tmp_path), "m", CONFIG)
    bad = {("b", "y"): "first", ("b", "z"): "second"}
    lines = [
        score_row(i, t, failure=bad[i, t]) if (i, t) in bad else score_row(i, t, [1.0] * 3)
        for i in images
        for t in (*texts, "")
    ]
    write_scores(store, lines)
    found = list(read_scored(uri, store, "l2"))
    assert [item.failure for item in found] == ["caption 2 is empty", "b: first"]
    assert [item.scores() for item in found] == [{}, {}]


def test_the_reason_of_a_failed_empty_text_is_told(tmp_path: Path) -> None:
    """Where images are compared; texts of one image do without it."""
    uri = written(
        tmp_path, Example("0", ("a", "b"), ("x",), "image"), Example("1", ("b",), ("x",), "text")
    )
    store = open_store(str(tmp_path), "m", CONFIG)
    lines = [score_row(image, "x", [1.0] * 3) for image in "ab"]
    write_scores(
        store, [*lines, score_row("a", "", [1.0] * 3), score_row("b", "", failure="too long")]
    )
    assert [item.failure for item in read_scored(uri, store, "l2")] == ["b: too long", None]


def test_similarities_are_images_by_texts(tmp_path: Path) -> None:
    uri = written(tmp_path, Example("0", ("a", "b"), ("x", "y", "z"), "image"))
    store = open_store(str(tmp_path), "c", {"kind": "clip"})
    cosines = np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], np.float32)
    lines = [
        score_row(image, text, similarity=float(cosines[i, j]))
        for i, image in enumerate("ab")
        for j, text in enumerate("xyz")
    ]
    write_scores(store, lines)
    (item,) = read_scored(uri, store, "l2")
    np.testing.assert_array_equal(item.scores()["cosine"], cosines)
    assert list(item.scores()) == ["cosine"]


def test_scores_by_hand() -> None:
    """Weights count in both errors and need not sum to one; texts of one image have one score."""
    item = ScoredExample(
        Example("0", ("a", "b"), ("x",), "image"),
        conditional=np.array([[[1.0, 4.0]], [[2.0, 8.0]]]),
        unconditional=np.array([[[3.0, 5.0]], [[1.0, 9.0]]]),
    )
    weights = np.array([6.0, 2.0])
    np.testing.assert_allclose(item.scores()["conditional"], [[-2.5], [-5.0]])
    np.testing.assert_allclose(item.scores()["normalised"], [[1.5], [0.0]])
    np.testing.assert_allclose(item.scores(weights)["conditional"], [[-1.75], [-3.5]])
    np.testing.assert_allclose(item.scores(weights)["normalised"], [[1.75], [-0.5]])
    text = ScoredExample(Example("0", ("a",), ("x",), "text"), conditional=item.conditional[:1])
    assert list(text.scores()) == ["conditional"]


@pytest.mark.parametrize(("steps", "rows"), [(1, 100_000), (100, 40_000), (10_000, 1000)])
def test_many_timesteps_make_small_batches(steps: int, rows: int) -> None:
    """About four million numbers at once, within bounds."""
    assert rows_at_once(steps) == rows
