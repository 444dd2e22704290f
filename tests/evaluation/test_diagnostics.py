"""What stored errors tell: curves, accuracy by the number of timesteps, examples, speed, tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffitm.core.schema import Example
from diffitm.evaluation import evaluate
from diffitm.evaluation.diagnostics import spread_weights
from diffitm.store import pair_table
from diffitm.store.score_store import Store, open_store
from tests.tiny import score_row, write_scores

STEPS = [100, 300, 500, 700]
CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": STEPS, "seed": 0}
CLIP = {"kind": "clip", "weights": "abc"}


def written(root: Path, task: str, *examples: Example) -> str:
    return pair_table.write_examples(task, examples, str(root / "examples"), None)[0]


def text(number: int, *texts: str) -> Example:
    return Example(str(number), (f"i{number}",), texts, "text", cluster=f"i{number}")


def test_numbers_of_timesteps_are_spread_evenly() -> None:
    """Each weight vector picks its number of places, symmetrically, and the last picks all."""
    found = spread_weights(10)
    assert list(found) == [1, 2, 3, 5, 10]
    for number, weights in found.items():
        assert weights.sum() == number
        assert set(weights) <= {0.0, 1.0}
    assert np.flatnonzero(found[1]).tolist() == [5]
    assert np.flatnonzero(found[2]).tolist() == [2, 7]
    assert np.flatnonzero(found[5]).tolist() == [1, 3, 5, 7, 9]
    assert list(spread_weights(1)) == [1]
    assert list(spread_weights(245))[-2:] == [200, 245]


def test_curves_and_counts_by_hand(tmp_path: Path) -> None:
    """One text each for right and wrong over two examples; only the last timestep tells them apart
    in the second, so its credit comes with more timesteps."""
    uri = written(tmp_path, "clevr", text(0, "x", "y"), text(1, "x", "y"))
    store = open_store(str(tmp_path), "m", CONFIG)
    lines = [
        score_row("i0", "x", [1.0, 2.0, 3.0, 4.0]),
        score_row("i0", "y", [2.0, 3.0, 4.0, 5.0]),
        score_row("i1", "x", [1.0, 1.0, 2.0, 1.0]),
        score_row("i1", "y", [1.0, 1.0, 1.0, 9.0]),
    ]
    write_scores(store, lines)
    evaluation = evaluate.evaluate({"clevr": uri}, [store])
    (curve,) = evaluation.curves
    assert (curve.timesteps, curve.n, curve.score) == (STEPS, 2, "conditional")
    assert curve.right == pytest.approx([1.0, 1.5, 2.5, 2.5])
    assert curve.wrong == pytest.approx([1.5, 2.0, 2.5, 7.0])
    # One timestep is the third, which the second example loses; two are the second and the fourth.
    assert {c.timesteps: c.value for c in evaluation.counts} == {1: 0.5, 2: 1.0, 3: 1.0, 4: 1.0}
    whole = next(row for row in evaluation.rows if row.group == "all")
    last = evaluation.counts[-1]
    assert (last.value, last.low, last.high, last.n) == (whole.value, whole.low, whole.high, 2)


def test_normalised_curves_are_less_the_unconditional_error(tmp_path: Path) -> None:
    uri = written(tmp_path, "flickr30k", Example("0", ("a", "b"), ("x",), "image"))
    store = open_store(str(tmp_path), "m", {**CONFIG, "timesteps": [10, 110]})
    lines = [score_row("a", "x", [3.0, 4.0]), score_row("b", "x", [1.0, 1.0])]
    write_scores(store, [*lines, score_row("a", "", [5.0, 5.0]), score_row("b", "", [1.0, 2.0])])
    curves = {c.score: c for c in evaluate.evaluate({"flickr30k": uri}, [store]).curves}
    assert curves["conditional"].right == [3.0, 4.0]
    assert curves["normalised"].right == [-2.0, -1.0]
    assert curves["normalised"].wrong == [0.0, -1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_error_that_is_not_finite_stays_out_of_everything_shown(
    tmp_path: Path, bad: float
) -> None:
    """Its example is a failure; curves, examples and results.json hold finite numbers alone."""
    examples = [Example(str(n), (f"a{n}", f"b{n}"), ("x", "y"), "both") for n in range(2)]
    uri = written(tmp_path, "winoground", *examples)
    store = open_store(str(tmp_path), "m", {**CONFIG, "timesteps": [10]})
    lines = []
    for n in range(2):
        for image, text, error in (
            ("a", "x", 1.0),
            ("a", "y", 3.0),
            ("b", "x", 2.0),
            ("b", "y", 1.0),
        ):
            odd = bad if (n, image, text) == (1, "b", "x") else error
            lines.append(score_row(f"{image}{n}", text, [odd]))
        lines += [score_row(f"{image}{n}", "", [2.0]) for image in "ab"]
    write_scores(store, lines)
    evaluation = evaluate.evaluate({"winoground": uri}, [store])
    assert {curve.n for curve in evaluation.curves} == {1}
    assert {case.example for case in evaluation.cases} == {"0"}
    assert [failure["example"] for failure in evaluation.failures] == ["1"]
    evaluate.write_results(evaluation, {}, str(tmp_path))
    assert "NaN" not in (tmp_path / "results.json").read_text()


def margins(tmp_path: Path, values: list[float]) -> evaluate.Evaluation:
    """Examples whose right text has these margins over the wrong one."""
    uri = written(tmp_path, "clevr", *(text(n, "right", "wrong") for n in range(len(values))))
    store = open_store(str(tmp_path), "m", {**CONFIG, "timesteps": [10]})
    lines = []
    for n, margin in enumerate(values):
        lines += [score_row(f"i{n}", "right", [50.0]), score_row(f"i{n}", "wrong", [50.0 + margin])]
    write_scores(store, lines)
    return evaluate.evaluate({"clevr": uri}, [store])


def test_examples_with_the_largest_margins_and_the_nearest_misses(tmp_path: Path) -> None:
    values = [5.0, -1.0, 9.0, -8.0, 1.0, -2.0, 7.0, -9.0, -7.0, -0.5, 2.0, float("nan")]
    cases = margins(tmp_path, values).cases
    found: dict[str, list[float]] = {}
    for case in cases:
        found.setdefault(case.kind, []).append(case.margin)
    assert found == {
        "surest right": [9.0, 7.0, 5.0],
        "surest wrong": [-9.0, -8.0, -7.0],
        "nearest miss": [-0.5, -1.0, -2.0],
    }
    first = cases[0]
    assert [(p.image, p.text, p.right) for p in first.pairs] == [
        ("i2", "right", True),
        ("i2", "wrong", False),
    ]
    assert first.pairs[0].score == -50.0


def test_an_example_is_shown_once(tmp_path: Path) -> None:
    """With two misses both are the surest and the nearest."""
    cases = margins(tmp_path, [-1.0, -2.0]).cases
    assert [(c.kind, c.margin) for c in cases] == [("surest wrong", -2.0), ("surest wrong", -1.0)]


def test_winoground_margin_is_the_worse_caption(tmp_path: Path) -> None:
    """Normalised scores: caption 0 prefers its image by 3, caption 1 by 1."""
    example = Example("0", ("a", "b"), ("x", "y"), "both", groups={"collapsed_tag": "Both"})
    uri = written(tmp_path, "winoground", example)
    store = open_store(str(tmp_path), "m", {**CONFIG, "timesteps": [10]})
    errors = {("a", "x"): 1.0, ("b", "x"): 4.0, ("a", "y"): 3.0, ("b", "y"): 2.0}
    lines = [score_row(*pair, [value]) for pair, value in errors.items()]
    write_scores(store, [*lines, score_row("a", "", [5.0]), score_row("b", "", [5.0])])
    (case,) = evaluate.evaluate({"winoground": uri}, [store]).cases
    assert (case.kind, case.margin, case.score) == ("surest right", 1.0, "normalised")
    assert [p.right for p in case.pairs] == [True, False, False, True]


def two_models(tmp_path: Path, wins: tuple[list[int], list[int]]) -> evaluate.Evaluation:
    uri = written(tmp_path, "clevr", *(text(n, "x", "y") for n in range(len(wins[0]))))
    stores = []
    for seed, won in enumerate(wins):
        store = open_store(str(tmp_path), "m", {**CONFIG, "timesteps": [10], "seed": seed})
        lines = []
        for n, win in enumerate(won):
            lines += [
                score_row(f"i{n}", "x", [1.0]),
                score_row(f"i{n}", "y", [2.0 if win else 0.5]),
            ]
        write_scores(store, lines)
        stores.append(store)
    return evaluate.evaluate({"clevr": uri}, stores)


def test_two_models_are_compared_on_the_same_examples(tmp_path: Path) -> None:
    """Seven examples that one alone gets right, one that the other does: McNemar's exact p."""
    evaluation = two_models(tmp_path, ([1] * 10 + [1] * 7 + [0], [1] * 10 + [0] * 7 + [1]))
    (test,) = evaluation.comparisons
    assert (test.first, test.second) == ("m, seed 0", "m, seed 1")
    assert test.difference == pytest.approx(6 / 18)
    assert test.p == pytest.approx(2 * (1 + 8) / 2**8)
    assert (test.n, test.test) == (18, "McNemar")
    assert test.low < test.difference < test.high


