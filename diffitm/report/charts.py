"""Small charts of curves as inline SVG, for a grid: text, axes and series take the page's colours, and
the legend is the page's."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffitm.evaluation.diagnostics import Count, Curve
from diffitm.report.looks import NAIVE_SCORE, PALETTE, Key, Look, Looks

SIZE = (3.3, 2.2)  # inches: at a column's width its text is about 12 pixels high
INK = "#010203"  # becomes the page's text colour
SERIES = [f"#0102{0x10 + i:02x}" for i in range(len(PALETTE))]  # become those of the page
RIGHT, WRONG = Look(2), Look(5)  # as the examples' borders
MOST_MARKED = 40  # points of a curve with markers
STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.parse_math": False,  # a '$' in a label is a dollar
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}
# Names of groups, fonts (the page has its own), turns by nothing, frames without a colour.
NEEDLESS = (
    r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>",
    r'(?<=<g) id="[^"]*"',
    r' xmlns(:xlink)?="[^"]*"| version="1.1"| transform="rotate\(-0 [^"]*"',
    r"font-family: [^;\"]*; |font-size: 9px; |(?<=; )fill: currentColor(?=\" [xt])",
    r'<g>\s*<path d="[^"]*" style="fill: none"/>\s*</g>',
)
LONG_NUMBER = re.compile(r"-?\d+\.\d{3,}")  # a coordinate needs no more than two digits
# All markers of a line, whose style is one.
MARKERS = re.compile(
    r'<g([^>]*)>((?:<use [^>]*? style="([^"]*)"/>)(?:<use [^>]*? style="\3"/>)*)</g>'
)
METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))
Limits = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """A chart and the entries of its legend."""

    svg: str
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Grid:
    """Charts side by side; `keys` is their legend where they have the same one."""

    keys: tuple[Key, ...]
    panels: list[Panel]


def grid(panels: Sequence[Panel]) -> Grid:
    """With one legend if that of every chart is the same, or a part of the longest."""
    longest = max((panel.keys for panel in panels), key=len, default=())
    if all(set(panel.keys) <= set(longest) for panel in panels):
        return Grid(longest, [Panel(panel.svg, ()) for panel in panels])
    return Grid((), list(panels))


@contextmanager
def _drawing(name: str, title: str) -> Iterator[tuple[Any, list[str]]]:
    """Axes of one size; the list gets the SVG, with the name for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    out: list[str] = []
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        yield axes, out
        axes.set_title(_short(title), fontsize=9, loc="left", fontweight="bold")
        buffer = io.StringIO()
        with warnings.catch_warnings():  # the browser's fonts draw the text, not matplotlib's
            warnings.filterwarnings("ignore", message="Glyph")
            figure.savefig(buffer, format="svg", transparent=True, metadata=METADATA)
    label = name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    out.append(_light(buffer.getvalue()).replace("<svg ", f'<svg role="img" aria-label="{label}" '))


def _light(svg: str) -> str:
    """Without what a page does not need, and in its colours: about a third of the size."""
    svg = svg.split("?>", 1)[1].split(">", 1)[1]
    for needless in NEEDLESS:
        svg = re.sub(needless, "", svg, flags=re.DOTALL)
    svg = re.sub(r"<[^>]*>", lambda tag: LONG_NUMBER.sub(_rounded, tag[0]), svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg).strip()
    svg = svg.replace(">\n<", "><")
    svg = MARKERS.sub(_styled_once, svg)
    svg = svg.replace("xlink:href", "href")
    for i, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--c{i})")
    return svg.replace(INK, "currentColor")


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.2f}"


def _styled_once(markers: re.Match[str]) -> str:
    attributes, uses, style = markers.groups()
    shared = f' style="{style}"'
    return f"<g{attributes}{shared}>{uses.replace(shared, '')}</g>"


def _short(title: str, most: int = 38) -> str:
    return title if len(title) <= most else "…" + title[1 - most :]


def _line(axes: Any, x: Sequence[float], y: Sequence[float], look: Look, dashed: bool) -> None:
    colour = SERIES[look.colour]
    axes.plot(
        x, y, "--" if dashed else "-", color=colour, lw=1.3, ms=3.2,
        marker=look.marker if len(x) <= MOST_MARKED else None,
        markerfacecolor="none" if dashed else colour, markeredgecolor=colour,
    )  # fmt: skip


def error_curves(curve: Curve, ends: Limits) -> Panel:
    """By timestep: the mean error of right and of wrong pairs, of one model on one task."""
    name = f"{curve.task}: {curve.score} error by timestep of {curve.model}"
    with _drawing(name, curve.task) as (axes, out):
        _line(axes, curve.timesteps, curve.right, RIGHT, False)
        _line(axes, curve.timesteps, curve.wrong, WRONG, True)
        axes.set_xlabel("timestep")
        axes.set_ylabel("error")
        axes.set_ylim(ends)
    keys = (Key("right pairs", RIGHT, "line"), Key("wrong pairs", Look(5, True), "line"))
    return Panel(out[0], keys)


def excess(curve: Curve) -> list[float]:
    """By how many percent the error of wrong pairs is larger, at each timestep."""
    pairs = zip(curve.right, curve.wrong, strict=True)
    return [100 * (wrong / right - 1) if right else 0.0 for right, wrong in pairs]


