"""The comparison table that the terminal, the report and the files for papers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from diffitm.evaluation.cut_texts import cut_note
from diffitm.evaluation.evaluate import Evaluation, ResultRow
from diffitm.evaluation.races import RaceFigure
from diffitm.metrics.figures import Unit
from diffitm.report.published_figures import Published, published
from diffitm.tasks.mmbias import PUBLISHED_EFFECT

NAIVE, NORMALISED = "diffusion naive", "diffusion normalised"
OF_CLIP = ("cosine", "probe")
OF_ERRORS = ("conditional", "normalised")
RACES = ("model", "task", "rules", "decisions", "forwards", "share", "as in full, % of audited")
SINGLE = "single"  # what stands for the score of a model that has one
NOTE = (
    "= : one image against several texts, where normalising changes no decision. "
    "Ties count their expected value."
)


@dataclass(frozen=True)
class TableLine:
    """One line: a task, group and metric with the value of every column."""

    task: str
    group: str
    metric: str
    n: int
    chance: float | None
    cells: dict[str, ResultRow | None]

    @property
    def unit(self) -> Unit:
        """That of every cell."""
        return next((row.unit for row in self.cells.values() if row is not None), "share")

    @property
    def is_share(self) -> bool:
        return self.unit == "share"


@dataclass(frozen=True)
class Table:
    """Column titles and lines; `published` adds columns of published figures, `raced` says what of the
    figures was raced, `cut` which texts were not read to their end, `about` more of the
    models."""

    columns: list[str]
    lines: list[TableLine]
    published: Sequence[Published] = ()
    raced: str = ""
    cut: str = ""
    about: str = ""

    @property
    def notes(self) -> list[str]:
        """What stands below it."""
        return [text for text in (self.raced, self.cut, self.about) if text]

    def head(self) -> list[str]:
        """Titles of all columns."""
        return [
            "task",
            "metric",
            "n",
            *self.columns,
            "chance",
            *(column.title for column in self.published),
        ]

    def texts(self, line: TableLine) -> list[str]:
        """A line's cells as text."""
        label = line.task if line.group == "all" else f"{line.task}: {group_label(line.group)}"
        chance = "" if line.chance is None else number(line.chance, line.unit)
        cells = []
        for before, name in zip(["", *self.columns], self.columns, strict=False):
            row, naive = line.cells[name], line.cells.get(before)
            decided = naive is not None and naive.value is not None
            same = row is None and name.endswith("normalised") and decided
            cells.append("=" if same else cell(row, line.n))
        key = line.task, line.group, line.metric
        more = [column.figures.get(key, "") for column in self.published]
        count = "" if line.unit == "number" and not line.n else str(line.n)
        return [label, line.metric, count, *cells, chance, *more]


def make_table(
    evaluation: Evaluation, real_data: bool = False, published_bias: bool = False
) -> Table:
    """The table of all results. Published figures stand beside ours only on real data and where they are
    comparable; the published pooling of bias is left out unless asked for."""
    titles = columns(evaluation)
    found: dict[tuple[str, str, str], dict[tuple[str, str], ResultRow]] = {}
    for row in evaluation.rows:
        if row.metric != PUBLISHED_EFFECT or published_bias:
            found.setdefault((row.task, row.group, row.metric), {})[row.model, row.score] = row
    whole = {(row.task, row.metric): row.n for row in evaluation.rows if row.group == "all"}
    lines = []
    for (task, group, metric), rows in found.items():
        first = next(iter(rows.values()))
        if group != "all" and first.n == whole.get((task, metric)):
            continue  # a breakdown into one group says nothing new
        known = {
            (m, score if score in OF_ERRORS else SINGLE): row for (m, score), row in rows.items()
        }
        cells = {title: known.get((model, score)) for title, model, score in titles}
        lines.append(TableLine(task, group, metric, first.n, first.chance, cells))
    shown = published(evaluation) if real_data else []
    about = " ".join(evaluation.notes)
    notes = raced_note(evaluation.races), cut_note(evaluation.cut_texts), about
    return Table([title for title, _, _ in titles], lines, shown, *notes)