def test_models_that_agree_are_not_certainly_equal(tmp_path: Path) -> None:
    (test,) = two_models(tmp_path, ([1, 0, 1, 1], [1, 0, 1, 1])).comparisons
    assert (test.difference, test.p) == (0.0, 1.0)
    assert test.low < -0.3
    assert test.high > 0.3


def test_titles_tell_stores_of_one_model_apart() -> None:
    """By what differs, timesteps as a number; a model that stands alone keeps its name."""

    def store(model: str, **more: Any) -> Store:
        return Store(f"out/scores/{model}-1", model, CONFIG | more)

    some = [store("a"), store("a", timesteps=[1, 2]), store("b")]
    assert evaluate.titles(some) == ["a, 4 timesteps", "a, 2 timesteps", "b"]
    paper = store("a", protocol="paper")
    told = evaluate.titles([store("a"), paper])
    assert told == ["a, protocol diffusionitm", "a, protocol paper"]


def test_speed_adds_up_what_finished_tables_say(tmp_path: Path) -> None:
    """A table that was closed unfinished tells nothing; a store without work has no speed."""
    store, other = (open_store(str(tmp_path), name, CONFIG) for name in ("m", "n"))
    notes: list[dict[str, Any]] = [
        {"pairs": 10, "forwards": 40, "busy": 2.0},
        {"closed": True},
        {"pairs": 30, "forwards": 120, "busy": 2.0},
    ]
    for number, note in enumerate(notes):
        folder = tmp_path / "work" / store.name / f"{number:04d}"
        folder.mkdir(parents=True)
        (folder / "done").write_text(json.dumps(note))
    (speed,) = evaluate.speeds(str(tmp_path), [store, other])
    assert (speed.model, speed.pairs, speed.forwards, speed.seconds) == ("m", 40, 160, 4.0)
    assert speed.seconds_per_pair == pytest.approx(0.1)


