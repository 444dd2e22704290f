"""The result table on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from diffitm.report.table import cell, columns, lines, p_text, percent
from diffitm.results import Evaluation

WIDTH = 130


def print_results(evaluation: Evaluation) -> None:
    """Print the comparison, the tests of normalised against naive, and the number of failures."""
    console = Console(width=WIDTH, highlight=False)
    if not evaluation.rows:
        console.print("no example could be scored; see failures.json")
        return
    first = next((row for row in evaluation.rows if row.score != "cosine"), evaluation.rows[0])
    title = f"Accuracy in % [95% interval]; {first.protocol}, {first.timesteps} timesteps"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("task", "metric"):
        table.add_column(name)
    names = [name for name, _, _ in columns(evaluation)]
    for name in ("n", *names, "chance"):
        table.add_column(name, justify="right")
    for line in lines(evaluation):
        label = line.task if line.group == "all" else f"  {line.group.split('=', 1)[1]}"
        values = [cell(line.cells[name], line.n) for name in names]
        table.add_row(label, line.metric, str(line.n), *values, percent(line.chance))
    console.print(table)
    if any(row.score == "conditional" for row in evaluation.rows):
        console.print("= : one image against several texts, where normalising changes no decision")
    for test in evaluation.comparisons:
        points = 100 * test.difference
        console.print(
            f"{test.model}, {test.task} {test.metric}: normalised is {points:+.1f} points against "
            f"naive ({p_text(test.p)}, {test.n} examples, paired)"
        )
    ties = sum(row.ties for row in evaluation.rows if row.group == "all")
    console.print(
        f"ties {ties} (each counts its expected value), failures {len(evaluation.failures)}"
    )
