"""Means of groups of figures beside their parts."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.report.html import write_report
from diffitm.report.means import heat, means_latex, means_table
from diffitm.report.table import make_table, markdown


def row(task: str, group: str, metric: str, value: float | None, **more: object) -> ResultRow:
    made = {"low": 0.1, "high": 0.9, "n": 8, "chance": 0.5, "model": "A", "score": "cosine", **more}
    return ResultRow(group, metric, value, task=task, **made)  # type: ignore[arg-type]


ROWS = [
    row("sugarcrepe", "all", "accuracy", 0.7, n=24),
    row("sugarcrepe", "part=add_att", "accuracy", 0.6),
    row("sugarcrepe", "part=swap_att", "accuracy", 0.8),
    row("sugarcrepe", "part=add_obj", "accuracy", 0.9),
    row("colorswap", "all", "group", 0.1, chance=1 / 6),
    row("colorswap", "all", "text", 0.5, chance=0.25),
]


def test_each_figure_counts_once() -> None:
    means = means_table(make_table(Evaluation(rows=ROWS)))
    assert means is not None
    (line,) = means.lines  # of objects there is one figure
    (cell,) = line.cells.values()
    assert (line.task, line.n) == ("attributes", 3)
    assert cell is not None and cell.value == pytest.approx((0.6 + 0.8 + 0.1) / 3)
    assert line.chance == pytest.approx((0.5 + 0.5 + 1 / 6) / 3)
    assert "| attributes | mean | 3 | 50.0 | 38.9 |" in markdown(means)


def test_no_mean_without_every_figure() -> None:
    rows = [*ROWS[:4], row("colorswap", "all", "group", None, chance=1 / 6)]
    means = means_table(make_table(Evaluation(rows=rows)))
    assert means is not None
    assert list(means.lines[0].cells.values()) == [None]
    assert "| attributes | mean | 3 | - |" in markdown(means)


def test_normalised_stands_for_naive_where_it_changes_nothing() -> None:
    """Text figures have one value for both, pairs have two."""
    more = {"model": "D", "protocol": "diffusionitm", "timesteps": 10}
    rows = [
        row("sugarcrepe", f"part={p}_att", "accuracy", 0.6, score="conditional", **more)
        for p in ("add", "swap")
    ]
    for score, value in (("conditional", 0.3), ("normalised", 0.9)):
        rows.append(row("colorswap", "all", "group", value, score=score, **more))
    means = means_table(make_table(Evaluation(rows=rows)))
    assert means is not None
    values = [cell.value if cell else None for cell in means.lines[0].cells.values()]
    assert values == [pytest.approx(0.5), pytest.approx(0.7)]


def test_gdbench_alone_has_none() -> None:
    rows = [row("clevr", "all", "accuracy", 0.5), row("vg_attribution", "all", "accuracy", 0.5)]
    assert means_table(make_table(Evaluation(rows=rows))) is None


def test_latex_has_models_as_rows_and_the_best_in_bold() -> None:
    other = [ResultRow(**{**vars(r), "model": "B_1", "value": (r.value or 0) / 2}) for r in ROWS]
    means = means_table(make_table(Evaluation(rows=[*ROWS, *other])))
    assert means is not None
    text = means_latex(means)
    assert r" & attributes \\" in text
    assert r"A & \textbf{50.0} \\" in text
    assert r"B\_1 & 25.0 \\" in text
    assert r"chance & 38.9 \\" in text


def test_heat() -> None:
    assert heat(1.0, 0.5) == "rgb(0 114 178 / 0.75)"
    assert heat(0.5, 0.5) == "rgb(0 114 178 / 0.00)"
    assert heat(0.0, 0.25) == "rgb(213 94 0 / 0.75)"
    assert heat(None, 0.25) is None


def test_heat_map_in_the_report(tmp_path: Path) -> None:
    evaluation = Evaluation(rows=ROWS)
    page = write_report(evaluation, make_table(evaluation), {}, str(tmp_path), str(tmp_path))
    text = Path(page).read_text()
    assert 'id="means"' in text
    assert 'style="background: rgb(0 114 178 / 0.14)"' in text
    plain = Evaluation(rows=[row("clevr", "all", "accuracy", 0.5)])
    write_report(plain, make_table(plain), {}, str(tmp_path), str(tmp_path))
    assert 'id="means"' not in Path(page).read_text()
