"""Charts as wide as the page: their places are percentages, so that text keeps its size on a phone and
on a wide screen. The template charts.html.jinja draws them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffitm.evaluation.evaluate import ResultRow
from diffitm.report.looks import Key, Look, Looks
from diffitm.report.table import TableLine, cell, group_label

BAR, GAP = 9, 2  # pixels: a bar's height, and what is between two
MOST_ROWS = 8  # of a block without a task's name
HISTOGRAM_HEIGHT = 160  # pixels


@dataclass(frozen=True)
class Mark:
    """A bar from `left` to `right` or a dot at `right`, in percent of the width, `top` in pixels."""

    look: Look
    left: float
    right: float
    top: int
    name: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """What stands beside one label."""

    label: str
    marks: list[Mark]
    height: int
    line: float | None = None  # chance


@dataclass(frozen=True)
class Block:
    """Rows below a title and the axis."""

    title: str
    rows: list[Row]


@dataclass(frozen=True)
class Chart:
    """Blocks that share an axis; `ticks` are (percent of the width, label), `form` is bar, stack or
    dot."""

    label: str
    axis: str
    ticks: list[tuple[float, str]]
    keys: list[Key]
    blocks: list[Block]
    form: str = "bar"
    thickness: int = BAR
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Histogram:
    """`bars` are (left, width, in percent; height, in pixels)."""

    label: str
    axis: str
    ticks: list[tuple[float, str]]
    bars: list[tuple[float, float, float]]
    most: int
    height: int = HISTOGRAM_HEIGHT


SHARE = "in %; the lines are 95% intervals"
PERCENT = [(float(tick), str(tick)) for tick in (0, 25, 50, 75, 100)]


def bars(lines: Sequence[TableLine], looks: Looks, titles: Sequence[str], label: str) -> Chart:
    """Shares with intervals and a dotted line at chance; a block a task."""
    blocks = [
        Block(task, [_bar_row(line, line.metric, looks, titles) for line in members])
        for task, members in itertools.groupby(lines, key=lambda line: line.task)
    ]
    return Chart(label, SHARE, PERCENT, _keys(lines, looks, titles), blocks, notes=_notes(looks))


def group_bars(
    lines: Sequence[TableLine], looks: Looks, titles: Sequence[str], label: str
) -> Chart:
    """The same of one task's groups."""
    rows = [_bar_row(line, group_label(line.group), looks, titles) for line in lines]
    blocks = [Block("", part) for part in _parts(rows)]
    return Chart(label, SHARE, PERCENT, _keys(lines, looks, titles), blocks, notes=_notes(looks))


def effects(lines: Sequence[TableLine], looks: Looks, titles: Sequence[str], label: str) -> Chart:
    """Effect sizes with intervals around 0."""
    known = [row for line in lines for row in line.cells.values() if row and row.value is not None]
    ends = [v for row in known for v in (row.value, row.low, row.high) if v is not None]
    ticks = tick_values(min([0.0, *ends]), max([0.0, *ends]))
    low, span = ticks[0], ticks[-1] - ticks[0]

    def place(value: float) -> float:
        return 100 * (value - low) / span

    rows = []
    for line in lines:
        marks = []
        for i, (title, row) in enumerate(_shown(line, titles)):
            assert row.value is not None
            bounds = [None if b is None else place(b) for b in (row.low, row.high)]
            name = f"{title}: {cell(row, line.n)}"
            top, at = _top(i), place(row.value)
            marks.append(Mark(looks.of_column(title), place(0), at, top, name, *bounds))
        rows.append(Row(group_label(line.group), marks, _top(len(marks)) + GAP, place(0)))
    keys = looks.keys(titles, "dot")
    return Chart(
        label,
        "effect size; above 0: the first is nearer to pleasant",
        [(place(tick), f"{tick:g}") for tick in ticks],
        keys,
        [Block("", part) for part in _parts(rows)],
        form="dot",
    )


def share_bars(lines: Sequence[TableLine], titles: Sequence[str], label: str) -> Chart:
    """Stacked shares of the variance, a bar a model and kind of score; a block a task."""
    keys = list(dict.fromkeys(line.metric for line in lines))
    blocks = []
    for task, members in itertools.groupby(lines, key=lambda line: line.task):
        shown, rows = list(members), []
        for title in titles:
            at, marks = 0.0, []
            for line in shown:
                row = line.cells[title]
                if row and row.value:
                    name = f"{line.metric.removeprefix('var. ')}: {cell(row, line.n)}"
                    end = at + 100 * row.value
                    marks.append(Mark(Look(keys.index(line.metric)), at, end, GAP, name))
                    at = end
            if marks:
                rows.append(Row(title, marks, BAR + 2 * GAP))
        blocks.append(Block(task, rows))
    legend = [Key(k.removeprefix("var. "), Look(i), "bar") for i, k in enumerate(keys)]
    return Chart(label, "% of the variance", PERCENT, legend, blocks, form="stack")


def histogram(edges: Sequence[float], counts: Sequence[int], axis: str, label: str) -> Histogram:
    """How many fall between each edge and the next."""
    low, span, most = edges[0], (edges[-1] - edges[0]) or 1.0, max(counts)
    ticks = [t for t in tick_values(edges[0], edges[-1]) if edges[0] <= t <= edges[-1]]
    return Histogram(
        label,
        axis,
        [(100 * (t - low) / span, f"{t:g}") for t in ticks],
        [
            (100 * (a - low) / span, 100 * (b - a) / span, HISTOGRAM_HEIGHT * n / (most or 1))
            for (a, b), n in zip(itertools.pairwise(edges), counts, strict=True)
        ],
        most,
    )


def tick_values(low: float, high: float) -> list[float]:
    """Round numbers that hold both ends."""
    from matplotlib.ticker import MaxNLocator

    found = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(tick), 10) for tick in found]


def _keys(lines: Sequence[TableLine], looks: Looks, titles: Sequence[str]) -> list[Key]:
    keys = looks.keys(titles, "bar")
    if any(line.chance is not None for line in lines):
        keys.append(Key("chance", Look(0), "chance"))
    return keys


def _notes(looks: Looks) -> list[str]:
    return ["outlined: naive, filled: normalised"] if looks.two_scores else []


def _parts(rows: list[Row]) -> list[list[Row]]:
    """Blocks of about the same length."""
    number = -(-len(rows) // MOST_ROWS)
    each = -(-len(rows) // max(1, number)) or 1
    return [rows[at : at + each] for at in range(0, len(rows), each)]


def _top(i: int) -> int:
    return GAP + i * (BAR + GAP)


def _shown(line: TableLine, titles: Sequence[str]) -> list[tuple[str, ResultRow]]:
    """A line's columns with a value: no place is kept for those without."""
    cells = ((title, line.cells[title]) for title in titles)
    return [(title, row) for title, row in cells if row is not None and row.value is not None]


def _bar_row(line: TableLine, label: str, looks: Looks, titles: Sequence[str]) -> Row:
    marks = []
    for i, (title, row) in enumerate(_shown(line, titles)):
        assert row.value is not None
        bounds = [None if b is None else 100 * b for b in (row.low, row.high)]
        name = f"{title}: {cell(row, line.n)}"
        marks.append(Mark(looks.of_column(title), 0, 100 * row.value, _top(i), name, *bounds))
    chance = None if line.chance is None else 100 * line.chance
    return Row(label, marks, _top(max(1, len(marks))) + GAP, chance)
