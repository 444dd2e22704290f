"""report.html: one self-contained file with tables that sort, charts, examples and failures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from diffitm.core import storage
from diffitm.evaluation.diagnostics import Denoising
from diffitm.evaluation.evaluate import Comparison, Evaluation
from diffitm.metrics.figures import SECONDARY
from diffitm.models.embedded import EMBEDDED
from diffitm.report import charts, wide_charts
from diffitm.report.gallery import QUALITIES, Gallery, Thumbnails
from diffitm.report.looks import NAIVE_SCORE, PALETTE, Looks
from diffitm.report.matrix import NOTE as MATRIX
from diffitm.report.matrix import Matrix, matrix_cells
from diffitm.report.means import NOTE as MEANS
from diffitm.report.means import heat, means_table
from diffitm.report.table import NOTE, RACES, Table, TableLine, columns, race_texts
from diffitm.report.terminal import comparison_texts

log = logging.getLogger("diffitm")
MOST_BYTES = 2_000_000  # of a page
SHOWN_FAILURES, SHOWN_TESTS = 200, 500
LONG_TITLE = 44  # characters of a column's title
MOST_BARS = 30  # groups in one chart; a table holds all
TABLES = ("races", "tests", "speed", "denoising", "reconstruction")
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
    matrix: Matrix | None = None,
) -> str:
    """Write OUT/report.html and return its path. `root` is the data root of the images, `samples` are
    generated images, `logs` the lines of a training's log and `pictures` PNGs of reconstructions, by
    model; `matrix` is that of pictures that models made."""
    overview = [
        line
        for line in table.lines
        if line.group == "all" and line.is_share and not line.metric.startswith(SECONDARY)
    ]
    looks = Looks(columns(evaluation))
    chart = wide_charts.bars(overview, looks, table.columns, "Accuracy by task")
    parts: dict[str, Any] = {
        "title": "Image-text matching",
        "setting": _setting(evaluation),
        "chart": chart if overview else None,
        "patterns": looks.patterns,
        "main": _sortable(table, [line for line in table.lines if _is_main(line)]),
        "note": " ".join([NOTE, *table.notes]),
        "matrix": matrix_cells(matrix) if matrix else None,
        "matrix_note": MATRIX,
        "means": _means(table),
        "means_note": MEANS,
        "races": _races(evaluation),
        "published": " ".join(dict.fromkeys(f"{p.about}." for p in table.published)),
        "tests": _tests(evaluation.comparisons[:SHOWN_TESTS]),
        "number_of_tests": len(evaluation.comparisons),
        "groups": _groups(table, looks),
        "bias": _bias(table, looks),
        "curves": _curves(evaluation, looks),
        "counts": _counts(evaluation, table),
        "denoising": _denoising(evaluation.denoising),
        "training": charts.grid(charts.training_curves(logs)) if logs else None,
        "reconstruction": _reconstruction(logs or {}),
        "variance": _variance(table),
        "speed": _speed(evaluation),
        "failures": evaluation.failures,
        "most_failures": SHOWN_FAILURES,
        "provenance": json.dumps(provenance, indent=2),
    }
    return write_page(
        "template.html.jinja", parts, out, Pictures(evaluation, root, samples, pictures)
    )


class Pictures:
    """What a page shows of images; asked again with a smaller gallery until all of it fits."""

    def __init__(
        self,
        evaluation: Evaluation,
        root: str,
        samples: Samples | None,
        strips: dict[str, bytes] | None,
    ) -> None:
        self.evaluation, self.samples, self.strips = evaluation, samples or {}, strips or {}
        self.thumbnails = Thumbnails(root)

    @property
    def models(self) -> int:
        """How many models the page compares."""
        return len({row.model for row in self.evaluation.rows})

    def parts(self, gallery: Gallery) -> dict[str, Any]:
        """Those of the template, and its list of sections."""
        return {
            "pictures": [(name, gallery.strip(data)) for name, data in self.strips.items()],
            "samples": _sample_grid(self.samples, gallery),
            **_cases(self.evaluation, gallery),
        }


def write_page(
    template: str, parts: dict[str, Any], out: str, pictures: Pictures | None = None
) -> str:
    """Render OUT/report.html and return its path. `pictures` are as large as MOST_BYTES allows."""
    environment = Environment(
        loader=PackageLoader("diffitm", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template(template)
    shared = {"palette": PALETTE, "shortened": ""} | parts
    text = page.render(shared) if pictures is None else _fitted(page, shared, pictures)
    path = storage.join(out, "report.html")
    storage.write_text(path, text)
    return path


def _fitted(page: Template, parts: dict[str, Any], pictures: Pictures) -> str:
    """The page with the best pictures that keep it below MOST_BYTES."""

    def render(gallery: Gallery) -> str:
        found = parts | pictures.parts(gallery)
        found["shortened"] = gallery.shortened(MOST_BYTES)
        return page.render(found | {"sections": _sections(found)})

    empty = render(Gallery(QUALITIES[0], 0, pictures.thumbnails))
    budget = MOST_BYTES - len(empty.encode())
    for quality in QUALITIES:
        gallery = Gallery(quality, budget, pictures.thumbnails)
        text = render(gallery)
        if not gallery.left_out:
            break
    if gallery.shortened(MOST_BYTES):
        log.info("report.html: %s", gallery.shortened(MOST_BYTES))
    if (size := len(text.encode())) > MOST_BYTES:
        log.warning(
            "report.html has %.1f MB: tables and charts of %d models alone are too long; report "
            "fewer of them at a time for a smaller one",
            *(size / 1e6, pictures.models),
        )
    return text


def _sections(parts: dict[str, Any]) -> list[tuple[str, str]]:
    """Links to the sections that have something to show."""
    known = {
        "matrix": ("self-bench", "Self-Bench"),
        "races": ("races", "Races"),
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
    if any(row.model.split(",")[0] in EMBEDDED for row in evaluation.rows):
        names = " and ".join(repr(name) for name in EMBEDDED)
        text += f" {names} are the small embedded models, on drawn scenes."
    return text


def _is_main(line: TableLine) -> bool:
    """Whole tasks, and the pairs of groups that are all a bias task has."""
    return line.group == "all" or not line.is_share


def _sortable(table: Table, lines: Sequence[TableLine], by_task: bool = True) -> Cells:
    """A table for the template. Rows with the same key, the task or the group, stand together."""
    rows = []
    for line in lines:
        found = [line.cells[name] for name in table.columns]
        values: list[Any] = [row.value if row else None for row in found]
        texts = table.texts(line)
        more = texts[len(texts) - len(table.published) :]
        known = [re.match(r"[\d.]+", text) for text in more]
        values = [None, None, line.n, *values, line.chance]
        values += [float(found[0]) if found else None for found in known]
        rows.append({"key": line.task if by_task else line.group, "cells": _cells(texts, values)})
    return {"head": table.head(), "shown": short_titles(table.head()), "texts": 2, "rows": rows}


def short_titles(titles: Sequence[str]) -> list[str]:
    """Without the middles of long ones, where no other is the same then; the end tells more."""
    head, tail = LONG_TITLE // 3, LONG_TITLE - LONG_TITLE // 3
    shown = [
        t if len(t) <= LONG_TITLE else f"{t[:head].rstrip()}…{t[-tail:].lstrip()}" for t in titles
    ]
    return [s if shown.count(s) == 1 else t for s, t in zip(shown, titles, strict=True)]


def _cells(texts: Sequence[str], values: Sequence[Any]) -> list[Cells]:
    """Every cell with what it sorts by (None: by nothing or, of a text column, its text); an interval
    and what else follows a number stand apart, so that numbers are below each other."""
    found = []
    for text, value in zip(texts, values, strict=False):
        number, _, bounds = text.partition(" ") if isinstance(value, float) else (text, "", "")
        found.append({"text": number, "bounds": bounds, "value": value})
    return found


def _tests(comparisons: Sequence[Comparison]) -> Cells:
    rows = []
    for test in comparisons:
        texts = comparison_texts(test)
        values = [None, None, None, None, test.difference, test.p, test.n]
        rows.append({"key": f"{test.task}, {test.metric}", "cells": _cells(texts, values)})
    head = ["task", "metric", "first", "second", "difference", "p", "n"]
    return {"head": head, "texts": 4, "rows": rows}


def _denoising(lines: Sequence[Denoising]) -> Cells:
    rows = []
    for line in lines:
        texts: list[str] = [line.task, line.model]
        values: list[Any] = [None, None]
        for value, change in ((line.right, line.change), (line.empty, line.empty_change)):
            texts.append("" if value is None else f"{value:.4g}")
            texts.append("{:+.3g} [{:+.3g}, {:+.3g}]".format(*change) if change else "")
            values += [value, change[0] if change else None]
        cells = _cells([*texts, str(line.n)], [*values, line.n])
        rows.append({"key": line.task, "cells": cells})
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
            values = [None, errors[0], errors[-1], blind[0] if blind else None]
            texts = [model, *("" if v is None else f"{v:.4f}" for v in values[1:])]
            rows.append({"key": "", "cells": _cells(texts, values)})
    head = ["model", "before training", "after training", "without tokens"]
    return {"head": head, "texts": 1, "rows": rows}


def _sample_grid(
    samples: Samples, gallery: Gallery
) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Prompt -> model -> images as data URIs."""
    prompts = dict.fromkeys(prompt for found in samples.values() for prompt in found)
    return [
        (
            prompt,
            [
                (model, [gallery.sample(data) for data in found[prompt]])
                for model, found in samples.items()
                if prompt in found
            ],
        )
        for prompt in prompts
    ]


