"""Credits of decisions against the published metrics and against brute force over tie orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffitm.metrics.credit import recall, recall_chance, winoground, winoground_chance
from tests.conftest import DATA

NAMES = ("text", "image", "group")


@pytest.fixture(scope="module")
def metrics() -> dict[str, np.ndarray]:
    with np.load(DATA / "metrics.npz") as data:
        return {name: data[name] for name in data.files}


def enumerated_winoground(scores: np.ndarray) -> dict[str, float]:
    """Share of wins over every strict order that agrees with the scores [2 images, 2 texts]."""
    wins, flat = [], scores.ravel()
    for order in itertools.permutations(range(4)):
        place = sorted(range(4), key=lambda i, order=order: (flat[i], order[i]))
        s = np.empty(4)
        s[place] = range(4)
        text = s[0] > s[1] and s[3] > s[2]
        image = s[0] > s[2] and s[3] > s[1]
        wins.append((text, image, text and image))
    return dict(zip(NAMES, np.mean(wins, axis=0), strict=True))


def enumerated_recall(scores: np.ndarray, gold: int, k: int) -> float:
    """Share of tie orders that put the gold among the first k."""
    orders = list(itertools.permutations(range(len(scores))))
    hits = 0
    for order in orders:
        ranked = sorted(range(len(scores)), key=lambda i, order=order: (-scores[i], order[i]))
        hits += gold in ranked[:k]
    return hits / len(orders)


def test_winoground_rows_without_ties_equal_the_published(metrics: dict[str, np.ndarray]) -> None:
    untied = 0
    for i, row in enumerate(metrics["wino_scores"]):
        if len(set(row)) < 4:
            continue
        untied += 1
        found = winoground(row.reshape(2, 2).T)  # columns are c0_i0, c0_i1, c1_i0, c1_i1
        for name in NAMES:
            assert found[name] == (metrics[f"wino_{name}"][i], False, True)
    assert untied >= 12


def test_winoground_ties_get_the_expected_value(metrics: dict[str, np.ndarray]) -> None:
    tied = 0
    for row in metrics["wino_scores"]:
        scores = row.reshape(2, 2).T
        found, expected = winoground(scores), enumerated_winoground(scores)
        for name in NAMES:
            assert found[name].value == pytest.approx(expected[name])
            assert found[name].tied == (0 < expected[name] < 1)
        tied += any(found[name].tied for name in NAMES)
    assert tied >= 5


def test_winoground_by_hand() -> None:
    """Scores [image, text]: image 1 prefers the wrong text, each text its own image."""
    found = winoground(np.array([[3.0, 1.0], [2.5, 2.0]]))
    assert {name: credit.value for name, credit in found.items()} == {
        "text": 0,
        "image": 1,
        "group": 0,
    }


def test_winoground_constant_scorer_gets_exactly_chance() -> None:
    found = winoground(np.full((2, 2), -5.0))
    assert {name: credit.value for name, credit in found.items()} == winoground_chance()
    assert winoground_chance() == {"text": 0.25, "image": 0.25, "group": pytest.approx(1 / 6)}
    assert all(credit.tied for credit in found.values())


def test_winoground_chance_is_that_of_random_scores() -> None:
    rng = np.random.default_rng(0)
    values = [[c.value for c in winoground(s).values()] for s in rng.normal(size=(2000, 2, 2))]
    np.testing.assert_allclose(np.mean(values, 0), list(winoground_chance().values()), atol=0.04)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_winoground_score_that_is_not_finite_never_wins(bad: float) -> None:
    for place in range(4):
        scores = np.array([2.0, 1.0, 1.0, 2.0])
        scores[place] = bad
        for credit in winoground(scores.reshape(2, 2)).values():
            assert credit == (0.0, False, False)


@pytest.mark.parametrize("kind", ["retrieval", "retrieval_ties"])
def test_retrieval_rows_without_ties_equal_the_published(
    metrics: dict[str, np.ndarray], kind: str
) -> None:
    """A row counts as untied when no other candidate has the gold's score."""
    scores, golds = metrics[f"{kind}_scores"], metrics[f"{kind}_target"]
    untied = 0
    for i, (row, gold) in enumerate(zip(scores, golds, strict=True)):
        if (row == row[gold]).sum() > 1:
            continue
        untied += 1
        assert recall(row, gold, 1) == (metrics[f"{kind}_r1"][i], False, True)
        assert recall(row, gold, 5) == (metrics[f"{kind}_r5"][i], False, True)
    assert untied == 30 if kind == "retrieval" else 0 < untied < 30


def test_retrieval_ties_get_the_expected_value(metrics: dict[str, np.ndarray]) -> None:
    """Against many random tie-breakings of the golden rows."""
    rng = np.random.default_rng(0)
    tied = 0
    for row, gold in zip(
        metrics["retrieval_ties_scores"], metrics["retrieval_ties_target"], strict=True
    ):
        noise = rng.random((4000, len(row)))
        above = (row > row[gold]) | ((row == row[gold]) & (noise > noise[:, [gold]]))
        for k in (1, 5):
            found = recall(row, gold, k)
            assert found.value == pytest.approx((above.sum(1) < k).mean(), abs=0.04)
            tied += found.tied
    assert tied > 5


def test_recall_equals_every_order_of_the_ties() -> None:
    """Exactly, for small integer scores with many ties and every gold and k."""
    rng = np.random.default_rng(1)
    for _ in range(8):
        scores = rng.integers(0, 3, 5).astype(float)
        for gold, k in itertools.product(range(5), (1, 3)):
            expected = enumerated_recall(scores, gold, k)
            found = recall(scores, gold, k)
            assert found.value == pytest.approx(expected)
            assert found.tied == (0 < expected < 1)


@pytest.mark.parametrize(("candidates", "k"), [(10, 1), (10, 5), (2, 1), (37, 1), (3, 5)])
def test_constant_scorer_gets_exactly_chance(candidates: int, k: int) -> None:
    """Wherever the gold lies: position 0 has no advantage."""
    for gold in (0, candidates - 1):
        found = recall(np.zeros(candidates), gold, k)
        assert found.value == recall_chance(candidates, k) == min(k / candidates, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_recall_score_that_is_not_finite_gets_nothing(bad: float) -> None:
    """Neither as the gold's score nor as another's; all NaN neither."""
    for place in (0, 1):
        scores = np.array([1.0, 0.0, 0.0])
        scores[place] = bad
        assert recall(scores, 0, 1) == (0.0, False, False)
    assert recall(np.full(3, bad), 0, 5) == (0.0, False, False)


def test_tie_that_decides_nothing_is_not_counted() -> None:
    """Equal scores below the gold, or all within the first k, leave no doubt."""
    assert recall(np.array([2.0, 1.0, 1.0]), 0, 1) == (1.0, False, True)
    assert recall(np.array([2.0, 2.0, 1.0]), 0, 2) == (1.0, False, True)
    assert recall(np.array([2.0, 2.0, 1.0]), 0, 1) == (0.5, True, True)
