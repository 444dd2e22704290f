"""Sweeps over settings with Ray Tune: what is tried, and the table, plot and best setting that come of it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from diffitm.commands import sweep_scores, sweep_trainings
from diffitm.commands.entrance import entered
from diffitm.core import storage
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.evaluation.options import GdbenchConfig
from diffitm.sweep.options import Kind, Sweep, read_sweep, values_of
from diffitm.sweep.report import write_report
from diffitm.sweep.result import TrialResult, print_table, ranked, write_best, write_table
from diffitm.sweep.space import Axis, describe
from diffitm.training.diva.options import DivaConfig
from diffitm.training.lora.options import FinetuneConfig

STORED = 50  # timesteps of a sweep over scores, unless told

KINDS = {
    kind.name: kind
    for kind in (
        Kind("lambda", FinetuneConfig, axes=(Axis("lambda_", (0.5, 1.0, 2.0)),)),
        Kind(
            "timesteps",
            GdbenchConfig,
            defaults={"timesteps": [STORED], "range": "0-1000"},
            more={
                "model": str,
                "lora": str,
                "number": int,
                "range": str,
                "weighting": Literal["uniform", "learned"],
            },
            axes=(
                Axis("number", (1, 2, 3, 5, 10, 20, 50)),
                Axis("weighting", ("uniform", "learned")),
            ),
        ),
        Kind(
            "recap-density",
            DivaConfig,
            more={"density": float},
            stand_for={"density": "recap"},
            axes=(Axis("recap", ("class-only", "random:0.1", "random:0.3", "random:0.5", "all")),),
        ),
    )
}


def read(words: list[str], about: str) -> Sweep:
    """The sweep of a command line."""
    return read_sweep(KINDS, words, about)


def run(sweep: Sweep) -> None:
    """Try all settings; write OUT/table.parquet, best.yaml and report.html.

    Raises InputError for bad input, Incomplete if some settings failed.
    """
    out = storage.absolute(sweep.config.out)
    module: Any = sweep_scores if sweep.kind.name == "timesteps" else sweep_trainings
    sweep = module.check(sweep, out)
    with entered(sweep.config, out, _read(sweep)):
        tried = module.run(sweep, out)
        settings = {**asdict(sweep.config), "sweep": sweep.kind.name, "options": sweep.fixed}
        settings["axes"] = [str(axis) for axis in sweep.axes]
        _write_results(sweep, ranked(tried.rows, sweep.axes), out, tried.title, record(settings))
    if tried.lost:
        raise Incomplete(tried.lost)


def _read(sweep: Sweep) -> list[tuple[str, str | None]]:
    """Options whose paths the workers read."""
    names = (*sweep_trainings.PATHS, *sweep_trainings.MODELS, "lora")
    values = [(n, v) for n in names for v in values_of(sweep, {n: None, **sweep.fixed}, n)]
    one = [(n, v) for n, value in values for v in (value if isinstance(value, list) else [value])]
    return [*one, ("store", sweep.config.store)]


def _write_results(
    sweep: Sweep, rows: Sequence[TrialResult], out: str, told: str, provenance: dict[str, Any]
) -> None:
    """Table, best setting and report. Raises InputError if no setting has a result."""
    failed = [row for row in rows if row.failure]
    good = [row for row in rows if row.state == "done"]
    if not good:
        raise InputError(f"no setting came to its end: {failed[0].failure if failed else ''}")
    table = write_table(rows, sweep.axes, out)
    best, text = write_best("best.yaml", *_best(sweep, good[0]), out)
    kind = sweep.kind.name
    report = write_report(kind, rows, sweep.axes, told, text, provenance, out)
    print_table(rows, sweep.axes, told)
    print(f"table   {table}")
    print(f"report  {report}")
    print(f"best    {best}: {describe(good[0].setting, sweep.axes)}")
    script = {"lambda": "finetune", "timesteps": "gdbench", "recap-density": "diva"}[kind]
    command = ["python", f"pipelines/{script}.py", "--config", best]
    print(f"use it  {shlex.join(command)}")
    if good[0].folder:
        print(f"trained {good[0].folder}")
    if failed:
        raise Incomplete(f"{len(failed)} of {len(rows)} settings failed; the table says why")


def _best(sweep: Sweep, row: TrialResult) -> tuple[dict[str, Any], str]:
    """The options of a setting for the pipeline that is swept, and a line about it."""
    values = {**sweep.fixed, **row.setting}
    density = values.pop("density", None)
    if density is not None:
        values["recap"] = {0: "class-only", 1: "all"}.get(density, f"random:{density}")
    if row.timesteps is not None:
        values = {k: v for k, v in values.items() if k not in ("number", "range", "weighting")}
        del values["timesteps"]
        values |= {"model": [values["model"]], "lora": [values["lora"]]}
        values["timestep_list"] = row.timesteps
        if len(set(row.weights or ())) > 1:
            values["timestep_weights"] = [round(weight, 6) for weight in row.weights or ()]
    assert row.accuracy is not None
    measured = "" if row.measured is None else f", {100 * row.measured:.1f}% on the other half"
    return (
        values,
        f"accuracy {100 * row.accuracy:.1f}%{measured}: {describe(row.setting, sweep.axes)}",
    )
