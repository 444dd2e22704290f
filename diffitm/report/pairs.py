"""The report on people's own pairs: the distribution, both ends with pictures, sources, failures."""

from __future__ import annotations

import json
from typing import Any

from diffitm.report import wide_charts
from diffitm.report.gallery import QUALITIES, Thumbnails, jpeg
from diffitm.report.html import write_page
from diffitm.store.pair_scores import PairSummary


def write_report(
    summary: PairSummary,
    model: str,
    kind: str,
    provenance: dict[str, Any],
    root: str,
    out: str,
    note: str = "",
) -> str:
    """Write OUT/report.html and return its path. `kind` is that of the score, `root` the images', `note`
    what else is to be said of the scores."""
    scored = summary.pairs - summary.failures
    sections = [("distribution", "Distribution")] * bool(summary.edges)
    sections += [("ends", "Best and worst")] * bool(summary.best)
    sections += [("sources", "By source")] * bool(summary.sources)
    sections += [("failures", "Failures")] * bool(summary.failed)

    sections += [("provenance", "Provenance")]
    thumbnails, best = Thumbnails(root), QUALITIES[0]

    def shown(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = []
        for line in lines:
            image = thumbnails.read(line["image"])
            picture = None if image is None else jpeg(image, best.thumbnail, best.jpeg)
            found.append({**line, "score": f"{line['score']:.4g}", "thumbnail": picture})
        return found

    chart = None
    if summary.edges:
        chart = wide_charts.histogram(
            summary.edges, summary.counts, f"{kind} score", "Pairs by score"
        )
    parts = {
        "title": "Scores of pairs",
        "setting": f"{model}: {scored:,} of {summary.pairs:,} pairs scored; {kind} score, higher is a "
        f"better match. {note}",
        "sections": sections,
        "chart": chart,
        "quantiles": {name: f"{value:.4g}" for name, value in summary.quantiles.items()},
        "ends": [("Best", shown(summary.best)), ("Worst", shown(summary.worst))],
        "sources": summary.sources,
        "failed": summary.failed,
        "failures": summary.failures,
        "provenance": json.dumps(provenance, indent=2),
    }
    return write_page("pairs.html.jinja", parts, out)
