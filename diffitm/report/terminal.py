"""The result table on the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from diffitm.evaluation.evaluate import Comparison, Evaluation
from diffitm.evaluation.races import RaceFigure
from diffitm.report.means import NOTE as MEANS
from diffitm.report.means import means_table
from diffitm.report.table import NOTE, OF_ERRORS, RACES, Table, group_label, p_text, race_texts
from diffitm.store.run_summary import Summary
from diffitm.tasks.check import TaskState

WIDTH = 160
SUMMARY = (
    *("model", "pairs", "forwards", "time", "forwards/s", "of an actor", "in U-Net", "waiting"),
    *("loading", "retries", "failures", "GPU memory", "batch"),
)
MOST_GROUPS = 12  # a task with more is broken down in the report alone


def print_results(evaluation: Evaluation, table: Table) -> None:
    """Print the comparison, the paired tests of each task's first metric, speed and failures."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    if not evaluation.rows:
        console.print("no example could be scored; see failures.json")
        return
    used = {(r.protocol, r.timesteps) for r in evaluation.rows if r.score in OF_ERRORS}
    same = [f"; {protocol}, {steps} timesteps" for protocol, steps in used if len(used) == 1]
    title = "".join(["Accuracy in % [95% interval]", *same])
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(table.head()):
        shown.add_column(name, justify="left" if i < 2 else "right")
    groups = Counter((line.task, line.metric) for line in table.lines)
    whole = {line.task for line in table.lines if line.group == "all"}
    for line in table.lines:
        if line.group != "all" and groups[line.task, line.metric] > MOST_GROUPS:
            continue
        label, *cells = table.texts(line)
        below = line.group != "all" and line.task in whole
        shown.add_row(f"  {group_label(line.group)}" if below else label, *cells)
    console.print(shown)
    console.print(NOTE)
    if (means := means_table(table)) is not None:
        _print_means(console, means)
    if table.cut:
        console.print(table.cut)
    if table.about:
        console.print(table.about)
    _print_races(console, evaluation.races)
    _print_tests(console, evaluation.comparisons)
    for speed in evaluation.speeds:
        each = f"{1000 * speed.seconds_per_pair:.3g} ms of one actor a pair"
        console.print(f"{speed.model}: {each} ({speed.pairs:,} pairs)")
    ties = sum(row.ties for row in evaluation.rows if row.group == "all")
    console.print(
        f"ties {ties} (each counts its expected value), failures {len(evaluation.failures)}"
    )


def _print_means(console: Console, means: Table) -> None:
    shown = RichTable(title="Means by group, in %", box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(means.head()):
        shown.add_column("group" if i == 0 else name, justify="left" if i < 2 else "right")
    for line in means.lines:
        shown.add_row(*means.texts(line))
    console.print(shown)
    console.print(MEANS)


def _print_races(console: Console, races: Sequence[RaceFigure]) -> None:
    if not races:
        return
    shown = RichTable(title="Races", box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(RACES):
        shown.add_column(name, justify="left" if i < 3 else "right")
    for race in races:
        shown.add_row(*race_texts(race))
    console.print(shown)


def _print_tests(console: Console, comparisons: list[Comparison]) -> None:
    if not comparisons:
        return
    shown = RichTable(
        title="Paired tests, first less second, in points (p two-sided, not corrected for their "
        "number; all of them in the report)",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    for i, name in enumerate(("task", "metric", "first", "second", "difference", "p", "n")):
        shown.add_column(name, justify="left" if i < 4 else "right")
    first_metric = {c.task: c.metric for c in reversed(comparisons)}
    for test in comparisons:
        if test.metric == first_metric[test.task]:
            shown.add_row(*comparison_texts(test))
    console.print(shown)


def comparison_texts(test: Comparison) -> list[str]:
    """A paired test as cells."""
    first, second = f"{test.first} {test.first_score}", f"{test.second} {test.second_score}"
    points = f"{100 * test.difference:+.1f} [{100 * test.low:+.1f}, {100 * test.high:+.1f}]"
    p = f"{p_text(test.p)}, {test.test}"
    return [test.task, test.metric, first, second, points, p, str(test.n)]


def print_summary(lines: Sequence[Summary]) -> None:
    """Print what each model's scoring did and cost; the last line is the total."""
    console = Console(width=WIDTH, highlight=False, markup=False)
    if not lines[-1].pairs:
        console.print("summary: nothing needed scoring")
        return
    shown = RichTable(title="This run's scoring", box=box.SIMPLE_HEAD, title_justify="left")
    for i, name in enumerate(SUMMARY):
        shown.add_column(name, justify="right" if i else "left")
    for line in lines if len(lines) > 2 else lines[:1]:  # one model is the total
        shown.add_row(*_summary_texts(line))
    console.print(shown)


def _summary_texts(line: Summary) -> list[str]:
    rates = (line.forwards_per_second, line.forwards_per_second_of_an_actor)
    shares = (line.unet_share, line.waiting_share, line.loading_share)
    gigabytes = f"{line.gpu_memory_bytes / 1e9:.1f} GB" if line.gpu_memory_bytes else "-"
    return [
        line.model,
        *(f"{count:,}" for count in (line.pairs, line.forwards)),
        f"{line.seconds:,.0f} s",
        *("-" if rate is None else f"{rate:,.1f}" for rate in rates),
        *("-" if share is None else f"{share:.0%}" for share in shares),
        *(f"{count:,}" for count in (line.retries, line.failures)),
        gigabytes,
        str(line.batch_size or "-"),
    ]


def print_state(state: TaskState) -> None:
    """A task's line of --check, with what is wrong and where the files come from."""
    console = Console(width=WIDTH, highlight=False, soft_wrap=True)
    counts = f"{state.examples:,} examples, {state.images:,} images" if state.images else ""
    if counts and state.published not in (None, state.examples):
        counts += f" (published are {state.published:,} examples)"
    console.print(f"{state.task:20} {state.state:11} {counts}", markup=False)
    if state.problem:
        console.print(f"    {state.problem}", markup=False)
    elif state.first:
        bad = f"images: {state.missing:,} missing, {state.unreadable:,} unreadable"
        if state.failed:
            bad += f"; {state.failed:,} examples cannot be scored"
        console.print(f"    {bad}; such as {state.first}", markup=False)
    if state.state != "ready" and state.source not in state.problem:
        console.print(f"    from {state.source}", markup=False)
