"""Variance shares against sums written out, known components and simulation; the task of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffitm.core.schema import Example
from diffitm.metrics.credit import LOST, Credit
from diffitm.metrics.figures import Decision, Figure
from diffitm.metrics.variance import NAMES, shares
from diffitm.tasks.flickr30k import Flickr30kVariance
from tests.tasks.test_tasks import put

LISTS = "flickr30k/val_top10_RN50x64.json"


def simulated(
    rng: np.random.Generator, size: tuple[int, int], variances: tuple[float, float, float]
) -> np.ndarray:
    """Errors [images, texts] around 100 of normal image, text and interaction effects."""
    image, text, both = np.sqrt(variances)
    effects = rng.normal(0, image, (size[0], 1)) + rng.normal(0, text, (1, size[1]))
    return 100 + effects + rng.normal(0, both, size)


def values(errors: np.ndarray) -> list[float]:
    found = shares(errors)
    assert tuple(found) == NAMES == ("image", "text", "interaction")
    return [share.value for share in found.values()]


def written_out(errors: np.ndarray) -> np.ndarray:
    """The two-way random-effects analysis of variance by its sums of squares, entry by entry."""
    rows, columns = errors.shape
    grand = sum(errors.flat) / errors.size
    row = [sum(errors[i]) / columns for i in range(rows)]
    column = [sum(errors[:, j]) / rows for j in range(columns)]
    between_rows = columns * sum((m - grand) ** 2 for m in row) / (rows - 1)
    between_columns = rows * sum((m - grand) ** 2 for m in column) / (columns - 1)
    total = sum((value - grand) ** 2 for value in errors.flat)
    rest = total - between_rows * (rows - 1) - between_columns * (columns - 1)
    rest /= (rows - 1) * (columns - 1)
    image, text = (between_rows - rest) / columns, (between_columns - rest) / rows
    found = np.array([max(image, 0), max(text, 0), rest])
    return found / found.sum()


@pytest.mark.parametrize("size", [(3, 3), (3, 7), (6, 4)])
def test_equal_to_the_sums_of_squares(size: tuple[int, int]) -> None:
    """Mean squares by total less rows less columns, negative components set to 0."""
    rng = np.random.default_rng(0)
    clipped = 0
    for variances in ((1, 1, 1), (0, 0, 1), (0.1, 2, 1)) * 5:
        errors = simulated(rng, size, variances)
        expected = written_out(errors)
        assert values(errors) == pytest.approx(expected, abs=1e-9)
        clipped += 0 in expected
    assert 0 < clipped < 15


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variances", [(8.0, 0.5, 1.5), (0.5, 2.0, 0.5), (0.0, 0.2, 1.8)])
def test_known_components(seed: int, variances: tuple[float, float, float]) -> None:
    """300 images and 200 texts: near the true shares, image and text not mixed up."""
    errors = simulated(np.random.default_rng(seed), (300, 200), variances)
    assert values(errors) == pytest.approx(np.array(variances) / sum(variances), abs=0.07)


def test_pure_matrices() -> None:
    """Image, text or interaction alone gets everything."""
    rng = np.random.default_rng(1)
    effects = rng.normal(size=(9, 1))
    assert values(np.tile(effects, (1, 6))) == pytest.approx([1, 0, 0], abs=1e-9)
    assert values(np.tile(effects.T, (6, 1))) == pytest.approx([0, 1, 0], abs=1e-9)
    both = rng.normal(size=(9, 6))
    both -= both.mean(0)
    both -= both.mean(1)[:, None]
    assert values(both) == pytest.approx([0, 0, 1], abs=1e-9)


def test_additive_matrix_has_no_interaction() -> None:
    """Image plus text effects: their own sample variances share everything out."""
    rng = np.random.default_rng(2)
    image, text = rng.normal(0, 2, (8, 1)), rng.normal(0, 1, (1, 11))
    found = np.array([image.var(ddof=1), text.var(ddof=1), 0])
    assert values(image + text) == pytest.approx(found / found.sum(), abs=1e-9)


def test_transposed() -> None:
    """Image and text change places, intervals too."""
    errors = simulated(np.random.default_rng(3), (7, 12), (3, 1, 1))
    one, other = shares(errors), shares(errors.T)
    for name, mirrored in (("image", "text"), ("text", "image"), ("interaction",) * 2):
        assert one[name] == pytest.approx(other[mirrored], abs=1e-9)


@pytest.mark.parametrize(("scale", "shift"), [(1, 250), (-1, 0), (1e-3, 5), (1e4, -1)])
def test_shift_scale_and_order_do_not_matter(scale: float, shift: float) -> None:
    """Errors or scores (their negative), of any unit, images and texts in any order."""
    rng = np.random.default_rng(4)
    errors = simulated(rng, (8, 6), (1, 1, 2))
    other = (scale * errors + shift)[rng.permutation(8)][:, rng.permutation(6)]
    for name, share in shares(errors).items():
        assert shares(other)[name] == pytest.approx(share, abs=1e-6)


def test_shares_sum_to_one_within_their_intervals() -> None:
    """Of any matrix, even where components are cut at 0; intervals stay within [0, 1]."""
    rng = np.random.default_rng(5)
    for _ in range(40):
        size = tuple(rng.integers(3, 9, 2))
        found = shares(simulated(rng, size, tuple(rng.random(3) * rng.integers(0, 2, 3) + 1e-3)))
        assert sum(share.value for share in found.values()) == pytest.approx(1, abs=1e-12)
        for share in found.values():
            assert 0 <= share.low <= share.value <= share.high <= 1


def test_interval_by_the_jackknife() -> None:
    """Each image and each text left out once: z times the root of both sums, (n - 1) / n each."""
    errors = simulated(np.random.default_rng(13), (5, 6), (2, 1, 1))
    square = np.zeros(3)
    for axis, count in enumerate(errors.shape):
        left = [written_out(np.delete(errors, i, axis)) for i in range(count)]
        square += (count - 1) / count * ((left - np.mean(left, axis=0)) ** 2).sum(0)
    low, high = (written_out(errors) + sign * 1.959964 * np.sqrt(square) for sign in (-1, 1))
    for i, share in enumerate(shares(errors).values()):
        expected = max(0, low[i]), min(1, high[i])
        assert (share.low, share.high) == pytest.approx(expected, abs=1e-6)


def test_interval_coverage() -> None:
    """24 x 24, the task's size: of 100 intervals 94 held the true share of the image, 94 that of the
    text and 95 that of the interaction in 400 runs (12 x 12: 92, 90 and 97)."""
    rng, true = np.random.default_rng(6), np.array([0.5, 0.25, 0.25])
    hits = np.zeros(3)
    for _ in range(150):
        found = shares(simulated(rng, (24, 24), (2, 1, 1))).values()
        hits += [s.low <= t <= s.high for s, t in zip(found, true, strict=True)]
    assert hits.min() / 150 >= 0.86
    assert hits.max() / 150 <= 0.995


def test_interval_narrows() -> None:
    """Four times the images and texts, about half the width."""
    rng = np.random.default_rng(7)
    widths = []
    for size in (15, 60):
        found = [shares(simulated(rng, (size, size), (1, 1, 1)))["image"] for _ in range(8)]
        widths.append(np.mean([share.high - share.low for share in found]))
    assert 0.35 < widths[1] / widths[0] < 0.65


@pytest.mark.parametrize("size", [(2, 9), (9, 2), (1, 1), (0, 5)])
def test_too_small(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="need 3 images and 3 texts"):
        shares(np.random.default_rng(8).random(size))


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 0.1, -137.3])
@pytest.mark.parametrize("size", [(3, 3), (7, 5), (24, 24)])
def test_constant(value: float, size: tuple[int, int]) -> None:
    """Nothing varies, however the mean rounds: an error, not a share of 1 for the interaction."""
    with pytest.raises(ValueError, match="all errors are the same"):
        shares(np.full(size, value))


def published_form(images: int) -> dict[str, list[str]]:
    """Five captions an image, ten candidates each, the right one first."""
    return {
        f"caption {i}-{k}": [f"datasets/flickr30k/images/{(i + c) % images}.jpg" for c in range(10)]
        for i in range(images)
        for k in range(5)
    }


@pytest.mark.parametrize(("images", "size"), [(30, 24), (24, 24), (10, 10)])
def test_examples(tmp_path: Path, images: int, size: int) -> None:
    """The first caption of each of the first 24 images, all with all, one example a pair."""
    put(tmp_path, LISTS, published_form(images))
    examples = list(Flickr30kVariance().examples(str(tmp_path)))
    assert len(examples) == len({example.id for example in examples}) == size**2
    assert examples[size + 2] == Example(
        id="1-2",
        images=("flickr30k/images/1.jpg",),
        texts=("caption 2-0",),
        direction="image",
        cluster="flickr30k/images/1.jpg",
        groups={"image": "1", "text": "2"},
    )
    assert examples[0].needs_unconditional
    assert examples[-1].texts == (f"caption {size - 1}-0",)


def test_image_named_twice_counts_once(tmp_path: Path) -> None:
    """A list with ten captions of an image comes to it twice: its first caption stays."""
    lists = {
        f"c{i}": [f"datasets/flickr30k/images/{k}.jpg" for k in (i // 10, 99)] for i in range(40)
    }
    put(tmp_path, LISTS, lists)
    examples = list(Flickr30kVariance().examples(str(tmp_path)))
    assert len(examples) == 16
    assert [example.texts[0] for example in examples[:4]] == ["c0", "c10", "c20", "c30"]


def test_credits() -> None:
    """The score itself; one that is not finite is lost."""
    task, example = Flickr30kVariance(), Example("0-0", ("a",), ("x",), "image")
    assert task.credits(example, np.array([[-123.5]])) == {"score": Credit(-123.5)}
    assert task.credits(example, np.array([[np.nan]])) == {"score": LOST}
    assert not task.graded


def decided(scores: np.ndarray) -> Iterator[Decision]:
    """One decision an entry: NaN could not be scored, infinity was not finite; both failed."""
    for (i, j), score in np.ndenumerate(scores):
        credit = Credit(float(score)) if np.isfinite(score) else LOST
        credits = None if np.isnan(score) else {"score": credit}
        groups = {"image": str(i), "text": str(j)}
        yield Decision(str(i), groups, {"score": 0.0}, credits, not np.isfinite(score))


def figures(scores: np.ndarray) -> list[Figure]:
    return Flickr30kVariance().figures(list(decided(scores)))


def test_figures() -> None:
    """Those of the matrix, entries in their places."""
    scores = simulated(np.random.default_rng(9), (11, 12), (1, 2, 1))
    found = figures(scores)
    assert [(f.group, f.metric) for f in found] == [("all", f"var. {name}") for name in NAMES]
    for figure, share in zip(found, shares(scores).values(), strict=True):
        assert (figure.value, figure.low, figure.high) == share
        assert (figure.n, figure.failures, figure.chance, figure.unit) == (132, 0, None, "share")


def test_order_of_decisions_does_not_matter() -> None:
    """An entry's place is told by its groups."""
    scores = simulated(np.random.default_rng(10), (11, 12), (1, 2, 1))
    assert Flickr30kVariance().figures(list(decided(scores))[::-1]) == figures(scores)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_unreadable_image_drops_its_row_only(bad: float) -> None:
    """The rest are shares of the matrix without it, one lost pair costs as much."""
    scores = simulated(np.random.default_rng(11), (8, 7), (1, 1, 1))
    broken = scores.copy()
    broken[2], broken[5, 3] = bad, bad
    whole = figures(np.delete(scores, [2, 5], 0))
    assert figures(broken) == [replace(figure, failures=8) for figure in whole]
    assert whole[0].n == 42


def test_nothing_scored() -> None:
    """Too few rows left, or none, or all the same: no value, failures counted."""
    scores = simulated(np.random.default_rng(12), (5, 5), (1, 1, 1))
    scores[:3] = np.nan
    for case, lost in ((scores, 15), (np.full((5, 5), np.nan), 25), (np.ones((5, 5)), 0)):
        for figure in figures(case):
            assert figure.value is figure.low is figure.high is None
            assert (figure.n, figure.failures) == (0, lost)