def raced_note(races: Sequence[RaceFigure]) -> str:
    """What below a table says of figures that were raced; nothing where none was."""
    if not races:
        return ""
    rules = " and ".join(dict.fromkeys(race.rules for race in races))
    tasks = ", ".join(dict.fromkeys(race.task for race in races))
    share = sum(race.forwards for race in races) / sum(race.full for race in races)
    agreed, audited = (sum(getattr(race, name) for race in races) for name in ("agreed", "audited"))
    text = f"Raced ({rules}) with {share:.0%} of the forwards of a full run, audits aside: {tasks}."
    if audited:
        return f"{text} Of {audited:,} audited decisions {agreed:,} came out as in full."
    return f"{text} No decision was audited."


def race_texts(race: RaceFigure) -> list[str]:
    """The cells of RACES for a task."""
    alike = "-"
    if race.agreement is not None and race.low is not None and race.high is not None:
        interval = f"[{percent(race.low)}, {percent(race.high)}]"
        alike = f"{percent(race.agreement)} {interval} of {race.audited:,}"
    forwards = f"{race.forwards:,} of {race.full:,}"
    return [
        race.model,
        race.task,
        race.rules,
        f"{race.contests:,}",
        forwards,
        f"{race.share:.0%}",
        alike,
    ]


def columns(evaluation: Evaluation) -> list[tuple[str, str, str]]:
    """(title, model, score) of every column: two a diffusion model, one another model."""
    models = list(dict.fromkeys(row.model for row in evaluation.rows if row.score in OF_ERRORS))
    others = {row.model: row.score for row in evaluation.rows if row.score not in OF_ERRORS}
    is_clip = all(score in OF_CLIP for score in others.values())
    out = []
    for model in models:
        name = "" if len(models) == 1 else f"{model}: "
        short = ("naive", "normalised") if name else (NAIVE, NORMALISED)
        out += [(name + short[0], model, "conditional"), (name + short[1], model, "normalised")]
    return out + [("CLIP" if len(others) == 1 and is_clip else m, m, SINGLE) for m in others]


def group_label(group: str) -> str:
    """'subtask=spatial' -> 'spatial', 'num_main_preds=1' -> 'num_main_preds 1'."""
    key, _, value = group.partition("=")
    return f"{key} {value}" if value.isdigit() else value


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def number(value: float, unit: Unit = "share") -> str:
    """A share in percent, an effect size with its sign, a number as it is."""
    if unit == "number":
        return f"{value:.4g}"
    return percent(value) if unit == "share" else f"{value:+.2f}"


def cell(row: ResultRow | None, n: int) -> str:
    """'81.3 [77.1, 84.9]', '-' where nothing was scored.

    A value over other examples than the line's `n` says so.
    """
    if row is None or row.value is None:
        return "-"
    text = number(row.value, row.unit)
    if row.low is not None and row.high is not None:
        text += f" [{number(row.low, row.unit)}, {number(row.high, row.unit)}]"
    if row.p is not None:
        text += f" {p_text(row.p)}"
    return text + (f" (n={row.n})" if row.n != n else "")


def p_text(p: float) -> str:
    return "p<.001" if p < 1e-3 else f"p={p:.3f}".replace("=0.", "=.")


MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
LATEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "\n": " "}
)


def markdown(table: Table) -> str:
    """The table as Markdown."""
    rows = [table.head(), ["---"] * 2 + ["---:"] * (len(table.head()) - 2)]
    rows += [table.texts(line) for line in table.lines]
    lines = ["| " + " | ".join(t.translate(MARKDOWN) for t in row) + " |" for row in rows]
    for note in table.notes:
        lines += ["", note.translate(MARKDOWN)]
    return "\n".join(lines) + "\n"


def latex(table: Table) -> str:
    """The table as LaTeX, for booktabs."""
    head, *rows = [
        " & ".join(text.translate(LATEX) for text in texts) + r" \\"
        for texts in [table.head(), *map(table.texts, table.lines)]
    ]
    form = "ll" + "r" * (len(table.head()) - 2)
    parts = [rf"\begin{{tabular}}{{{form}}}", r"\toprule", head, r"\midrule", *rows]
    notes = [line for note in table.notes for line in ("", r"\smallskip", note.translate(LATEX))]
    return "\n".join([*parts, r"\bottomrule", r"\end{tabular}", *notes, ""])
