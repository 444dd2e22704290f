"""Results from stored errors: which error, which weights, what is compared with what."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffitm.core.schema import Example
from diffitm.evaluation import evaluate
from diffitm.evaluation.diagnostics import Cases, DenoisingStats, ErrorCurves, right_pairs
from diffitm.metrics.intervals import difference_interval, paired_p
from diffitm.store import pair_table
from diffitm.store.join import ScoredExample
from diffitm.store.score_store import Store, open_store
from tests.tiny import score_row, write_scores

CONFIG = {"kind": "diffusion", "protocol": "diffusionitm", "timesteps": [10, 110], "seed": 0}


def written(root: Path, task: str, *examples: Example) -> str:
    return pair_table.write_examples(task, examples, str(root / "examples"), None)[0]


def stored(root: Path, lines: list[dict[str, Any]], model: str = "m", **more: Any) -> Store:
    store = open_store(str(root), model, {**CONFIG, **more})
    write_scores(store, lines)
    return store


def texts(number: int, gold: int = 0) -> Example:
    return Example(str(number), (f"i{number}",), ("x", "y"), "text", gold, f"i{number}")


def test_an_evaluation_loads_no_torch() -> None:
    """It is half a gigabyte and seconds of every process that only reads stored scores."""
    told = "import sys, diffitm.evaluation.evaluate; print({'torch', 'ray'} & set(sys.modules))"
    command = [sys.executable, "-c", told]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("protocol", "kind"),
    [("diffusionitm", "l2"), ("paper", "mse"), ("diffusion-classifier", "mse"), (None, "l2")],
)
def test_each_protocol_has_its_own_error(protocol: str | None, kind: str) -> None:
    store = Store("u", "m", {"kind": "diffusion"} | ({"protocol": protocol} if protocol else {}))
    assert evaluate.error_of(store, "auto") == kind
    assert evaluate.error_of(store, "huber") == "huber"


@pytest.mark.parametrize(("protocol", "value"), [("diffusionitm", 1.0), ("paper", 0.0)])
def test_the_protocols_own_error_decides(tmp_path: Path, protocol: str, value: float) -> None:
    """Norms 2.75 < 3, squares 25.25 > 18."""
    uri = written(tmp_path, "clevr", texts(0))
    lines = [score_row("i0", "x", [0.5, 5.0]), score_row("i0", "y", [3.0, 3.0])]
    store = stored(tmp_path, lines, protocol=protocol)
    (row,) = evaluate.evaluate({"clevr": uri}, [store]).rows
    assert (row.value, row.protocol) == (value, protocol)


@pytest.mark.parametrize(
    ("weights", "value"),
    [(None, 0.0), ([3.0, 1.0], 1.0), ([1.0, 3.0], 0.0), ([9.0, 1.0, 1.0], 0.0)],
)
def test_weights_decide(tmp_path: Path, weights: list[float] | None, value: float) -> None:
    """Right at the first timestep, more wrong at the second; three weights fit no store of two."""
    uri = written(tmp_path, "clevr", texts(0))
    store = stored(tmp_path, [score_row("i0", "x", [1.0, 4.0]), score_row("i0", "y", [2.0, 2.0])])
    given = None if weights is None else np.array(weights)
    found = evaluate.evaluate({"clevr": uri}, [store], weights=given)
    assert {s["weighted"] for s in found.settings.values()} == {len(weights or []) == 2}
    assert found.rows[0].value == value


def changes(folder: Path, **more: Any) -> list[bool]:
    """Of two stores that differ in these settings: whether the second is compared with the first."""
    examples = [texts(n) for n in range(3)]
    uri = written(folder, "clevr", *examples)
    lines = [score_row(f"i{n}", t, [1.0 + n, 2.0]) for n in range(3) for t in "xy"]
    first = stored(folder, lines, "a")
    second = open_store(str(folder), "b", {**CONFIG, **more})
    write_scores(second, lines)
    denoising = evaluate.evaluate({"clevr": uri}, [first, second]).denoising
    return [line.change is not None for line in denoising]


@pytest.mark.parametrize(
    "more",
    [
        {"weights": "w2"}, {"protocol": "paper"}, {"timesteps": [10, 120]}, {"seed": 1},
        {"resize": "crop"}, {"latent_seed": 1}, {"root": "/d"},
    ],
    ids=lambda more: next(iter(more)),
)  # fmt: skip
def test_errors_measured_otherwise_are_not_compared(tmp_path: Path, more: dict) -> None:
    assert changes(tmp_path, **more) == [False, False]


def test_errors_of_one_model_tuned_are_compared(tmp_path: Path) -> None:
    assert changes(tmp_path, lora="l", dtype="bf16") == [False, True]


def test_comparisons_leave_out_what_either_lacks(tmp_path: Path) -> None:
    """First less second over the examples that both have, each with its own cluster."""
    examples = [texts(n) for n in range(7)]
    uri = written(tmp_path, "clevr", *examples)
    right = {"a": [1, 1, 1, None, 0, 1, 1], "b": [0, 0, 1, 1, 1, None, 0]}
    stores = []
    for model, wins in right.items():
        lines = []
        for n, win in enumerate(wins):
            if win is None:
                lines += [score_row(f"i{n}", t, failure="torn") for t in "xy"]
            else:
                lines += [
                    score_row(f"i{n}", "x", [2.0] * 2),
                    score_row(f"i{n}", "y", [1.0 + 2 * win] * 2),
                ]
        stores.append(stored(tmp_path, lines, model))
    evaluation = evaluate.evaluate({"clevr": uri}, stores)
    (test,) = evaluation.comparisons
    one, two = np.array([1.0, 1, 1, 0, 1]), np.array([0.0, 0, 1, 1, 0])
    clusters = np.array(["i0", "i1", "i2", "i4", "i6"])
    assert (test.first, test.second, test.n) == ("a", "b", 5)
    assert test.difference == pytest.approx(0.4)
    assert (test.low, test.high) == pytest.approx(difference_interval(one, two, clusters))
    assert test.p == pytest.approx(paired_p(one, two, clusters))
    values = {row.model: (row.value, row.n, row.failures) for row in evaluation.rows}
    assert values == {"a": (pytest.approx(5 / 6), 6, 1), "b": (0.5, 6, 1)}


def test_a_gold_may_stand_anywhere(tmp_path: Path) -> None:
    """In figures, curves, margins and the pairs that are shown."""
    uri = written(tmp_path, "clevr", texts(0, gold=1))
    store = stored(tmp_path, [score_row("i0", "x", [5.0, 6.0]), score_row("i0", "y", [1.0, 3.0])])
    found = evaluate.evaluate({"clevr": uri}, [store])
    assert found.rows[0].value == 1.0
    assert (found.curves[0].right, found.curves[0].wrong) == ([1.0, 3.0], [5.0, 6.0])
    (case,) = found.cases
    assert (case.kind, case.margin) == ("surest right", 3.5)
    assert [(p.text, p.score, p.right) for p in case.pairs] == [
        ("y", -2.0, True),
        ("x", -5.5, False),
    ]
    assert found.denoising[0].right == 2.0 and found.denoising[0].empty is None


def test_which_pairs_belong_together() -> None:
    def mask(images: int, count: int, direction: Any, gold: int) -> list[list[bool]]:
        names, words = tuple(map(str, range(images))), tuple(map(str, range(count)))
        return right_pairs(ScoredExample(Example("0", names, words, direction, gold))).tolist()

    assert mask(1, 3, "text", 2) == [[False, False, True]]
    assert mask(3, 1, "image", 1) == [[False], [True], [False]]
    assert mask(2, 2, "both", 1) == [[True, False], [False, True]]


def scored(name: str, errors: list[float], gold: int = 0, **more: Any) -> ScoredExample:
    """Images of one text with an error at one timestep; the empty text's error is 10."""
    example = Example(
        name, tuple(f"{name}{i}" for i in range(len(errors))), ("x",), "image", gold, name
    )
    conditional = np.array(errors)[:, None, None]
    return ScoredExample(
        example, conditional=conditional, unconditional=np.full_like(conditional, 10.0), **more
    )


