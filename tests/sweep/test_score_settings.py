"""Stored errors as a sweep of the score reads them, and the weights learned from them, by hand."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffitm.core.errors import InputError
from diffitm.core.schema import Example
from diffitm.metrics.figures import Credit
from diffitm.store import pair_table
from diffitm.store.score_store import Store, open_store
from diffitm.sweep import score_settings, timestep_weights
from diffitm.sweep.score_settings import half_of, measure, parse_range, read_errors
from diffitm.sweep.timestep_weights import Contrasts, learn, spread
from diffitm.tasks.base import RetrievalTask
from diffitm.tasks.winoground import Winoground
from tests.tiny import score_row, write_scores

STEPS = [100, 300, 500]


class Choice(RetrievalTask):
    """One of several candidates."""

    name = "choice"

    def examples(self, root: str) -> Iterator[Example]:
        return iter(())


def halves(count: int) -> tuple[list[str], list[str]]:
    """Names of so many clusters that choose and that measure, by the hash's own definition."""
    every = [f"c{n}" for n in range(20 * count)]
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in every}
    odd = [name for name in every if int(digests[name][1], 16) % 2]
    return odd[:count], [name for name in every if name not in odd][:count]


def stored(root: Path, examples: list[Example], errors: dict[tuple[str, str], list[float]]) -> Any:
    """What read_errors takes: the file, the store, the kind of error."""
    uri = pair_table.write_examples("t", examples, str(root / "examples"), None)[0]
    store = open_store(str(root), "m", {"kind": "diffusion", "timesteps": STEPS})
    write_scores(store, [score_row(*pair, values) for pair, values in errors.items()])
    return uri, store, "l2"


def test_halves_and_folds() -> None:
    """The lowest bit of the hash tells the half, the next one the fold."""
    choose, measured = halves(20)
    assert all(half_of(name)[0] for name in choose)
    assert not any(half_of(name)[0] for name in measured)
    for name in choose:
        first = int(hashlib.sha256(name.encode()).hexdigest()[:2], 16)
        assert half_of(name)[1] == first // 2 % 2
    assert {half_of(name)[1] for name in choose} == {0, 1}


@pytest.fixture
def images(tmp_path: Path) -> Any:
    """Two images a text, the second one right; errors tell example, image and timestep."""
    names = [name for half in halves(2) for name in half]
    examples = [
        Example(name, (f"{name}-0", f"{name}-1"), ("x",), "image", 1, cluster=name)
        for name in names
    ]
    errors = {}
    for n, name in enumerate(names):
        for i in (0, 1):
            errors[f"{name}-{i}", "x"] = [100.0 * n + 10 * i + k**2 for k in range(3)]
            errors[f"{name}-{i}", ""] = [100.0 * n + 4 * i] * 3
    return names, stored(tmp_path, examples, errors)


def test_errors_of_images_are_less_the_unconditional_one(images: Any) -> None:
    """Decisions of the half that chooses alone: the wrong candidate less the right one."""
    names, given = images
    table = read_errors(Choice(), *given)
    assert table is not None
    np.testing.assert_array_equal(table.values, [[0, 1, 4], [6, 7, 10]] * 4)
    assert table.chooses.tolist() == [True, True, False, False]
    assert table.clusters.tolist() == names
    assert table.failures == {}
    np.testing.assert_array_equal(table.contrasts.values, [[-6.0] * 3] * 2)
    assert table.contrasts.starts.tolist() == [0, 1]
    assert table.contrasts.cluster.tolist() == names[:2]
    assert table.contrasts.fold.tolist() == [half_of(name)[1] for name in names[:2]]
    np.testing.assert_array_equal(table.credits(np.array([1.0, 0, 0])), [0.0] * 4)
    other = read_errors(Choice(), *given[:2], "mse")
    assert other is not None and other.identity != table.identity
    assert read_errors(Choice(), *given).identity == table.identity  # type: ignore[union-attr]


