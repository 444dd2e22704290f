"""report.html: one self-contained file with tables that sort, charts, examples and failures."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from diffitm.core import images, storage
from diffitm.evaluation.diagnostics import Denoising
from diffitm.evaluation.evaluate import Comparison, Evaluation
from diffitm.metrics.figures import SECONDARY
from diffitm.report import charts
from diffitm.report.published_figures import LABEL
from diffitm.report.table import NOTE, Table, TableLine
from diffitm.report.terminal import comparison_texts

SHOWN_FAILURES = 200
MOST_BARS = 30  # groups in one chart; a table holds all
THUMBNAIL, SAMPLE, WIDEST = 160, 256, 1024  # pixels
TABLES = ("tests", "speed", "denoising", "reconstruction")
Cells = dict[str, Any]
Samples = dict[str, dict[str, list[bytes]]]  # model -> prompt -> PNGs, one a seed


def write_report(
    evaluation: Evaluation,
    table: Table,
    provenance: dict[str, Any],
    root: str,
    out: str,
    samples: Samples | None = None,
    logs: dict[str, list[dict[str, float]]] | None = None,
    pictures: dict[str, bytes] | None = None,
) -> str:
    """Write OUT/report.html and return its path. `root` is the data root of the images, `samples` are
    generated images, `logs` the lines of a training's log and `pictures` PNGs of reconstructions, by
    model."""
    overview = [
        line
        for line in table.lines
        if line.group == "all" and line.is_share and not line.metric.startswith(SECONDARY)
    ]
    parts: dict[str, Any] = {
        "title": "Image-text matching",
        "setting": _setting(evaluation),
        "chart": charts.bars(overview, table.columns, "Accuracy by task") if overview else "",
        "main": _sortable(table, [line for line in table.lines if _is_main(line)]),
        "note": NOTE,
        "published": f"{LABEL}: Krojer et al. 2023, table 2." if table.published else "",
        "tests": _tests(evaluation.comparisons),
        "groups": _groups(table),
        "bias": _bias(table),
        "curves": _curves(evaluation),
        "counts": _counts(evaluation, table),
        "denoising": _denoising(evaluation.denoising),
        "samples": _sample_grid(samples or {}),
        "training": charts.training_curves(logs) if logs else [],
        "reconstruction": _reconstruction(logs or {}),
        "pictures": [(n, _embedded(data, WIDEST)) for n, data in (pictures or {}).items()],
        "variance": _variance(table),
        "speed": _speed(evaluation),
        "failures": evaluation.failures,
        "most_failures": SHOWN_FAILURES,
        "provenance": json.dumps(provenance, indent=2),
    } | _cases(evaluation, root)
    parts["sections"] = _sections(parts)
    return write_page("template.html.jinja", parts, out)


def write_page(template: str, parts: dict[str, Any], out: str) -> str:
    """Render OUT/report.html and return its path."""
    environment = Environment(
        loader=PackageLoader("diffitm", "report"), autoescape=True, undefined=StrictUndefined
    )
    path = storage.join(out, "report.html")
    storage.write_text(path, environment.get_template(template).render(parts))
    return path


def _sections(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Links to the sections that have something to show."""
    known = {
        "tests": ("tests", "Paired tests"),
        "groups": ("groups", "By group"),
        "bias": ("bias", "Social bias"),
        "curves": ("timesteps", "Errors by timestep"),
        "counts": ("numbers", "Number of timesteps"),
        "denoising": ("denoising", "Denoising error"),
        "samples": ("images", "Generated images"),
        "training": ("training", "Training"),
        "reconstruction": ("reconstruction", "Reconstruction"),
        "variance": ("variance", "Variance"),
        "speed": ("speed", "Cost"),
        "cases": ("examples", "Examples"),
    }
    shown = [
        place
        for key, place in known.items()
        if (parts[key]["rows"] if key in TABLES else parts[key])
    ]
    return [
        ("comparison", "Comparison"),
        *shown,
        ("failures", "Failures"),
        ("provenance", "Provenance"),
    ]


def _setting(evaluation: Evaluation) -> str:
    models = dict.fromkeys(
        f"{row.model} ({row.protocol}, {row.timesteps} timesteps)" if row.timesteps else row.model
        for row in evaluation.rows
    )
    text = "Accuracy in %, with 95% intervals. " + "; ".join(models) + "."
    if any(row.model.split(",")[0] == "shapes" for row in evaluation.rows):
        text += " The model 'shapes' is the small embedded one, on drawn scenes."
    return text


