"""Published figures to print beside ours, labelled as published: a column for each model's, where set,
metric, protocol and model are the same."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from diffitm.evaluation.evaluate import Evaluation, ResultRow

# DiffusionITM (Krojer et al. 2023, table 2): Stable Diffusion 2.1 at 10 timesteps, normalised for
# images, ImageCoDe's static sets. (task, metric) -> vanilla, tuned without and with hard negatives.
LABEL = "published: SD 2.1 (NoNeg, HardNeg)"
TIMESTEPS = 10
FIGURES = {
    ("winoground", "image"): (9.0, 10.3, 9.8),
    ("winoground", "text"): (32.3, 35.0, 30.8),
    ("imagecode", "R@1"): (30.1, 29.7, 31.9),
}
# Self-Bench's names of models -> the Hub's.
SELF_BENCH_MODELS = {
    "SD 1.5": (
        "runwayml/stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
    ),
    "SD 2.0": ("stabilityai/stable-diffusion-2-base",),
}
# Of models with a table Self-Bench takes each 33rd of 1000 places in descending order, from the tenth on.
SELF_BENCH_TIMESTEPS = sorted(999 - place for place in range(10, 990, 33))
SOURCES = {
    "vl_compo": "vl_compo: ytaek-oh/vl_compo, individual_results.csv",
    "self_bench": "Self-Bench: Jeong et al. 2025, the numbers of their plots, in whole percent",
}
Key = tuple[str, str, str]  # task, group, metric


@dataclass(frozen=True)
class Published:
    """A column of published figures as text, by task, group and metric; `about` says where they stand."""

    title: str
    about: str
    figures: Mapping[Key, str]


def published(evaluation: Evaluation) -> list[Published]:
    """The columns that go with an evaluation of real data."""
    settings = evaluation.settings
    is_weighted = any(known.get("weighted") for known in settings.values())
    found = [] if is_weighted else _of_paper(evaluation.rows)
    for source, about in SOURCES.items():
        for model, figures in _table(source).items():
            shown = {
                (row.task, row.group, row.metric): figures[row.task, row.group, row.metric][1]
                for row in evaluation.rows
                if _is_same(model, row, settings.get(row.model, {}))
                and figures.get((row.task, row.group, row.metric), (None,))[0] == row.n
            }
            if shown:
                name = about.partition(":")[0]
                found.append(Published(f"published: {model} ({name})", about, shown))
    return found


def _of_paper(rows: Sequence[ResultRow]) -> list[Published]:
    """Table 2 of DiffusionITM, beside any model at its number of timesteps."""
    diffusion = [row for row in rows if row.timesteps]
    if {row.timesteps for row in diffusion} != {TIMESTEPS}:
        return []
    if {row.protocol for row in diffusion} != {"diffusionitm"}:
        return []
    shown = {
        (row.task, row.group, row.metric): "{:.1f} ({:.1f}, {:.1f})".format(
            *FIGURES[row.task, row.metric]
        )
        for row in rows
        if row.group == "all" and (row.task, row.metric) in FIGURES
    }
    return [Published(LABEL, f"{LABEL}: Krojer et al. 2023, table 2", shown)] if shown else []


def _is_same(model: str, row: ResultRow, settings: Mapping[str, Any]) -> bool:
    """Whether a row is of a published model, under the protocol of its figures."""
    name = row.model.split(",")[0]
    if model not in SELF_BENCH_MODELS:
        return name == model and row.score == "cosine"
    return (
        name in SELF_BENCH_MODELS[model]
        and row.racing is None
        and not settings.get("weighted")
        and sorted(settings.get("timesteps", [])) == SELF_BENCH_TIMESTEPS
        and settings.get("latent_seed") is not None
        and settings.get("error") == "l2"
    )


@functools.cache
def _table(source: str) -> dict[str, dict[Key, tuple[int, str]]]:
    """Model -> (task, group, metric) -> how many examples, and the figure in percent, of one file."""
    file = resources.files("diffitm.report") / "published" / f"{source}.csv"
    lines = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    models = list(lines[0])[4:]
    return {
        model: {
            (line["task"], line["group"], line["metric"]): (int(line["n"]), line[model])
            for line in lines
            if line[model]
        }
        for model in models
    }