def test_curves_weigh_examples_and_not_pairs() -> None:
    """Three wrong images count as one; what has no wrong pair, no errors or no number is left out."""
    curves = ErrorCurves()
    for item in (
        scored("a", [1.0, 2.0, 3.0, 7.0]),
        scored("b", [8.0, 3.0], gold=1),
        scored("c", [1.0]),
        scored("d", [1.0, np.inf]),
        scored("e", [1.0, 5.0], failure="torn"),
        replace(scored("f", [1.0, 5.0]), unconditional=np.full((2, 1, 1), np.nan)),
    ):
        curves.add(item)
    first, second = curves.read("m", "t", [10])
    assert (first.score, first.right, first.wrong, first.n) == ("conditional", [2.0], [6.0], 2)
    assert (second.score, second.right, second.wrong) == ("normalised", [-8.0], [-4.0])


def test_denoising_leaves_out_what_has_no_number() -> None:
    """Of the means, and of a change, pair by pair."""
    one, two = DenoisingStats(), DenoisingStats()
    for error, other in ((1.0, 3.0), (2.0, 5.0), (np.inf, 1.0), (6.0, 7.0)):
        name = f"e{error}"
        one.add(scored(name, [error, 50.0]))
        two.add(scored(name, [other, 60.0]))
    one.add(scored("lost", [1.0, 2.0], failure="torn"))
    two.add(scored("lost", [1.0, 2.0]))
    first, second = one.read("a", "t", None), two.read("b", "t", one)
    assert first is not None and second is not None and second.change is not None
    assert (first.right, first.empty, first.n, first.change) == (3.0, 10.0, 4 - 1, None)
    assert (second.right, second.n) == (pytest.approx(17 / 5), 5)
    assert second.change[0] == pytest.approx((2 + 3 + 1) / 3)
    assert second.change[1] < second.change[0] < second.change[2]
    assert DenoisingStats().read("c", "t", None) is None


