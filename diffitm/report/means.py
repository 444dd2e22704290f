"""The means of groups of figures, which tables of many benchmarks are read by."""

from __future__ import annotations

from dataclasses import replace

from diffitm.evaluation.evaluate import ResultRow
from diffitm.report.table import LATEX, Table, TableLine, percent
from diffitm.tasks.groups import GROUPS, belongs
from diffitm.tasks.registry import SETS

NOTE = (
    "A group's mean is that of its figures, each counted once whatever its number of examples: accuracies, "
    "group scores of pairs (COLA: image score), R@1 and P@1. n is their number. Effect sizes have no mean."
)


def means_table(table: Table) -> Table | None:
    """A line a group with two figures or more; None for a run of GDBench's tasks alone."""
    if SETS.keys().isdisjoint(line.task for line in table.lines):
        return None
    lines = []
    for group in GROUPS:
        own = [x for x in table.lines if x.is_share and belongs(group, x.task, x.group, x.metric)]
        if len(own) > 1:
            chance = sum(line.chance or 0.0 for line in own) / len(own)
            cells = {name: _mean(table, own, name) for name in table.columns}
            lines.append(TableLine(group, "all", "mean", len(own), chance, cells))
    return Table(table.columns, lines) if lines else None


def _mean(table: Table, lines: list[TableLine], name: str) -> ResultRow | None:
    """The mean of a column, where every line has a value; what normalising leaves alone is the naive one."""
    before = dict(zip(table.columns[1:], table.columns, strict=False)).get(name)
    found = []
    for line in lines:
        row = line.cells[name]
        if row is None and name.endswith("normalised") and before is not None:
            row = line.cells[before]
        if row is None or row.value is None:
            return None
        found.append(row)
    value = sum(row.value or 0.0 for row in found) / len(found)
    blank = replace(found[0], low=None, high=None, p=None, ties=0, failures=0)
    return replace(blank, task="", group="all", metric="mean", value=value, n=len(found))


def means_latex(means: Table) -> str:
    """A row a model and a column a group, as papers set it, the best of each in bold; for booktabs."""
    best = {
        line.task: max(
            (r.value for r in line.cells.values() if r and r.value is not None), default=None
        )
        for line in means.lines
    }
    rows = []
    for name in means.columns:
        texts = [name.translate(LATEX)]
        for line in means.lines:
            row = line.cells[name]
            text = "-" if row is None or row.value is None else percent(row.value)
            is_best = row is not None and row.value is not None and row.value == best[line.task]
            texts.append(rf"\textbf{{{text}}}" if is_best and len(means.columns) > 1 else text)
        rows.append(" & ".join(texts) + r" \\")
    chance = " & ".join(["chance", *(percent(line.chance or 0.0) for line in means.lines)]) + r" \\"
    head = " & ".join(["", *(line.task for line in means.lines)]) + r" \\"
    start = rf"\begin{{tabular}}{{l{'r' * len(means.lines)}}}"
    parts = [start, r"\toprule", head, r"\midrule", *rows, r"\midrule", chance, r"\bottomrule"]
    return "\n".join([*parts, r"\end{tabular}", ""])


def heat(value: float | None, chance: float | None) -> str | None:
    """The colour of a cell, as CSS: the bluer the further above chance, the more orange below it."""
    if value is None:
        return None
    base = chance or 0.0
    if value >= base:
        return f"rgb(0 114 178 / {0.75 * (value - base) / max(1 - base, 1e-9):.2f})"
    return f"rgb(213 94 0 / {0.75 * (base - value) / max(base, 1e-9):.2f})"
