"""Score one's own images and texts: a table, a folder or shards in, Parquet and a small report out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from diffitm.captions.read import image_root, read
from diffitm.captions.row import CaptionRow, Columns, Reading
from diffitm.commands.entrance import entered
from diffitm.commands.models import (
    find_sources,
    make_specs,
    open_stores,
    paths_read,
    score_missing,
)
from diffitm.core import storage
from diffitm.core.config import option
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.evaluation.evaluate import error_of
from diffitm.evaluation.examples import Examples
from diffitm.evaluation.options import (
    ModelOptions,
    asked_timesteps,
    check_models,
    dpt_names,
    lora_names,
    race_options,
)
from diffitm.evaluation.race_table import Races
from diffitm.evaluation.top import Top, TopRaces, write_groups
from diffitm.report.pairs import write_report
from diffitm.report.table import raced_note
from diffitm.report.terminal import print_summary
from diffitm.store.pair_scores import summarise, write_pairs, write_raced_top, write_top
from diffitm.store.pair_table import write_own
from diffitm.store.run_summary import write_summary

log = logging.getLogger("diffitm")


@dataclass(frozen=True)
class ScoreConfig(ModelOptions):
    """Options of pipelines/score.py."""

    data: str = option(
        "", "a table, a folder of images or .tar shards, or its URI: see docs/data.md"
    )
    images: str | None = option(
        None, "folder or URI that a table's image paths start from (default: the table's own)"
    )
    image_column: str | None = option(None, "a table's column of image paths, if not a usual name")
    text_column: str | None = option(
        None, "a table's column of texts, one or a list a row, if not a usual name"
    )
    source_column: str | None = option(
        None, "a column, or a key of a shard's .json, by which the report counts"
    )
    text: list[str] = option([], "score every image against these texts instead of its own")
    text_file: str | None = option(None, "the same, one text a line")
    top_k: int | None = option(None, "also write the best so many", at_least=1)
    top_of: Literal["text", "image"] = option(
        "text", "the best images of each text, or the best texts of each image"
    )
    errors: bool = option(False, "also write a diffusion model's errors by timestep")
    shown: int = option(12, "pairs at either end in the report", at_least=0, at_most=500)
    out: str = option("out/score", "folder or URI for scores and the report")


def run(config: ScoreConfig) -> None:
    """Score what is missing; write pairs.parquet, summary.json and report.html.

    Raises InputError for bad input before anything is scored, Incomplete at the end if rows have no score.
    """
    problems = check_models(config)
    if not problems and race_options(config) and config.top_k is None:
        problems.append("--racing finds the best and scores the others no further: give --top-k")
    if not config.data:
        problems.append("give --data, such as --data captions.csv")
    counts = 1 if config.timestep_list else len(set(asked_timesteps(config)))
    errors = len(lora_names(config)) * counts if None in dpt_names(config) else 0
    diffusion = len(config.model) * (errors + len(list(filter(None, dpt_names(config)))))
    if diffusion + len(config.clip) + len(config.scorer) > 1:
        problems.append("score takes one model, --lora, --dpt and number of --timesteps a run")
    if problems:
        raise InputError("\n".join(problems))
    out = storage.absolute(config.out)
    root = image_root(storage.absolute(config.data), config.images)
    paths = [("--data", config.data), ("--images", root), *paths_read(config)]
    with entered(config, out, paths):
        _run(config, root, out)


def _run(config: ScoreConfig, root: str, out: str) -> None:
    """See run; OUT is held."""
    sources = find_sources(config)
    uri, total, unusable = write_own(own_rows(config), storage.join(out, "examples"))
    log.info("%s: %s rows, %s of them unusable", config.data, f"{total:,}", f"{unusable:,}")
    specs, pool = make_specs(config, sources, root, out)
    (spec,) = specs
    (store,) = open_stores(specs, root, out)
    weights = np.array(config.timestep_weights) if config.timestep_weights else None
    error = error_of(store, config.error)
    examples, races = Examples(uri, storage.without_query(uri)), None
    if (options := race_options(config)) and config.top_k is not None:
        examples = write_groups(uri, config.top_of, storage.join(out, "examples"))
        plan = options.plan(store, error, weights)
        races = Races(options, plan, {Top.name: Top(config.top_k)}) if plan else None
    done = score_missing(spec, store, {Top.name: examples}, out, pool, races)
    print_summary(write_summary([spec.label], [done], out))
    pairs = write_pairs(out, uri, store, error, weights, config.errors, races is not None)
    print(f"scores   {pairs}")
    note = ""
    if races:
        raced = TopRaces(examples, store, races)
        print(f"top      {write_raced_top(pairs, out, config.top_of, raced)}")
        note = raced_note([raced.figure] if raced.figure else [])
        if note:
            print(note)
    elif config.top_k is not None:
        print(f"top      {write_top(pairs, out, config.top_k, config.top_of)}")
    summary = summarise(pairs, config.shown)
    if races:
        note += f" Shown are the {summary.compared:,} pairs that were scored at all timesteps."
    provenance = record(asdict(config)) | {"stores": {store.name: store.config}}
    storage.write_text(storage.join(out, "scores.json"), json.dumps(asdict(summary), indent=2))
    storage.write_text(storage.join(out, "provenance.json"), json.dumps(provenance, indent=2))
    kind = store.similarity or "normalised"
    print(f"report   {write_report(summary, spec.label, kind, provenance, root, out, note)}")
    if summary.quantiles:
        shares = ", ".join(f"{share} {value:.4g}" for share, value in summary.quantiles.items())
        print(f"quantiles of the score: {shares}")
    if summary.failures:
        text = f"{summary.failures:,} of {summary.pairs:,} pairs have no score"
        if summary.failed:
            text += f", such as {summary.failed[0]['image']}: {summary.failed[0]['failure']}"
        raise Incomplete(f"{text}; pairs.parquet says why (column failure)")


def own_rows(config: ScoreConfig) -> Iterator[CaptionRow]:
    """The rows of --data, one after the other. Raises InputError for what cannot be read."""
    columns = Columns(config.image_column, config.text_column, config.source_column)
    texts = _texts(config)
    return read(storage.absolute(config.data), Reading(columns, tuple(texts) if texts else None))


def _texts(config: ScoreConfig) -> list[str]:
    texts = list(config.text)
    if config.text_file is not None:
        try:
            lines = storage.read_text(config.text_file).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{config.text_file!r} cannot be read: {error}", "text_file"
            ) from error
        texts += [line.strip() for line in lines if line.strip()]
        if not texts:
            raise InputError(f"{config.text_file!r} holds no text", "text_file")
    return list(dict.fromkeys(texts))