def _groups(table: Table, looks: Looks) -> list[tuple[str, wide_charts.Chart, Cells]]:
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
        label = f"{title}, {members[0].metric}"
        chart = wide_charts.group_bars(largest, looks, table.columns, label)
        found.append((title, chart, _sortable(table, members, by_task=False)))
    return found


def _bias(table: Table, looks: Looks) -> wide_charts.Chart | None:
    lines = [line for line in table.lines if line.unit == "effect size"]
    shown = [n for n in table.columns if any(line.cells[n] is not None for line in lines)]
    label = "Effect sizes of social bias"
    return wide_charts.effects(lines, looks, shown, label) if lines else None


def _variance(table: Table) -> wide_charts.Chart | None:
    lines = [line for line in table.lines if line.metric.startswith("var. ")]
    shown = [n for n in table.columns if any((r := line.cells[n]) and r.value for line in lines)]
    label = "Shares of the score's variance"
    return wide_charts.share_bars(lines, shown, label) if shown else None


def _curves(evaluation: Evaluation, looks: Looks) -> list[tuple[str, charts.Grid]]:
    """A grid of all tasks each: the excess of all models, then right and wrong of the first one."""
    naive = [curve for curve in evaluation.curves if curve.score == NAIVE_SCORE]
    if not evaluation.curves:
        return []
    found = []
    if naive:
        ends = charts.limits([0.0, *(v for curve in naive for v in charts.excess(curve))])
        tasks = dict.fromkeys(curve.task for curve in naive)
        panels = [
            charts.excess_curves([curve for curve in naive if curve.task == task], looks, ends)
            for task in tasks
        ]
        found.append(("Wrong against right pairs, conditional error, in %", charts.grid(panels)))
    first = [curve for curve in evaluation.curves if curve.model == evaluation.curves[0].model]
    for score in dict.fromkeys(curve.score for curve in first):
        same = [curve for curve in first if curve.score == score]
        ends = charts.limits([v for curve in same for v in (*curve.right, *curve.wrong)])
        title = f"{score.capitalize()} error of {same[0].model}"
        found.append((title, charts.grid([charts.error_curves(curve, ends) for curve in same])))
    return found


