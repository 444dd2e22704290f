"""Examples counted many at a time come to the same figures, to the last digit, as one by one."""

from __future__ import annotations

import itertools
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffitm.core.schema import Example
from diffitm.evaluation import evaluate
from diffitm.metrics.credit import LOST, Credit, recall, recalls, winoground, winogrounds
from diffitm.metrics.figures import Decision, Decisions, means
from diffitm.metrics.intervals import difference_interval, interval, paired_p
from diffitm.store import join, pair_table, stored_lines
from diffitm.store.score_store import Store, open_store
from diffitm.tasks.base import RetrievalTask, Task
from tests.tiny import score_row, write_scores

NUMBERS = [0.0, 1.0, 2.0, np.nan, np.inf]


class OneByOne(RetrievalTask):
    """A task of one's own, with credits and chances of its own, of which some examples lack one."""

    name, folder, source = "own", "own", "here"

    def examples(self, root: str) -> Any:
        raise NotImplementedError

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        found = super().credits(example, scores)
        return found if len(example.texts) < 3 else {**found, "own": Credit(0.5, tied=True)}

    def chance(self, example: Example) -> dict[str, float]:
        found = super().chance(example)
        return found if len(example.texts) < 3 else {**found, "own": 0.25}


class Recalls(RetrievalTask):
    """What the vector path knows, at two k."""

    name, folder, source = "recalls", "recalls", "here"
    recalls = {"R@1": 1, "R@2": 2}  # noqa: RUF012

    def examples(self, root: str) -> Any:
        raise NotImplementedError


class Slow(Recalls):
    """The same by the credits of single examples."""

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        return {name: recall(scores.ravel(), example.gold, k) for name, k in self.recalls.items()}

    def chance(self, example: Example) -> dict[str, float]:
        return dict(super().chance(example))


def permuted(scores: np.ndarray) -> dict[str, Credit]:
    """Winoground's credits by sorting the scores in each order of tied ones."""
    if not np.isfinite(scores).all():
        return dict.fromkeys(("text", "image", "group"), LOST)
    wins = []
    for order in itertools.permutations(range(4)):
        ranks = np.lexsort((np.array(order), scores.ravel())).argsort().reshape(2, 2)
        (s00, s01), (s10, s11) = ranks
        text, image = s00 > s01 and s11 > s10, s00 > s10 and s11 > s01
        wins.append((text, image, text and image))
    values = np.mean(wins, axis=0)
    names = ("text", "image", "group")
    return {n: Credit(float(v), tied=bool(0 < v < 1)) for n, v in zip(names, values, strict=True)}


def test_credits_of_many_are_those_of_each() -> None:
    """With ties and numbers that are not finite."""
    scores = np.array(list(itertools.product(NUMBERS, repeat=4)))
    for k, gold in itertools.product((1, 2, 3), range(4)):
        found = recalls(scores, np.full(len(scores), gold), k)
        wanted = [recall(line, gold, k) for line in scores]
        assert list(zip(*(column.tolist() for column in found), strict=True)) == wanted
    pairs = scores.reshape(-1, 2, 2)
    columns = winogrounds(pairs)
    for place, pair in enumerate(pairs):
        wanted = permuted(pair)
        assert winoground(pair) == wanted
        assert {n: Credit(*(c[place] for c in column)) for n, column in columns.items()} == wanted


def test_decisions_are_the_same_as_columns() -> None:
    decisions = [
        Decision("b", {"kind": "x", "size": "1"}, {"hit": 0.5}, {"hit": Credit(1.0)}),
        Decision("a", {}, {"hit": 0.25, "top": 0.1}, {"hit": Credit(0.5, True), "top": LOST}, True),
        Decision("b", {"size": "2"}, {"top": 0.1}, None, failed=True),
    ]
    columns = Decisions.of(decisions)
    assert list(columns) == decisions == columns[:] and columns[-1] == decisions[-1]
    assert means(columns) == means(decisions) and Decisions.of(columns) is columns
    assert means([]) == [] and list(Decisions.of([])) == []