def excess_curves(curves: Sequence[Curve], looks: Looks, ends: Limits) -> Panel:
    """By timestep: how much larger the conditional error of wrong pairs is, in percent."""
    task, keys = curves[0].task, []
    with _drawing(f"{task}: wrong against right pairs by timestep", task) as (axes, out):
        for curve in curves:
            look = Look(looks.of(curve.model, curve.score).place)
            _line(axes, curve.timesteps, excess(curve), look, False)
            keys.append(Key(curve.model, look, "line"))
        axes.axhline(0, color=INK, lw=0.8, ls=":")
        axes.set_xlabel("timestep")
        axes.set_ylabel("%")
        axes.set_ylim(ends)
    return Panel(out[0], tuple(keys))


def limits(values: Sequence[float]) -> Limits:
    """What holds all values and a little more, for the axes of a whole grid."""
    low, high = min(values), max(values)
    margin = 0.05 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def count_curves(counts: Sequence[Count], chance: float | None, title: str) -> Panel:
    """A metric by the number of timesteps, with intervals; one line a model and kind of score."""
    series: dict[tuple[str, str], list[Count]] = {}
    for count in counts:
        series.setdefault((count.model, count.score), []).append(count)
    models = list(dict.fromkeys(count.model for count in counts))
    keys = []
    with _drawing(title, title) as (axes, out):
        for (model, score), found in series.items():
            steps = [count.timesteps for count in found]
            look = Look(models.index(model), score == NAIVE_SCORE)
            _line(axes, steps, [100 * count.value for count in found], look, look.light)
            low, high = [100 * c.low for c in found], [100 * c.high for c in found]
            alpha = 0.4 / (1 + len(series))
            axes.fill_between(steps, low, high, color=SERIES[look.colour], alpha=alpha, lw=0)
            names = {NAIVE_SCORE: "naive"}
            keys.append(Key(f"{model} {names.get(score, score)}".strip(), look, "line"))
        if chance is not None:
            axes.axhline(100 * chance, color=INK, lw=0.9, ls=":")
            keys.append(Key("chance", Look(0), "chance"))
        axes.set_xscale("log")
        ticks = _apart(sorted({count.timesteps for count in counts}))
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_ylim(0, 102)
        axes.set_xlabel("timesteps")
        axes.set_ylabel("%")
    return Panel(out[0], tuple(keys))


def _apart(values: Sequence[float], ratio: float = 1.25) -> list[float]:
    """Those whose labels do not touch on a logarithmic axis; the last one always."""
    kept = [values[-1]]
    for value in reversed(values[:-1]):
        if kept[0] / value >= ratio:
            kept.insert(0, value)
    return kept


def setting_points(
    points: Sequence[tuple[Any, str, float, bool]], base: float | None, axis: str, title: str
) -> Panel:
    """Accuracy (share) by an option's value, a line a series: (value, series, accuracy, whole); hollow
    marks are of trainings that were stopped early. `base` is a dotted line."""
    values = list(dict.fromkeys(point[0] for point in points))
    numeric = all(isinstance(v, int | float) for v in values)
    if numeric:
        values.sort()
    place = {v: v if numeric else i for i, v in enumerate(values)}
    keys = []
    with _drawing(title, title) as (axes, out):
        for i, name in enumerate(dict.fromkeys(point[1] for point in points)):
            found = sorted((place[v], a, whole) for v, s, a, whole in points if s == name)
            look = Look(i)
            colour = SERIES[look.colour]
            x, y = [p[0] for p in found], [100 * p[1] for p in found]
            axes.plot(x, y, color=colour, lw=1.2 if numeric else 0)
            filled = [colour if whole else "none" for *_, whole in found]
            axes.scatter(x, y, s=18, marker=look.marker, edgecolors=colour, c=filled, zorder=3)
            keys.append(Key(name, look, "line"))
        if base is not None:
            axes.axhline(100 * base, color=INK, lw=0.9, ls=":")
            keys.append(Key("before training", Look(0), "chance"))
        if not numeric:
            names = [_short(str(v), 20) for v in values]
            turn = {"rotation": 30, "ha": "right"} if sum(map(len, names)) > 30 else {}
            axes.set_xticks(range(len(values)), names, **turn)
            axes.margins(x=0.2)
        elif values[0] > 0 and values[-1] / values[0] >= 4:
            axes.set_xscale("log")
            ticks = _apart(values)
            axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
            axes.minorticks_off()
        axes.set_xlabel(axis)
        axes.set_ylabel("%")
    return Panel(out[0], tuple(keys) if len(keys) > 1 else ())


def training_curves(logs: dict[str, list[dict[str, float]]]) -> list[Panel]:
    """By update, every model in one chart: loss, E+, the contrast, what validations measured."""
    known = dict.fromkeys(key for lines in logs.values() for line in lines for key in line)
    labels = {"right": "error of right pairs (E+)", "contrast": "contrast", "loss": "loss"}
    labels |= {"reconstruction": "reconstruction of held-out images"}
    drawn = []
    for name in (n for n in known if n in labels or n.startswith("accuracy/")):
        title, keys = labels.get(name, name.removeprefix("accuracy/")), []
        with _drawing(f"Training: {title}", title) as (axes, out):
            for i, (model, lines) in enumerate(logs.items()):
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    x, y = zip(*points, strict=True)
                    _line(axes, x, y, Look(i), False)
                    keys.append(Key(model, Look(i), "line"))
            axes.set_xlabel("update")
            axes.ticklabel_format(axis="y", useOffset=False)
        drawn.append(Panel(out[0], tuple(keys)))
    return drawn