def _counts(evaluation: Evaluation, table: Table) -> charts.Grid | None:
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
    return charts.grid(found) if found else None


def _speed(evaluation: Evaluation) -> Cells:
    rows = []
    for speed in evaluation.speeds:
        values = [None, speed.pairs, speed.forwards, speed.seconds, speed.seconds_per_pair]
        texts = [
            speed.model,
            f"{speed.pairs:,}",
            f"{speed.forwards:,}",
            f"{speed.seconds:.1f}",
            f"{speed.seconds_per_pair:.3g}",
        ]
        rows.append({"key": "", "cells": _cells(texts, values)})
    head = ["model", "pairs", "forwards of the model", "seconds of actors", "seconds a pair"]
    return {"head": head, "texts": 1, "rows": rows}


def _races(evaluation: Evaluation) -> Cells:
    rows = []
    for race in evaluation.races:
        values = [None, None, None, race.contests, race.forwards, race.share, race.agreement]
        rows.append({"key": "", "cells": _cells(race_texts(race), values)})
    return {"head": list(RACES), "texts": 3, "rows": rows}


def _means(table: Table) -> Cells | None:
    """The means of groups as a heat map, and all their figures below."""
    means = means_table(table)
    if means is None:
        return None
    shown = _sortable(means, means.lines)
    shown["head"] = ["group", *shown["head"][1:]]
    shown["shown"] = ["group", *shown["shown"][1:]]
    for line, row in zip(means.lines, shown["rows"], strict=True):
        row["key"] = ""
        for name, cell in zip(means.columns, row["cells"][3:], strict=False):
            found = line.cells[name]
            cell["heat"] = heat(found.value if found else None, line.chance)
    return shown


def _cases(evaluation: Evaluation, gallery: Gallery) -> dict[str, Any]:
    """The first model's examples by task and kind, with thumbnails."""
    model = evaluation.cases[0].model if evaluation.cases else ""
    found: dict[str, dict[str, list[Cells]]] = {}
    for case in evaluation.cases:
        if case.model != model:
            continue
        same = found.setdefault(case.task, {}).setdefault(case.kind, [])
        if len(same) == gallery.quality.cases:
            gallery.cases_left_out += 1
            continue
        texts: dict[str, list[Cells]] = {}  # by image: each is shown once
        for p in case.pairs:
            texts.setdefault(p.image, []).append(
                {"text": p.text, "right": p.right, "score": f"{p.score:.4g}"}
            )
        pictures = [(gallery.thumbnail(image), members) for image, members in texts.items()]
        shown = {"example": case.example, "margin": f"{case.margin:+.4g}", "pictures": pictures}
        same.append(shown)
    return {"cases": [(t, list(k.items())) for t, k in found.items()], "case_model": model}