def test_pairs_of_winoground_decide_by_image_and_by_text(tmp_path: Path) -> None:
    """Four decisions: each image's caption, then each caption's image."""
    names = [name for half in halves(2) for name in half]
    errors = {}
    for name in names:
        for i, j, value in ((0, 0, 1.0), (0, 1, 5.0), (1, 0, 7.0), (1, 1, 3.0)):
            errors[f"{name}-{i}", f"t{j}"] = [value] * 3
        errors |= {(f"{name}-{i}", ""): [2.0 * i] * 3 for i in (0, 1)}
    examples = [
        Example(name, (f"{name}-0", f"{name}-1"), ("t0", "t1"), "both", cluster=name)
        for name in names
    ]
    table = read_errors(Winoground(), *stored(tmp_path, examples, errors))
    assert table is not None
    # Less the unconditional error: 1 5 of image 0, 5 1 of image 1.
    np.testing.assert_array_equal(table.values[:4, 0], [1, 5, 5, 1])
    np.testing.assert_array_equal(table.contrasts.values[:, 0], [4, 4, 4, 4] * 2)
    assert table.contrasts.starts.tolist() == list(range(8))
    assert table.contrasts.cluster.tolist() == [names[0]] * 4 + [names[1]] * 4
    assert table.credits(np.full(3, 1 / 3)).tolist() == [1.0] * 4


def test_decisions_have_as_many_rows_as_wrong_candidates(tmp_path: Path) -> None:
    """Of several sizes, the right one anywhere; credits find each example's own pairs."""
    names = [name for half in halves(3) for name in half]
    examples, errors = [], {}
    for n, name in enumerate(names):
        count, gold = 2 + n % 3, n % 2
        texts = tuple(f"t{j}" for j in range(count))
        examples.append(Example(name, (name,), texts, "text", gold, cluster=name))
        for j, text in enumerate(texts):
            errors[name, text] = [1.0 if j == gold else 2.0 + j, float(j), 0.0]
    alone = Example("alone", ("i",), ("x",), "text", cluster=names[0])
    lost = [Example(f"lost{n}", (f"l{n}",), ("x", "y"), "text", cluster="z") for n in (0, 1)]
    errors |= {("i", "x"): [1.0] * 3, ("l0", "x"): [1.0] * 3, ("l0", "y"): [np.nan] * 3}
    table = read_errors(Choice(), *stored(tmp_path, [*examples, alone, *lost], errors))
    assert table is not None
    assert [example.id for example in table.examples] == names
    assert table.failures == {"lost0": "an error is not finite", "lost1": "l1: not scored yet"}
    assert table.contrasts.starts.tolist() == [0, 1, 3]
    expected = [[2, 1, 0], [1, -1, 0], [3, 1, 0], [2, 1, 0], [3, 2, 0], [4, 3, 0]]
    np.testing.assert_array_equal(table.contrasts.values, expected)
    assert table.credits(np.array([1.0, 0, 0])).tolist() == [1.0] * 6
    # By place alone the first of the candidates wins.
    assert table.credits(np.array([0, 1.0, 0])).tolist() == [1.0, 0.0] * 3


class Graded(Choice):
    """Two main metrics and a secondary one."""

    def credits(self, example: Example, scores: np.ndarray) -> dict[str, Credit]:
        return {"one": Credit(1.0), "two": Credit(0.0), "R@5": Credit(1.0)}


class Open(Choice):
    graded = False


def test_the_credit_is_the_mean_of_the_main_metrics(images: Any) -> None:
    table = read_errors(Graded(), *images[1])
    assert table is not None
    assert table.credits(np.ones(3) / 3).tolist() == [0.5] * 4
    assert read_errors(Open(), *images[1]) is None


@pytest.mark.parametrize(("one", "two"), [(1, 3), (3, 1)])
def test_each_half_needs_two_examples(tmp_path: Path, one: int, two: int) -> None:
    names = halves(3)[0][:one] + halves(3)[1][:two]
    examples = [Example(name, (name,), ("x", "y"), "text", cluster=name) for name in names]
    errors = {(name, text): [1.0] * 3 for name in names for text in "xy"}
    with pytest.raises(InputError, match="task choice: 4 examples are too few"):
        read_errors(Choice(), *stored(tmp_path, examples, errors))


@pytest.mark.parametrize(("few", "warned"), [(2, False), (3, True)])
def test_few_examples_are_told(
    images: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    few: int,
    warned: bool,
) -> None:
    monkeypatch.setattr(score_settings, "FEW", few)
    with caplog.at_level(logging.WARNING, "diffitm"):
        read_errors(Choice(), *images[1])
    told = "task choice: only 2 examples choose settings and 2 measure them"
    assert (told in caplog.text) == warned


