"""Charts as inline SVG: text and axes take the page's colour, so that they read light and dark."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffitm.evaluation.diagnostics import Count, Curve
from diffitm.evaluation.evaluate import ResultRow
from diffitm.report.table import TableLine, group_label

# Okabe and Ito's colours: told apart in print and by the colour-blind; patterns where there is none.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
PATTERNS = ("", "///", "...", "\\\\\\", "xx", "--", "++", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDE, SMALL = 5.2, (3.3, 2.3)  # inches; no wider, so that a phone can show it
LONGEST = 60  # characters of a legend
INK = "#010203"  # becomes the page's text colour
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.5,
    "text.parse_math": False,  # a '$' in a label is a dollar
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@contextmanager
def _drawing(width: float, height: float, name: str) -> Iterator[tuple[Any, Any, list[str]]]:
    """A figure and its axes; the list gets the SVG, with the name for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    out: list[str] = []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(), out
        buffer = io.StringIO()
        with warnings.catch_warnings():  # the browser's fonts draw the text, not matplotlib's
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(buffer, format="svg", transparent=True, metadata=METADATA)
    svg = buffer.getvalue().split("?>", 1)[1].split(">", 1)[1].replace(INK, "currentColor")
    label = name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    out.append(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def look(i: int) -> tuple[str, str, str]:
    """Colour, pattern and marker of the i-th series: 64 of them differ."""
    turn = (i + i // len(COLOURS)) % len(COLOURS)
    return COLOURS[i % len(COLOURS)], PATTERNS[turn], MARKERS[turn]


def _columns(names: Sequence[str]) -> int:
    """Of a legend: long names stand one below the other."""
    longest = max(map(len, names))
    return 3 if longest < 15 else 2 if longest < 26 else 1


def _above(names: Sequence[str]) -> float:
    """Height of a chart in inches beside its lines: axis and legend."""
    return 0.5 + 0.2 * -(-(len(names) + 1) // _columns(["chance", *names]))


def _legend(figure: Any) -> None:
    """Above the axes, without the beginnings of names that are too long."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    columns = _columns(names)
    shown = [name if len(name) <= LONGEST else "…" + name[1 - LONGEST :] for name in names]
    figure.legend(handles, shown, ncols=columns, loc="outside upper left", frameon=False)


def bars(
    lines: Sequence[TableLine], names: Sequence[str], title: str, by_group: bool = False
) -> str:
    """Horizontal bars with intervals, one block a line, and a dotted tick at chance, in percent."""
    height = _above(names) + len(lines) * (0.16 * len(names) + 0.16)
    with _drawing(WIDE, height, title) as (figure, axes, out):
        for i, name in enumerate(names):
            _bar_series(axes, lines, name, i, 0.8 / max(1, len(names)))
        for y, line in enumerate(lines):
            label = "chance" if y == 0 else "_again"  # a label that starts with _ is left out
            axes.vlines(
                100 * (line.chance or 0), y - 0.42, y + 0.42, INK, ":", linewidth=1.3, label=label
            )
        labels = [
            group_label(line.group) if by_group else f"{line.task}, {line.metric}" for line in lines
        ]
        axes.set_yticks(range(len(lines)), labels)
        axes.set_ylim(len(lines) - 0.4, -0.6)
        axes.set_xlim(0, 102)
        axes.set_xlabel("%")
        _legend(figure)
    return out[0]


def _bar_series(axes: Any, lines: Sequence[TableLine], name: str, i: int, width: float) -> None:
    at, values, low, high = [], [], [], []
    for y, line in enumerate(lines):
        row = line.cells[name]
        if row is None or row.value is None:
            continue
        bounds = [row.value if bound is None else bound for bound in (row.low, row.high)]
        at.append(y - 0.4 + (i + 0.5) * width)
        values.append(100 * row.value)
        low.append(max(0.0, 100 * (row.value - bounds[0])))
        high.append(max(0.0, 100 * (bounds[1] - row.value)))
    colour, pattern, _ = look(i)
    axes.barh(
        at, values, width * 0.92, color=colour, hatch=pattern, edgecolor="white", lw=0, label=name
    )
    axes.errorbar(values, at, xerr=[low, high], fmt="none", ecolor=INK, lw=1, capsize=2)


def histogram(edges: Sequence[float], counts: Sequence[int], axis: str, title: str) -> str:
    """How many fall between each edge and the next."""
    with _drawing(WIDE, 2.4, title) as (_, axes, out):
        axes.stairs(counts, edges, fill=True, color=look(0)[0])
        axes.set_xlabel(axis)
        axes.set_ylabel("pairs")
        axes.margins(x=0.01)
    return out[0]


def error_curves(curves: Sequence[Curve], title: str) -> str:
    """By timestep: the mean error of right and of wrong pairs, of one model on one task."""
    with _drawing(*SMALL, title) as (_, axes, out):
        for i, curve in enumerate(curves):
            colour, _, marker = look(i)
            of = f" ({curve.score})" if len(curves) > 1 else ""
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 3, "lw": 1.2}
            axes.plot(curve.timesteps, curve.right, "-", label=f"right{of}", **style)
            axes.plot(
                curve.timesteps,
                curve.wrong,
                "--",
                label=f"wrong{of}",
                markerfacecolor="none",
                **style,
            )
        axes.set_xlabel("timestep")
        axes.set_ylabel("error")
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=7)
    return out[0]


def excess_curves(curves: Sequence[Curve], title: str) -> str:
    """By timestep: how much larger the conditional error of wrong pairs is, in percent."""
    with _drawing(*SMALL, title) as (_, axes, out):
        for i, curve in enumerate(curves):
            pairs = zip(curve.right, curve.wrong, strict=True)
            excess = [100 * (wrong / right - 1) if right else 0.0 for right, wrong in pairs]
            colour, _, marker = look(i)
            axes.plot(
                *(curve.timesteps, excess),
                color=colour,
                marker=marker,
                ms=3,
                lw=1.2,
                label=curve.model,
            )
        axes.axhline(0, color=INK, lw=0.8, ls=":")
        axes.set_xlabel("timestep")
        axes.set_ylabel("wrong against right, %")
        axes.set_title(title, fontsize=9)
        if len(curves) > 1:
            axes.legend(frameon=False, fontsize=7)
    return out[0]


def count_curves(counts: Sequence[Count], chance: float | None, title: str) -> str:
    """A metric by the number of timesteps, with intervals; one line a model and kind of score."""
    series: dict[tuple[str, str], list[Count]] = {}
    for count in counts:
        series.setdefault((count.model, count.score), []).append(count)
    several = len({count.model for count in counts}) > 1
    with _drawing(*SMALL, title) as (_, axes, out):
        for i, ((model, score), found) in enumerate(series.items()):
            steps = [count.timesteps for count in found]
            colour, _, marker = look(i)
            name = f"{model} {score}" if several else score
            values = [100 * count.value for count in found]
            axes.plot(steps, values, color=colour, marker=marker, ms=3.5, lw=1.2, label=name)
            low, high = [100 * c.low for c in found], [100 * c.high for c in found]
            axes.fill_between(steps, low, high, color=colour, alpha=0.4 / (1 + len(series)), lw=0)
        if chance is not None:
            axes.axhline(100 * chance, color=INK, lw=0.9, ls=":", label="chance")
        axes.set_xscale("log")
        ticks = sorted({count.timesteps for count in counts})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set_xlabel("timesteps")
        axes.set_ylabel("%")
        axes.set_title(title, fontsize=9)
        axes.legend(frameon=False, fontsize=7)
    return out[0]


def setting_points(
    points: Sequence[tuple[Any, str, float, bool]], base: float | None, axis: str, title: str
) -> str:
    """Accuracy (share) by an option's value, a line a series: (value, series, accuracy, whole); hollow
    marks are of trainings that were stopped early. `base` is a dotted line."""
    values = list(dict.fromkeys(point[0] for point in points))
    numeric = all(isinstance(v, int | float) for v in values)
    if numeric:
        values.sort()
    place = {v: v if numeric else i for i, v in enumerate(values)}
    with _drawing(*SMALL, title) as (_, axes, out):
        for i, name in enumerate(dict.fromkeys(point[1] for point in points)):
            found = sorted((place[v], a, whole) for v, s, a, whole in points if s == name)
            colour, _, marker = look(i)
            x, y = [p[0] for p in found], [100 * p[1] for p in found]
            axes.plot(x, y, color=colour, lw=1.2 if numeric else 0, label=name)
            filled = [colour if whole else "none" for *_, whole in found]
            axes.scatter(x, y, s=18, marker=marker, edgecolors=colour, c=filled, zorder=3)
        if base is not None:
            axes.axhline(100 * base, color=INK, lw=0.9, ls=":", label="before training")
        if not numeric:
            axes.set_xticks(range(len(values)), [str(v) for v in values], rotation=30, ha="right")
        elif values[0] > 0 and values[-1] / values[0] >= 4:
            axes.set_xscale("log")
            axes.set_xticks(values, [f"{v:g}" for v in values])
            axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylabel("%")
        axes.set_title(title, fontsize=9)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False, fontsize=6)
    return out[0]


def effects(lines: Sequence[TableLine], names: Sequence[str], title: str) -> str:
    """Effect sizes with intervals around 0, one line a pair of groups."""
    height = _above(names) + len(lines) * (0.14 * len(names) + 0.12)
    with _drawing(WIDE, height, title) as (figure, axes, out):
        for i, name in enumerate(names):
            rows: list[tuple[int, ResultRow]] = [
                (y, row) for y, line in enumerate(lines) if (row := line.cells[name]) is not None
            ]
            known = [(y, row, row.value) for y, row in rows if row.value is not None]
            values = [value for _, _, value in known]
            left = [0.0 if row.low is None else value - row.low for _, row, value in known]
            right = [0.0 if row.high is None else row.high - value for _, row, value in known]
            place = [y + 0.6 * ((i + 0.5) / len(names) - 0.5) for y, _, _ in known]
            colour, _, marker = look(i)
            errors = [[max(0.0, e) for e in left], [max(0.0, e) for e in right]]
            axes.errorbar(
                values,
                place,
                xerr=errors,
                ms=4,
                lw=1.2,
                capsize=2,
                label=name,
                color=colour,
                fmt=marker,
            )
        axes.axvline(0, color=INK, lw=0.9, ls=":")
        axes.set_yticks(range(len(lines)), [group_label(line.group) for line in lines])
        axes.invert_yaxis()
        axes.set_xlabel("effect size; above 0: the first is nearer to pleasant")
        _legend(figure)
    return out[0]


def share_bars(lines: Sequence[TableLine], names: Sequence[str], title: str) -> str:
    """Stacked shares of the variance, one bar a model and kind of score."""
    with _drawing(WIDE, 0.9 + 0.35 * len(names), title) as (figure, axes, out):
        left = [0.0] * len(names)
        for i, line in enumerate(lines):
            found = [line.cells[name] for name in names]
            values = [100 * (row.value or 0.0) if row else 0.0 for row in found]
            colour, pattern, _ = look(i)
            axes.barh(
                range(len(names)), values, 0.7, left=left, edgecolor="white", lw=0, color=colour,
                hatch=pattern, label=line.metric.removeprefix("var. "),
            )  # fmt: skip
            left = [a + b for a, b in zip(left, values, strict=True)]
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 102)
        axes.set_xlabel("% of the variance")
        _legend(figure)
    return out[0]


def training_curves(logs: dict[str, list[dict[str, float]]]) -> list[str]:
    """By update, every model in one chart: loss, E+, the contrast, what validations measured."""
    known = dict.fromkeys(key for lines in logs.values() for line in lines for key in line)
    labels = {"right": "error of right pairs (E+)", "contrast": "contrast", "loss": "loss"}
    labels |= {"reconstruction": "reconstruction of held-out images"}
    names = [n for n in known if n in labels or n.startswith("accuracy/")]
    drawn = []
    for name in names:
        title = labels.get(name, name.removeprefix("accuracy/"))
        with _drawing(*SMALL, f"Training: {title}") as (_, axes, out):
            for i, (model, lines) in enumerate(logs.items()):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    colour, _, marker = look(i)
                    few = len(points) < 40
                    style = {"color": colour, "marker": marker if few else None, "markersize": 3}
                    label = model[-LONGEST:]
                    axes.plot(*zip(*points, strict=True), lw=1.2, label=label, **style)
            axes.set_xlabel("update")
            axes.ticklabel_format(axis="y", useOffset=False)
            axes.set_title(title, fontsize=9)
            axes.legend(frameon=False, fontsize=6)
        drawn.append(out[0])
    return drawn