def _is_main(line: TableLine) -> bool:
    """Whole tasks, and the pairs of groups that are all a bias task has."""
    return line.group == "all" or not line.is_share


def _sortable(table: Table, lines: Sequence[TableLine]) -> Cells:
    """A table for the template: every cell with its text and the value that it sorts by."""
    rows = []
    for line in lines:
        found = [line.cells[name] for name in table.columns]
        values: list[Any] = [row.value if row else None for row in found]
        texts = table.texts(line)
        known = re.match(r"[\d.]+", texts[-1]) if table.published else None
        values = [None, None, line.n, *values, line.chance, float(known[0]) if known else None]
        cells = [
            {"text": text, "value": text if i < 2 else value}
            for i, (text, value) in enumerate(zip(texts, values[: len(texts)], strict=True))
        ]
        rows.append({"kind": "all" if line.group == "all" else "group", "cells": cells})
    return {"head": table.head(), "texts": 2, "rows": rows}


def _tests(comparisons: Sequence[Comparison]) -> Cells:
    rows = []
    for test in comparisons:
        texts = comparison_texts(test)
        values = [*texts[:4], test.difference, test.p, test.n]
        cells = [{"text": t, "value": v} for t, v in zip(texts, values, strict=True)]
        rows.append({"kind": "group", "cells": cells})
    head = ["task", "metric", "first", "second", "difference", "p", "n"]
    return {"head": head, "texts": 4, "rows": rows}


def _denoising(lines: Sequence[Denoising]) -> Cells:
    rows = []
    for line in lines:
        texts: list[str] = [line.task, line.model]
        values: list[Any] = [line.task, line.model]
        for value, change in ((line.right, line.change), (line.empty, line.empty_change)):
            texts.append("" if value is None else f"{value:.4g}")
            texts.append("{:+.3g} [{:+.3g}, {:+.3g}]".format(*change) if change else "")
            values += [value, change[0] if change else None]
        pairs = zip([*texts, str(line.n)], [*values, line.n], strict=True)
        rows.append({"kind": "group", "cells": [{"text": t, "value": v} for t, v in pairs]})
    head = ["task", "model", "right pairs", "change", "empty text", "change", "n"]
    return {"head": head, "texts": 2, "rows": rows}


def _reconstruction(logs: dict[str, list[dict[str, float]]]) -> Cells:
    """What diva.py measured of held-out images: at first, at the end, and without CLIP's tokens."""
    rows = []
    for model, lines in logs.items():
        errors = [line["reconstruction"] for line in lines if "reconstruction" in line]
        blind = [
            v for line in lines if (v := line.get("reconstruction_without_tokens")) is not None
        ]
        if errors:
            values = [model, errors[0], errors[-1], blind[0] if blind else None]
            texts = [model, *("" if v is None else f"{v:.4f}" for v in values[1:])]
            pairs = zip(texts, values, strict=True)
            rows.append({"kind": "group", "cells": [{"text": t, "value": v} for t, v in pairs]})
    head = ["model", "before training", "after training", "without tokens"]
    return {"head": head, "texts": 1, "rows": rows}


def _sample_grid(samples: Samples) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Prompt -> model -> images as data URIs."""
    prompts = dict.fromkeys(prompt for found in samples.values() for prompt in found)
    return [
        (
            prompt,
            [
                (model, [_embedded(data) for data in found[prompt]])
                for model, found in samples.items()
                if prompt in found
            ],
        )
        for prompt in prompts
    ]


def _embedded(data: bytes, most: int = SAMPLE) -> str:
    """A PNG as a data URI, no larger than it is shown."""
    image = Image.open(io.BytesIO(data))
    if max(image.size) <= most:
        return "data:image/png;base64," + base64.b64encode(data).decode()
    image.thumbnail((most, most))
    return _jpeg(image)


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _groups(table: Table) -> list[tuple[str, str, Cells]]:
    """A chart and a table for every kind of breakdown, by the task's first metric."""
    lines = [line for line in table.lines if line.group != "all" and line.is_share]
    found = []
    kinds: dict[tuple[str, str], list[TableLine]] = {}
    for line in lines:
        kinds.setdefault((line.task, line.group.partition("=")[0]), []).append(line)
    for (task, key), members in kinds.items():
        first = [line for line in members if line.metric == members[0].metric]
        largest = sorted(first, key=lambda line: -line.n)[:MOST_BARS]
        title = f"{task} by {key}"
        if len(first) > MOST_BARS:
            title += f" (the chart: the {MOST_BARS} largest of {len(first)})"
        svg = charts.bars(largest, table.columns, f"{title}, {members[0].metric}", by_group=True)
        found.append((title, svg, _sortable(table, members)))
    return found