def test_a_tie_is_neither_right_nor_wrong_and_the_first_of_equals_is_shown() -> None:
    cases = Cases()
    for name, errors in (("tie", [2.0, 2.0]), *((f"e{n}", [1.0, 2.0]) for n in range(5))):
        cases.add(scored(name, errors))
    for left_out in ([1.0], [9.0, np.inf]):
        cases.add(scored("out", left_out))
    cases.add(scored("miss", [4.0, 3.0, 9.0, 3.5]))
    found = cases.read("m", "t")
    assert [(case.kind, case.example) for case in found] == [
        ("surest right", "e0"), ("surest right", "e1"), ("surest right", "e2"),
        ("surest wrong", "miss"),
    ]  # fmt: skip
    last = found[-1]
    assert (last.margin, last.score) == (-1.0, "normalised")
    assert [(p.image, p.score, p.right) for p in last.pairs] == [
        ("miss0", 6.0, True), ("miss1", 7.0, False),
    ]  # fmt: skip


def test_settings_that_differ_are_in_the_title() -> None:
    """In their order, of stores of one model alone."""

    def store(model: str, **more: Any) -> Store:
        return Store("u", model, CONFIG | more)

    same = [store("a", resize="crop", seed=2), store("a", resize="squash", dtype="bf16")]
    assert evaluate.titles([*same, store("b", seed=7)]) == [
        "a, dtype None, resize crop, seed 2",
        "a, dtype bf16, resize squash, seed 0",
        "b",
    ]
    assert evaluate.titles([store("a"), store("a")]) == ["a", "a"]


def test_an_image_in_any_folder_will_do(tmp_path: Path) -> None:
    """Also without a folder; else the first that is named is the one that is told."""
    examples = [
        Example(str(n), (image,), ("x", "y"), "text")
        for n, image in enumerate(("d/a.png", "d/b.png", "c.png"))
    ]
    uri, root = written(tmp_path, "clevr", *examples), tmp_path / "root"
    (root / "d").mkdir(parents=True)
    (root / "a.png").touch()
    assert evaluate.present(str(root), uri) == str(root / "d" / "a.png")
    (root / "c.png").touch()
    assert evaluate.present(str(root), uri) is None


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [("fp16", " in fp16: try --dtype bf16 or fp32"), ("bf16", " in bf16: try --dtype fp32"), ("fp32", "")],
)  # fmt: skip
def test_no_score_is_finite(tmp_path: Path, dtype: str, hint: str) -> None:
    """Is no accuracy of 0: there is no figure, the examples are failures, and another dtype is suggested.
    Beside one score that is finite, they are lost, as before."""
    examples = {"clevr": written(tmp_path, "clevr", texts(0), texts(1))}
    nan = float("nan")
    lines = [score_row(f"i{i}", text, [nan, nan]) for i in range(2) for text in ("x", "y", "")]
    store = stored(tmp_path / "none", lines, dtype=dtype)
    found = evaluate.evaluate(examples, [store])
    assert {row.value for row in found.rows} == {None} and {row.n for row in found.rows} == {0}
    assert [line["failure"] for line in found.failures] == [f"a score is not finite{hint}"] * 2
    assert found.counts == []
    lines[3:] = [score_row("i1", text, [1.0, 2.0]) for text in ("x", "y", "")]
    found = evaluate.evaluate(examples, [stored(tmp_path / "one", lines, dtype=dtype)])
    assert {row.n for row in found.rows} == {2} and None not in {row.value for row in found.rows}


def test_a_metric_that_one_kind_of_score_has_alone_is_compared() -> None:
    """A task of one's own may give credits under the naive score that it has not under the normalised."""

    def column(model: str, **credits: list[float]) -> Any:
        return SimpleNamespace(model=model, credits={k: np.array(v) for k, v in credits.items()})

    main = {name: column(name, accuracy=[1.0, 0.0]) for name in "ab"}
    naive = [column(name, accuracy=[1.0, 0.0], spread=[0.5, 0.5]) for name in "ab"]
    assert evaluate._told("accuracy", *naive, main)
    assert not evaluate._told("spread", *naive, main)
