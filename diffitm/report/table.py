"""The comparison table that the terminal and the report share."""

from __future__ import annotations

from dataclasses import dataclass

from diffitm.results import Evaluation, Row

NAIVE, NORMALISED = "diffusion naive", "diffusion normalised"


@dataclass(frozen=True)
class Line:
    """One line: a task, group and metric with the value of every column."""

    task: str
    group: str
    metric: str
    n: int
    chance: float
    cells: dict[str, Row | None]


def columns(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(title, model, score) of every column: two a diffusion model, one a CLIP."""
    models = list(dict.fromkeys(row.model for row in evaluation.rows if row.score != "cosine"))
    clips = list(dict.fromkeys(row.model for row in evaluation.rows if row.score == "cosine"))
    out = []
    for model in models:
        name = "" if len(models) == 1 else f"{model}: "
        out += [(name + NAIVE, model, "conditional"), (name + NORMALISED, model, "normalised")]
    return out + [("CLIP" if len(clips) == 1 else clip, clip, "cosine") for clip in clips]


def lines(evaluation: Evaluation) -> list[Line]:
    """The table's lines in the order of the results."""
    found: dict[tuple[str, str, str], dict[tuple[str, str], Row]] = {}
    for row in evaluation.rows:
        found.setdefault((row.task, row.group, row.metric), {})[row.model, row.score] = row
    whole = {(row.task, row.metric): row.n for row in evaluation.rows if row.group == "all"}
    out = []
    for (task, group, metric), rows in found.items():
        first = next(iter(rows.values()))
        if group != "all" and first.n == whole[task, metric]:
            continue  # a breakdown into one group says nothing new
        cells = {title: rows.get((model, score)) for title, model, score in columns(evaluation)}
        out.append(Line(task, group, metric, first.n, first.chance, cells))
    return out


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def cell(row: Row | None, n: int) -> str:
    """'81.3 [77.1, 84.9]', '=' where normalising changes nothing, '-' where nothing was scored.

    A value over other examples than the line's `n` says so.
    """
    if row is None:
        return "="
    if row.value is None or row.low is None or row.high is None:
        return "-"
    other = f" (n={row.n})" if row.n != n else ""
    return f"{percent(row.value)} [{percent(row.low)}, {percent(row.high)}]{other}"


def p_text(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.4f}"