def test_clip_has_no_curves(tmp_path: Path) -> None:
    uri = written(tmp_path, "clevr", text(0, "x", "y"))
    store = open_store(str(tmp_path), "clip", CLIP)
    scored = {("i0", "x"): 0.3, ("i0", "y"): 0.1}
    write_scores(store, [score_row(*pair, similarity=value) for pair, value in scored.items()])
    evaluation = evaluate.evaluate({"clevr": uri}, [store])
    assert (evaluation.curves, evaluation.counts) == ([], [])
    assert evaluation.cases[0].margin == pytest.approx(0.2)


def test_denoising_errors_and_what_changed(tmp_path: Path) -> None:
    """Right pairs and the empty text, paired with the first model of the same timesteps alone."""
    examples = [Example(str(n), (f"i{n}", "j"), ("x",), "image", cluster=f"i{n}") for n in range(4)]
    uri, stores = written(tmp_path, "flickr30k", *examples), []
    for name, steps, more in (("a", 2, 0.0), ("b", 2, 0.5), ("c", 1, 0.0)):
        config = {**CONFIG, "timesteps": STEPS[:steps]}
        store = open_store(str(tmp_path), name, config)
        lines = [score_row("j", text, [9.0] * steps) for text in ("x", "")]
        for n in range(4):
            error = 1.0 + more * (n + 1)
            lines.append(score_row(f"i{n}", "x", [error] * steps))
            lines.append(score_row(f"i{n}", "", [error + 2] * steps))
        write_scores(store, lines)
        stores.append(store)
    a, b, c = evaluate.evaluate({"flickr30k": uri}, stores).denoising
    assert (a.right, a.empty, a.n, a.change, a.empty_change) == (1.0, 3.0, 4, None, None)
    assert (c.model, c.right, c.change) == ("c", 1.0, None)
    assert (b.right, b.empty) == (2.25, 4.25)
    assert b.change is not None and b.empty_change is not None
    spread = stats.t.ppf(0.975, 3) * np.std([0.5, 1.0, 1.5, 2.0], ddof=1) / 2
    assert b.change == pytest.approx((1.25, 1.25 - spread, 1.25 + spread))
    assert b.empty_change == pytest.approx(b.change)


def test_a_change_of_one_image_has_no_interval(tmp_path: Path) -> None:
    one, two = two_models(tmp_path, ([1], [0])).denoising, two_models(tmp_path, ([1] * 3, [0] * 3))
    assert [line.change for line in one] == [None, None]
    assert [line.n for line in two.denoising] == [3, 3]


def test_models_are_compared_under_the_naive_score_where_it_decides_otherwise(
    tmp_path: Path,
) -> None:
    """Of images: normalised with normalised, naive with naive, and both of each model."""
    examples = [Example(str(n), (f"i{n}", f"j{n}"), ("x",), "image") for n in range(4)]
    uri, stores = written(tmp_path, "svo_subj", *examples), []
    for name, empty in (("a", 2.0), ("b", 3.0)):
        store = open_store(str(tmp_path), name, {**CONFIG, "timesteps": [10]})
        lines = []
        for n in range(4):
            for image, error in ((f"i{n}", 1.5 if name == "a" or n else 0.5), (f"j{n}", 1.0)):
                lines.append(score_row(image, "x", [error]))
                lines.append(score_row(image, "", [empty if image[0] == "i" else 1.0]))
        write_scores(store, lines)
        stores.append(store)
    found = [
        (c.first, c.first_score, c.second, c.second_score, c.difference)
        for c in evaluate.evaluate({"svo_subj": uri}, stores).comparisons
    ]
    assert found == [
        ("a", "normalised", "b", "normalised", 0.0),
        ("a", "normalised", "a", "conditional", 1.0),
        ("b", "normalised", "b", "conditional", 0.75),
        ("a", "conditional", "b", "conditional", -0.25),
    ]
