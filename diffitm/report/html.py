"""report.html: one self-contained file with the table, a bar chart, failures and provenance."""

from __future__ import annotations

import html
import io
import json
from typing import Any

from diffitm import storage
from diffitm.report.table import Line, cell, columns, lines, p_text, percent
from diffitm.results import Evaluation

# Okabe and Ito's colours: told apart in print and by the colour-blind.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
SHOWN_FAILURES = 200
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
tr.all td { font-weight: 600; } tr.group td:first-child { padding-left: 1.8rem; }
figure { margin: 1rem 0; background: #fff; padding: .5rem; } figure svg { max-width: 100%; height: auto; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; } small { opacity: .75; }
"""


def write_report(evaluation: Evaluation, provenance: dict[str, Any], out: str) -> str:
    """Write OUT/report.html and return its path."""
    path = storage.join(out, "report.html")
    table = lines(evaluation)
    names = [name for name, _, _ in columns(evaluation)]
    parts = [
        "<h1>Image-text matching</h1>",
        f"<p>{_setting(evaluation)}</p>",
        f"<figure>{_chart([line for line in table if line.group == 'all'], names)}</figure>",
        _table(table, names),
        "<p><small>= : one image against several texts, where normalising changes no decision. "
        "Ties count their expected value.</small></p>",
        _comparisons(evaluation),
        _failures(evaluation),
        f"<h2>Provenance</h2><pre>{html.escape(json.dumps(provenance, indent=2))}</pre>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>diffitm report</title><style>{STYLE}</style></head><body>"
        + "".join(parts)
        + "</body></html>"
    )
    storage.write_text(path, page)
    return path


def _setting(evaluation: Evaluation) -> str:
    models = dict.fromkeys(
        f"{row.model} ({row.protocol}, {row.timesteps} timesteps)" if row.timesteps else row.model
        for row in evaluation.rows
    )
    text = "Accuracy in %, with 95% intervals. " + "; ".join(models) + "."
    if any(row.model == "shapes" for row in evaluation.rows):
        text += " The model 'shapes' is the small embedded one, on drawn scenes."
    return html.escape(text)


def _table(table: list[Line], names: list[str]) -> str:
    head = "".join(f"<th>{html.escape(n)}</th>" for n in ("task", "metric", "n", *names, "chance"))
    body = []
    for line in table:
        label = line.task if line.group == "all" else line.group.replace("=", " = ")
        cells = [
            label,
            line.metric,
            str(line.n),
            *(cell(line.cells[name], line.n) for name in names),
        ]
        cells.append(percent(line.chance))
        columns_ = "".join(f"<td>{html.escape(text)}</td>" for text in cells)
        body.append(f'<tr class="{"all" if line.group == "all" else "group"}">{columns_}</tr>')
    inner = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def _comparisons(evaluation: Evaluation) -> str:
    if not evaluation.comparisons:
        return ""
    items = [
        f"{c.model}, {c.task} {c.metric}: {100 * c.difference:+.1f} points ({p_text(c.p)}, n = {c.n})"
        for c in evaluation.comparisons
    ]
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    return f"<h2>Normalised against naive, paired</h2><ul>{listed}</ul>"


def _failures(evaluation: Evaluation) -> str:
    if not evaluation.failures:
        return "<h2>Failures</h2><p>None.</p>"
    items = [
        f"{f['model']}, {f['task']}, {f['example']}: {f['failure']}"
        for f in evaluation.failures[:SHOWN_FAILURES]
    ]
    listed = "".join(f"<li>{html.escape(item)}</li>" for item in items)
    count = len(evaluation.failures)
    return (
        f"<h2>Failures</h2><p>{count} examples, all of them in failures.json.</p><ul>{listed}</ul>"
    )


def _chart(table: list[Line], names: list[str]) -> str:
    """Grouped bars with intervals, and a tick at chance, as inline SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.5 * len(table)), 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        at, values, low, high = [], [], [], []
        for x, line in enumerate(table):
            row = line.cells[name]
            if row is None or row.value is None or row.low is None or row.high is None:
                continue
            at.append(x + (i - (len(names) - 1) / 2) * width)
            values.append(100 * row.value)
            low.append(max(0.0, 100 * (row.value - row.low)))
            high.append(max(0.0, 100 * (row.high - row.value)))
        axes.bar(at, values, width * 0.92, color=COLOURS[i % len(COLOURS)], label=name,
                 yerr=[low, high], capsize=2, ecolor="#333", error_kw={"lw": 1})  # fmt: skip
    for x, line in enumerate(table):
        label = "chance" if x == 0 else "_again"  # matplotlib leaves out labels that start with _
        level = 100 * line.chance
        axes.hlines(level, x - 0.42, x + 0.42, colors="#000", linestyles=":", lw=1.2, label=label)
    axes.set_xticks(
        range(len(table)), [f"{line.task}\n{line.metric}" for line in table], fontsize=8
    )
    axes.set_ylim(0, 105)
    axes.set_ylabel("accuracy, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    return buffer.getvalue().split("?>", 1)[1].split(">", 1)[1]