def useful(root: Path, turned: bool = False) -> tuple[str, Store, str]:
    """Texts of 120 images, told apart at the first timestep; `turned`: by the half that measures at
    the last one instead, and far more clearly."""
    choose, measured = halves(60)
    rng = np.random.default_rng(0)
    examples, errors = [], {}
    for name in choose + measured:
        examples.append(Example(name, (name,), ("x", "y"), "text", cluster=name))
        place, size = (2, 50.0) if turned and name in measured else (0, 1.5)
        for text in "xy":
            errors[name, text] = (20 + rng.normal(size=3)).tolist()
        errors[name, "y"][place] += size
    return stored(root, examples, errors)


def test_learned_weights_never_saw_the_half_that_measures(tmp_path: Path) -> None:
    """Other errors there leave the weights, and what was reached on the chosen half, as they are."""
    one = read_errors(Choice(), *useful(tmp_path / "one"))
    two = read_errors(Choice(), *useful(tmp_path / "two", turned=True))
    assert one is not None and two is not None
    first, second = (measure([t], STEPS, 3, "0-1000", "learned") for t in (one, two))
    assert first["weights"] == second["weights"]
    assert first["accuracy"] == second["accuracy"]
    assert first["measured"] != second["measured"]
    assert first["weights"][0] > 0.6
    few = measure([one, two], STEPS, 1, "0-1000", "learned")
    assert (few["timesteps"], few["weights"]) == ([100], [1.0])


def test_what_a_setting_reached_is_of_its_own_half_and_tasks_count_the_same(
    tmp_path: Path,
) -> None:
    """Right where examples choose, wrong where they measure; in the other task the reverse."""
    tables = []
    for number, (right, counts) in enumerate(((True, (2, 4)), (False, (3, 2)))):
        choose, measured = halves(4)
        names, errors = choose[: counts[0]] + measured[: counts[1]], {}
        for name in names:
            good = (name in choose) == right
            errors |= {(name, "x"): [1.0, 9.0, 1.0], (name, "y"): [2.0 if good else 0.0, 9.0, 1.0]}
        task = Choice()
        task.name = f"choice{number}"  # type: ignore[misc]
        made = [Example(name, (name,), ("x", "y"), "text", cluster=name) for name in names]
        tables.append(read_errors(task, *stored(tmp_path / str(number), made, errors)))
    found = measure(tables, STEPS, 9, "100-500", "uniform")  # type: ignore[arg-type]
    assert (found["timesteps"], found["weights"]) == ([100, 300], [0.5, 0.5])
    assert (found["accuracy"], found["measured"]) == (0.5, 0.5)
    first, second = found["tasks"]["choice0"], found["tasks"]["choice1"]
    assert (first["chosen"], first["measured"], first["n"]) == (1.0, 0.0, 4)
    assert (second["chosen"], second["measured"], second["n"]) == (0.0, 1.0, 2)
    assert first["low"] == 0.0 < first["high"] < 1.0
    assert second["low"] > 0.0 and second["high"] == 1.0


def test_ranges_hold_their_first_number_and_not_their_last() -> None:
    assert parse_range("0-1000") == (0, 1000)
    for text in ("5-5", "9-1", "-5", "1-", "1-2-3", "a-b", " 1-2"):
        with pytest.raises(InputError, match=r"^range: .*must be LOW-HIGH"):
            parse_range(text)


# --- weights


