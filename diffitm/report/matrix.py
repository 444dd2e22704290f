"""Self-Bench's matrix: every model on the pictures that each model made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.report.means import heat
from diffitm.report.table import LATEX, MARKDOWN, cell, group_label, percent

METRIC = "accuracy"
OWN = "*"  # beside what a model decides of its own pictures
NOTE = (
    "Which of several prompts a picture is of: accuracy in %, with 95% intervals (pictures of one prompt are "
    "a cluster). *: a model on its own pictures; others: the mean over other models' pictures."
)
ALL, CORRECT = "all", "correct"


@dataclass(frozen=True)
class Generated:
    """A task of pictures: the name of it, the model that made them, whether they are its correct ones alone.
    `shown` are some of them for the report, prompt -> paths below the data root."""

    task: str
    model: str
    correct: bool = False
    shown: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixLine:
    """What a model decides of `pictures` (all or correct ones) of a `part`, by the model that made them;
    `own` is its own name among those, if it made some."""

    pictures: str
    part: str
    model: str
    own: str | None
    cells: dict[str, ResultRow | None]

    @property
    def others(self) -> float | None:
        """The mean over the pictures of other models, where all of them have a value."""
        rows = [row for name, row in self.cells.items() if name != self.own]
        values = [row.value for row in rows if row is not None and row.value is not None]
        return sum(values) / len(values) if values and len(values) == len(rows) else None

    @property
    def chance(self) -> float | None:
        """That of all cells, if it is the same."""
        known = {round(r.chance, 6) for r in self.cells.values() if r and r.chance is not None}
        return known.pop() if len(known) == 1 else None


@dataclass(frozen=True)
class Matrix:
    """A column for each model that made pictures, and lines of those that were scored."""

    columns: list[str]
    lines: list[MatrixLine]

    def head(self) -> list[str]:
        """Titles of all columns."""
        made = [f"by {name}" for name in self.columns]
        return ["pictures", "part", "model", *made, "others", "chance"]

    def texts(self, line: MatrixLine) -> list[str]:
        """A line's cells as text."""
        most = max((row.n for row in line.cells.values() if row), default=0)
        # Of correct ones each model has made another number, which is told.
        n = most if line.pictures == ALL else -1
        cells = [
            cell(line.cells[name], n) + (OWN if name == line.own else "") for name in self.columns
        ]
        last = ["" if v is None else percent(v) for v in (line.others, line.chance)]
        part = "" if line.part == "all" else group_label(line.part)
        return [line.pictures, part, line.model, *cells, *last]


def make_matrix(
    evaluation: Evaluation, generated: Sequence[Generated], models: Mapping[str, str]
) -> Matrix:
    """The matrix of an evaluation; `models` has the name of each model of its rows as a maker of pictures."""
    columns = list(dict.fromkeys(made.model for made in generated))
    rows = {(r.task, r.group, r.model): r for r in evaluation.rows if r.metric == METRIC}
    lines = []
    for correct, pictures in ((False, ALL), (True, CORRECT)):
        tasks = {made.task: made.model for made in generated if made.correct is correct}
        known = [key for key in rows if key[0] in tasks]
        parts = list(dict.fromkeys(group for _, group, _ in known))
        for part in parts if len(parts) > 2 else parts[:1]:  # one part is all
            for model in dict.fromkeys(model for _, _, model in known):
                cells: dict[str, ResultRow | None] = dict.fromkeys(columns)
                cells |= {maker: rows.get((task, part, model)) for task, maker in tasks.items()}
                own_name = models[model] if models[model] in columns else None
                lines.append(MatrixLine(pictures, part, model, own_name, cells))
    return Matrix(columns, lines)


def matrix_markdown(matrix: Matrix) -> str:
    """The matrix as Markdown."""
    head = matrix.head()
    rows = [head, ["---"] * 3 + ["---:"] * (len(head) - 3), *map(matrix.texts, matrix.lines)]
    lines = ["| " + " | ".join(t.translate(MARKDOWN) for t in row) + " |" for row in rows]
    return "\n".join([*lines, "", NOTE, ""])


def matrix_latex(matrix: Matrix) -> str:
    """The matrix of whole sets as papers set it, in percent, own pictures in italics; for booktabs."""
    rows = []
    for line in matrix.lines:
        if line.part != "all":
            continue
        texts = [line.model.translate(LATEX), line.pictures]
        for name in matrix.columns:
            row = line.cells[name]
            text = "-" if row is None or row.value is None else percent(row.value)
            texts.append(rf"\textit{{{text}}}" if name == line.own else text)
        rows.append(" & ".join(texts) + r" \\")
    head = ["model", "pictures", *(f"by {name}".translate(LATEX) for name in matrix.columns)]
    start = rf"\begin{{tabular}}{{ll{'r' * len(matrix.columns)}}}"
    parts = [start, r"\toprule", " & ".join(head) + r" \\", r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}", ""])


def print_matrix(matrix: Matrix, width: int) -> None:
    """Print the matrix of whole sets; the report has its parts."""
    console = Console(width=width, highlight=False, markup=False)
    shown = RichTable(title="Self-Bench", box=box.SIMPLE_HEAD, title_justify="left")
    kept = [i for i in range(len(matrix.head())) if i != 1]
    for i in kept:
        shown.add_column(matrix.head()[i], justify="left" if i < 3 else "right")
    for line in matrix.lines:
        if line.part == "all":
            texts = matrix.texts(line)
            shown.add_row(*(texts[i] for i in kept))
    console.print(shown)
    console.print(NOTE)


def matrix_cells(matrix: Matrix) -> dict[str, Any]:
    """The matrix for the template, as a heat map."""
    rows = []
    for line in matrix.lines:
        found = [line.cells[name] for name in matrix.columns]
        values = [row.value if row else None for row in found]
        chances = [row.chance if row else None for row in found]
        values, chances = [*values, line.others, line.chance], [*chances, line.chance, None]
        cells = []
        for text, value in zip(matrix.texts(line), [None, None, None, *values], strict=True):
            number, _, bounds = text.partition(" ") if value is not None else (text, "", "")
            cells.append({"text": number, "bounds": bounds, "value": value})
        for shown, value, chance in zip(cells[3:-1], values, chances, strict=False):
            shown["heat"] = heat(value, chance)
        rows.append({"key": f"{line.pictures}, {line.part}", "cells": cells})
    return {"head": matrix.head(), "texts": 3, "rows": rows}
