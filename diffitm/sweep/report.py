"""The report of a sweep: accuracy by setting as charts, the table, the best setting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from diffitm.evaluation.diagnostics import Count
from diffitm.report import charts
from diffitm.report.html import write_page
from diffitm.sweep.result import TrialResult, cells
from diffitm.sweep.space import Axis, describe

MEAN = "mean of the tasks"
PROVENANCE = ("provenance", "Provenance")
NOTES = {
    "training": "Hollow marks: stopped early. The accuracy is of the validation that also chose.",
    "scores": "Measured on the examples that chose neither weights nor settings; bands are 95% "
    "intervals. Uniform: evenly spread over the range, all of the same weight. Learned: the most "
    "useful timesteps, with weights fitted on the other examples.",
}


def write_report(
    kind: str,
    rows: Sequence[TrialResult],
    axes: Sequence[Axis],
    told: str,
    best: str,
    provenance: dict[str, Any],
    out: str,
) -> str:
    """Write OUT/report.html and return its path. `told` says what the accuracies are of, `best` is the
    text of best.yaml."""
    scores = any(row.timesteps is not None for row in rows)
    failed = [f"{describe(row.setting, axes)}: {row.failure}" for row in rows if row.failure]
    sections = [("plot", "Plot"), ("settings", "Settings"), ("best", "Best")]
    parts = {
        "title": f"Sweep: {kind}",
        "setting": f"{len(rows)} settings of {'; '.join(map(str, axes)) or 'no option'}",
        "sections": [*sections, *([("failures", "Failures")] if failed else []), PROVENANCE],
        "charts": charts.grid(_of_scores(rows, axes) if scores else _of_trainings(rows, axes)),
        "note": NOTES["scores" if scores else "training"],
        "settings": _settings(rows, axes),
        "told": told,
        "best": best,
        "failures": failed,
        "provenance": json.dumps(provenance, indent=2),
    }
    return write_page("sweep.html.jinja", parts, out)


def _settings(rows: Sequence[TrialResult], axes: Sequence[Axis]) -> dict[str, Any]:
    lines = [cells(row, axes) for row in rows]
    head = list(dict.fromkeys(name for line in lines for name in line))
    shown = [{"key": "", "cells": [_cell(line.get(name, "")) for name in head]} for line in lines]
    return {"head": head, "texts": 0, "rows": shown}


def _cell(text: str) -> dict[str, Any]:
    try:
        return {"text": text, "bounds": "", "value": float(text)}
    except ValueError:
        return {"text": text, "bounds": "", "value": text or None}


def _of_trainings(rows: Sequence[TrialResult], axes: Sequence[Axis]) -> list[charts.Panel]:
    """A chart for each option, series by the others; then validations by update."""
    good = [row for row in rows if row.accuracy is not None]
    base = next((row.base for row in good if row.base is not None), None)
    drawn = []
    for axis in axes:
        others = [other for other in axes if other is not axis]
        points = [
            (
                row.setting[axis.name],
                describe(row.setting, others) if others else "accuracy",
                row.accuracy,
                row.state == "done",
            )
            for row in good
            if row.accuracy is not None
        ]
        name = axis.name.rstrip("_")
        drawn.append(charts.setting_points(points, base, name, f"Accuracy by {name}"))
    logs = {
        describe(row.setting, axes): [
            {"step": step, "accuracy/accuracy by update": 100 * value}
            for step, value in row.curve or []
        ]
        for row in good
    }
    return drawn + charts.training_curves(logs)


def _of_scores(rows: Sequence[TrialResult], axes: Sequence[Axis]) -> list[charts.Panel]:
    """Accuracy by the number of timesteps: of the mean, then of every task."""
    series = [axis for axis in axes if axis.name != "number"]
    good = [row for row in rows if row.tasks is not None]
    names = [MEAN, *dict.fromkeys(task for row in good for task in row.tasks or {})]
    drawn = []
    for task in names:
        counts = [_count(task, row, series) for row in good]
        counts.sort(key=lambda count: (count.model, count.timesteps))
        drawn.append(charts.count_curves(counts, None, task))
    return drawn


def _count(task: str, row: TrialResult, series: Sequence[Axis]) -> Count:
    """A setting's accuracy on a task; of the mean there is no interval."""
    found = (row.tasks or {}).get(task)
    mean = row.measured or 0.0
    value, low, high = (found[k] for k in ("measured", "low", "high")) if found else (mean,) * 3
    steps = len(row.timesteps or ())
    n = int(found["n"]) if found else 0
    label = describe(row.setting, series) if series else "accuracy"
    return Count(label, task, "accuracy", "", steps, value, low, high, n)