def contrasts(count: int, useful: int, seed: int = 0, steps: int = 4) -> Contrasts:
    """Decisions with two wrong candidates each, told at one timestep; folds in turn."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2 * count, steps))
    values[:, useful] += 1.0
    labels = np.arange(count)
    return Contrasts(values, 2 * labels, labels % 2, labels.astype(str))


def test_the_unit_of_a_tasks_errors_does_not_matter() -> None:
    """Neither alone nor beside a task in another unit."""
    one, two = contrasts(80, 0), contrasts(80, 2, seed=1)
    large = replace(one, values=1000 * one.values)
    every = np.arange(4)
    np.testing.assert_allclose(learn([large], every, 4), learn([one], every, 4), atol=1e-3)
    both = learn([one, two], every, 4)[1]
    np.testing.assert_allclose(learn([large, two], every, 4)[1], both, atol=1e-3)
    assert both[[0, 2]].min() > 2 * both[[1, 3]].max()


def test_places_are_those_of_the_given_timesteps() -> None:
    places, weights = learn([contrasts(80, 3)], np.array([1, 3]), 1)
    assert (places.tolist(), weights.tolist()) == ([3.0], [1.0])
    places, weights = learn([contrasts(80, 3)], np.array([0, 2, 3]), 3)
    assert places.tolist() == [0.0, 2.0, 3.0]
    assert weights.argmax() == 2 and weights.sum() == pytest.approx(1)


def test_decisions_can_be_picked() -> None:
    """Whole decisions with their labels; at some of the timesteps."""
    task = Contrasts(
        np.arange(12.0).reshape(6, 2), np.array([0, 1, 4]), np.array([0, 1, 0]), np.array([*"abc"])
    )
    some = task.of(np.array([True, False, True]))
    assert some.values[:, 0].tolist() == [0, 8, 10]
    assert (some.starts.tolist(), some.fold.tolist()) == ([0, 1], [0, 0])
    assert some.cluster.tolist() == ["a", "c"]
    middle = task.of(np.array([False, True, True])).at(np.array([1]))
    assert middle.values.tolist() == [[3], [5], [7], [9], [11]]
    assert middle.starts.tolist() == [0, 3]


def test_very_many_decisions_are_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """And brought to units of their spread."""
    task = contrasts(9, 0)
    monkeypatch.setattr(timestep_weights, "MOST", 9)
    whole = timestep_weights._thinned(task)
    np.testing.assert_allclose(whole.values, task.values / task.values.std())
    monkeypatch.setattr(timestep_weights, "MOST", 3)
    few = timestep_weights._thinned(task)
    assert few.cluster.tolist() == ["0", "3", "6"]
    assert few.values.std() == pytest.approx(1)
    flat = replace(task, values=np.zeros_like(task.values))
    assert (timestep_weights._thinned(flat).values == 0).all()


def test_losses_by_hand() -> None:
    """log(1 + sum of exp(-contrast)) of decisions with one and with two wrong candidates."""
    task = Contrasts(
        np.array([[1.0, 0], [2.0, 1.0], [-3.0, 0]]), np.array([0, 1]), np.zeros(2), np.zeros(2)
    )
    losses, _ = timestep_weights._losses(task, np.array([0.5, 2.0]))
    expected = [np.log(1 + np.exp(-0.5)), np.log(1 + np.exp(-3.0) + np.exp(1.5))]
    np.testing.assert_allclose(losses, expected)
    far = replace(task, values=1e4 * task.values)
    assert np.isfinite(timestep_weights._losses(far, np.array([0.5, 2.0]))[0]).all()


def test_the_variance_is_that_of_cluster_sums() -> None:
    """Two values of one cluster that err alike count as one witness of twice the size."""
    values = np.array([1.0, 1.0, -2.0, 4.0])
    assert timestep_weights._variance(values, np.arange(4)) == pytest.approx(18 / 16)
    assert timestep_weights._variance(values, np.array([0, 0, 1, 2])) == pytest.approx(18 / 16)
    assert timestep_weights._variance(values, np.array([0, 1, 1, 2])) == pytest.approx(18 / 16)
    assert timestep_weights._variance(values, np.array([0, 0, 1, 1])) == pytest.approx(0)


@pytest.mark.parametrize("strength", [0.0, 0.1, 10.0])
def test_the_minimum_is_one(strength: float) -> None:
    """Of the mean loss of the tasks plus the pull; no step away from it is better."""
    tasks = [contrasts(40, 0), contrasts(10, 1, seed=1)]

    def objective(weights: np.ndarray) -> float:
        scores = [task.values @ weights for task in tasks]
        losses = [np.log1p(np.exp(-s.reshape(-1, 2)).sum(1)).mean() for s in scores]
        pull = ((weights - weights.mean()) ** 2).sum() * len(weights)
        return float(np.mean(losses) + strength * pull)

    weights = timestep_weights._minimum(tasks, strength)
    assert (weights >= 0).all()
    for step in (0.05, 0.01):
        for direction in np.vstack([np.eye(4), -np.eye(4), np.ones(4), -np.ones(4)]):
            other = np.maximum(weights + step * direction, 0)
            assert objective(other) >= objective(weights) - 1e-9
    equal = timestep_weights._minimum(tasks, np.inf)
    assert np.ptp(equal) == 0
    assert objective(equal) <= objective(1.1 * equal) and objective(equal) <= objective(0.9 * equal)


def test_places_are_spread_evenly() -> None:
    assert spread(10, 3).tolist() == [1, 5, 8]
    assert spread(7, 7).tolist() == list(range(7))