def _bias(table: Table) -> str:
    lines = [line for line in table.lines if line.unit == "effect size"]
    shown = [n for n in table.columns if any(line.cells[n] is not None for line in lines)]
    return charts.effects(lines, shown, "Effect sizes of social bias") if lines else ""


def _variance(table: Table) -> str:
    lines = [line for line in table.lines if line.metric.startswith("var. ")]
    shown = [n for n in table.columns if any((r := line.cells[n]) and r.value for line in lines)]
    return charts.share_bars(lines, shown, "Shares of the score's variance") if shown else ""


def _curves(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """For every task: right and wrong of the first model, then the excess of all models."""
    found = []
    for task in dict.fromkeys(curve.task for curve in evaluation.curves):
        curves = [curve for curve in evaluation.curves if curve.task == task]
        first = [curve for curve in curves if curve.model == curves[0].model]
        drawn = [charts.error_curves([curve], f"{curve.model}, {curve.score}") for curve in first]
        conditional = [curve for curve in curves if curve.score == "conditional"]
        drawn.append(charts.excess_curves(conditional, "wrong against right, conditional"))
        found.append((task, drawn))
    return found


def _counts(evaluation: Evaluation, table: Table) -> list[str]:
    chance = {(line.task, line.metric): line.chance for line in table.lines if line.group == "all"}
    found = []
    for task, metric in dict.fromkeys((c.task, c.metric) for c in evaluation.counts):
        if metric.startswith(SECONDARY):
            continue
        counts = [c for c in evaluation.counts if (c.task, c.metric) == (task, metric)]
        if len({c.timesteps for c in counts}) > 1:
            found.append(
                charts.count_curves(counts, chance.get((task, metric)), f"{task}, {metric}")
            )
    return found


def _speed(evaluation: Evaluation) -> Cells:
    rows = []
    for speed in evaluation.speeds:
        values = [speed.model, speed.pairs, speed.forwards, speed.seconds, speed.seconds_per_pair]
        texts = [
            speed.model,
            f"{speed.pairs:,}",
            f"{speed.forwards:,}",
            f"{speed.seconds:.1f}",
            f"{speed.seconds_per_pair:.3g}",
        ]
        cells = [{"text": t, "value": v} for t, v in zip(texts, values, strict=True)]
        rows.append({"kind": "group", "cells": cells})
    head = ["model", "pairs", "forwards of the model", "seconds of actors", "seconds a pair"]
    return {"head": head, "texts": 1, "rows": rows}


def _cases(evaluation: Evaluation, root: str) -> dict[str, Any]:
    """The first model's examples by task and kind, with thumbnails."""
    if not evaluation.cases:
        return {"cases": [], "case_model": ""}
    model = evaluation.cases[0].model
    picture = functools.cache(functools.partial(thumbnail, root))
    found: dict[str, dict[str, list[Cells]]] = {}
    for case in evaluation.cases:
        if case.model != model:
            continue
        pairs = [
            {
                "text": p.text,
                "right": p.right,
                "score": f"{p.score:.4g}",
                "thumbnail": picture(p.image),
            }
            for p in case.pairs
        ]
        shown = {"example": case.example, "margin": f"{case.margin:+.4g}", "pairs": pairs}
        found.setdefault(case.task, {}).setdefault(case.kind, []).append(shown)
    return {"cases": [(t, list(k.items())) for t, k in found.items()], "case_model": model}


def thumbnail(root: str, reference: str) -> str | None:
    """The image as a data URI, None if it cannot be read (any more)."""
    try:
        image, _ = images.load(root, reference)
    except Exception:  # whatever a decoder raises: the report shows a blank
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return _jpeg(image)
