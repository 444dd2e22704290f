"""Self-Bench's matrix from rows of an evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.report.html import write_report
from diffitm.report.matrix import (
    Generated,
    Matrix,
    make_matrix,
    matrix_cells,
    matrix_latex,
    matrix_markdown,
)
from diffitm.report.matrix import print_matrix as show
from diffitm.report.table import make_table

MODELS = {"A": "A", "B, 5 timesteps": "B", "B, 9 timesteps": "B", "CLIP c": "CLIP c"}
GENERATED = [
    Generated("by_A", "A"), Generated("by_A-correct", "A", True),
    Generated("by_B", "B"), Generated("by_B-correct", "B", True),
]  # fmt: skip
VALUES = {
    ("by_A", "A"): 0.9, ("by_A", "B, 5 timesteps"): 0.4, ("by_A", "B, 9 timesteps"): 0.5,
    ("by_A", "CLIP c"): 0.6, ("by_B", "A"): 0.3, ("by_B", "B, 5 timesteps"): 0.8,
    ("by_B", "B, 9 timesteps"): 0.7, ("by_B", "CLIP c"): 0.2,
}  # fmt: skip


def row(task: str, group: str, model: str, value: float | None, n: int = 8) -> ResultRow:
    score = "cosine" if model.startswith("CLIP") else "conditional"
    steps = 0 if score == "cosine" else 9
    return ResultRow(
        group, "accuracy", value, 0.1, 0.95, n, 0.25, model=model, task=task, score=score,
        protocol="diffusionitm", timesteps=steps,
    )  # fmt: skip


ROWS = [
    *(row(task, "all", model, value) for (task, model), value in VALUES.items()),
    *(row(task, f"tag={tag}", model, value, 4) for (task, model), value in VALUES.items()
      for tag in ("colors", "position")),
    row("by_A-correct", "all", "A", 1.0, 5), row("by_B-correct", "all", "A", 0.4, 2),
    row("winoground", "all", "A", 0.1),
]  # fmt: skip


@pytest.fixture
def matrix() -> Matrix:
    return make_matrix(Evaluation(rows=ROWS), GENERATED, MODELS)


def test_each_model_on_the_pictures_of_each(matrix: Matrix) -> None:
    """Its own among them is marked, whatever it is scored at; the mean is over the others'."""
    whole = {x.model: x for x in matrix.lines if x.pictures == "all" and x.part == "all"}
    assert list(whole) == list(MODELS)
    for model, line in whole.items():
        found = {name: cell and cell.value for name, cell in line.cells.items()}
        assert found == {"A": VALUES["by_A", model], "B": VALUES["by_B", model]}
    assert [line.own for line in whole.values()] == ["A", "B", "B", None]
    assert [line.others for line in whole.values()] == [0.3, 0.4, 0.5, pytest.approx(0.4)]
    assert matrix.head() == ["pictures", "part", "model", "by A", "by B", "others", "chance"]
    assert matrix.texts(whole["A"]) == [
        "all", "", "A", "90.0 [10.0, 95.0]*", "30.0 [10.0, 95.0]", "30.0", "25.0",
    ]  # fmt: skip
    assert [x.part for x in matrix.lines if x.pictures == "all"] == [
        *["all"] * 4, *["tag=colors"] * 4, *["tag=position"] * 4,
    ]  # fmt: skip


def test_correct_ones_tell_how_many_they_are(matrix: Matrix) -> None:
    (line,) = [x for x in matrix.lines if x.pictures == "correct"]
    assert matrix.texts(line)[3:] == [
        "100.0 [10.0, 95.0] (n=5)*", "40.0 [10.0, 95.0] (n=2)", "40.0", "25.0",
    ]  # fmt: skip
    assert "| correct |  | A | 100.0 [10.0, 95.0] (n=5)* |" in matrix_markdown(matrix)


def test_latex(matrix: Matrix) -> None:
    """Whole sets alone, own pictures in italics."""
    lines = matrix_latex(matrix).splitlines()
    assert lines[0] == r"\begin{tabular}{llrr}" and len(lines) == 3 + 1 + 5 + 2
    assert lines[2] == r"model & pictures & by A & by B \\"
    assert lines[4] == r"A & all & \textit{90.0} & 30.0 \\"
    assert lines[7] == r"CLIP c & all & 60.0 & 20.0 \\"
    assert lines[8] == r"A & correct & \textit{100.0} & 40.0 \\"


def test_what_could_not_be_scored(capsys: pytest.CaptureFixture[str]) -> None:
    """A cell without a value has no mean beside it and no colour."""
    rows = [row("by_A", "all", "A", 0.9), row("by_B", "all", "A", None)]
    matrix = make_matrix(Evaluation(rows=rows), GENERATED[::2], MODELS)
    assert matrix.texts(matrix.lines[0])[3:] == ["90.0 [10.0, 95.0]*", "-", "", "25.0"]
    ((*_, first, second, _others, _chance),) = [r["cells"] for r in matrix_cells(matrix)["rows"]]
    assert first["heat"] == "rgb(0 114 178 / 0.65)" and second["heat"] is None
    show(matrix, 120)
    assert "90.0 [10.0, 95.0]*" in capsys.readouterr().out


def test_a_section_of_the_report(matrix: Matrix, tmp_path: Path) -> None:
    """A heat map, with a link; a report without pictures of models has none."""
    evaluation = Evaluation(rows=ROWS)
    table = make_table(evaluation)
    for out, given in ((tmp_path / "a", matrix), (tmp_path / "b", None)):
        write_report(evaluation, table, {}, str(tmp_path), str(out), matrix=given)
        page = (out / "report.html").read_text()
        assert ('href="#self-bench"' in page) is (given is not None)
        assert ('style="background: rgb(0 114 178 / 0.65)"' in page) is (given is not None)