def test_numbers_of_clusters_say_what_their_names_do() -> None:
    """To the last digit, whatever numbers are left out; signs drawn in smaller blocks are the same."""
    rng = np.random.default_rng(0)
    numbers = np.sort(rng.choice(np.arange(0, 400, 3), 300))[rng.permutation(300)]
    names = np.array([f"{number:04d}" for number in numbers])
    one, two = rng.random((2, 300))
    assert interval(one, numbers) == interval(one, names) == interval(one, numbers * 10**9)
    assert difference_interval(one, two, numbers) == difference_interval(one, two, names)
    whole = paired_p(one, one + rng.normal(size=300) / 9, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffitm.metrics.intervals.SIGNS", 300 * 37)
        rng = np.random.default_rng(0)
        rng.choice(np.arange(0, 400, 3), 300), rng.permutation(300), rng.random((2, 300))
        assert paired_p(one, one + rng.normal(size=300) / 9, numbers) == whole


def drawn(folder: Path, steps: int) -> tuple[str, Store, Store]:
    """Examples of many shapes with ties, failures and odd numbers, and two stores of them."""
    rng = np.random.default_rng(steps)
    examples, lines = [], dict[tuple[str, str], Any]()
    for n in range(300):
        images, texts, direction = [
            (1, 2, "text"),
            (2, 1, "image"),
            (1, 3, "text"),
            (12, 1, "image"),
        ][int(rng.integers(4))]
        names = tuple(f"i{n // 3}-{i}" for i in range(images))
        words = (" ",) if n % 50 == 7 else tuple(f"t{n}-{j}" for j in range(texts))
        groups = {"kind": f"k{n % 3}"} if n % 4 else {}
        gold = int(rng.integers(images * texts)) if words[0] != " " else 0
        examples.append(Example(str(n), names, words, direction, gold, f"c{n // 3}", groups))
        for pair in itertools.product(names, (*words, "")):
            errors = (rng.integers(0, 4, steps) / 3 + rng.random(steps) * (n % 2)).tolist()
            if rng.random() < 0.02:
                errors[0] = float(rng.choice([np.nan, np.inf]))
            if rng.random() < 0.97:
                failed = rng.random() < 0.02
                row = score_row(*pair, failure="torn") if failed else score_row(*pair, errors)
                lines.setdefault(pair, row)
    uri = pair_table.write_examples("drawn", examples, str(folder / "examples"), None)[0]
    config = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": list(range(steps))}
    stores = [open_store(str(folder), name, config) for name in "ab"]
    write_scores(stores[0], list(lines.values()))
    write_scores(stores[1], [line for n, line in enumerate(lines.values()) if n % 17])
    return uri, stores[0], stores[1]


def figures(task: type[Task], uri: str, stores: tuple[Store, ...]) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "find_task", lambda name: task)
        return asdict(evaluate.evaluate({"drawn": uri}, list(stores), weights=np.arange(7.0)))


@pytest.mark.parametrize("steps", [1, 7])
def test_all_figures_are_the_same_in_parts_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Of one part, of parts of a few examples, and one example after the other."""
    uri, *stores = drawn(tmp_path, steps)
    whole = figures(Recalls, uri, (*stores,))
    assert {
        len(whole[kind]) > 0 for kind in ("rows", "counts", "curves", "denoising", "cases")
    } == {True}
    assert whole["comparisons"] and whole["failures"]
    assert figures(Slow, uri, (*stores,)) == whole
    monkeypatch.setattr(join, "LINES", 1)
    assert figures(Recalls, uri, (*stores,)) == whole
    monkeypatch.setattr(join, "LINES", 7)
    monkeypatch.setattr(stored_lines, "MOST_ROWS", 10)
    assert figures(Recalls, uri, (*stores,)) == whole


def test_a_task_of_ones_own_is_asked_example_by_example(tmp_path: Path) -> None:
    """Its metrics that only some examples have keep their order and their numbers."""
    uri, store, _ = drawn(tmp_path, 7)
    rows = figures(OneByOne, uri, (store,))["rows"]
    own = [row for row in rows if row["metric"] == "own"]
    assert {row["value"] for row in own if row["n"]} == {0.5}
    assert {row["chance"] for row in own} == {0.25}
    assert all(row["n"] == row["ties"] for row in own)
    counts = figures(OneByOne, uri, (store,))["counts"]
    assert counts and {count["metric"] for count in counts} == {"accuracy"}


def test_a_large_table_of_errors_lies_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, store, _ = drawn(tmp_path, 7)
    held = figures(Recalls, uri, (store,))
    monkeypatch.setattr("diffitm.store.dense_errors.IN_MEMORY", 100)
    assert figures(Recalls, uri, (store,)) == held
