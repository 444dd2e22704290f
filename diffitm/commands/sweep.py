"""Sweep settings, from the options to the table, the plot and the best setting."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from diffitm.commands import gdbench
from diffitm.commands.entrance import entered
from diffitm.core import storage
from diffitm.core.config import make
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import record
from diffitm.evaluation.evaluate import error_of
from diffitm.scoring.noise_plan import plan_timesteps
from diffitm.scoring.specs import DiffusionSpec
from diffitm.sweep.options import Kind, Sweep
from diffitm.sweep.report import write_report
from diffitm.sweep.result import (
    TrialResult,
    open_sweep,
    print_table,
    public,
    ranked,
    write_best,
    write_table,
)
from diffitm.sweep.score_settings import parse_range, read_errors
from diffitm.sweep.space import Axis, describe, grid
from diffitm.tasks.registry import TASKS, find_task
from diffitm.training.diva import options as diva_options
from diffitm.training.lora import options

log = logging.getLogger("diffitm")
STORED = 50  # timesteps of a sweep over scores, unless told
SCENES, SEED = 100, 201  # of the drawn tasks that a sweep over recaps is validated on
OF_SCORE = ("model", "lora", "protocol", "error", "number", "range", "weighting")
# Encoded beforehand for all trials alike, so these must be the same in all.
PATHS, MODELS = (
    ("data", "images", "validation_data"),
    ("model", "teacher", "clip", "validation_tasks"),
)
OF_LENGTH = ("steps", "epochs", "effective_batch", "validate_every", "max_images", "data")
OF_CACHE = ("model", "teacher", "variant", "dtype", "resize", "data", "seed", "max_images")
UNUSED = (
    *("clip", "prompts", "segmentation", "clip_benchmark", "mllm", "check"),
    *("report_only", "timestep_list", "timestep_weights", "published_bias"),
)

KINDS = {
    kind.name: kind
    for kind in (
        Kind("lambda", options.FinetuneConfig, axes=(Axis("lambda_", (0.5, 1.0, 2.0)),)),
        Kind(
            "timesteps",
            gdbench.GdbenchConfig,
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
            diva_options.DivaConfig,
            more={"density": float},
            stand_for={"density": "recap"},
            axes=(Axis("recap", ("class-only", "random:0.1", "random:0.3", "random:0.5", "all")),),
        ),
    )
}


def run(sweep: Sweep) -> None:
    """Try all settings; write OUT/table.parquet, best.yaml and report.html.

    Raises InputError for bad input, Incomplete if some settings failed.
    """
    out = storage.absolute(sweep.config.out)
    _refuse_keys(sweep)
    scores = sweep.kind.name == "timesteps"
    unused = [name for name in UNUSED if scores and name in sweep.fixed]
    if unused:
        raise InputError(f"{', '.join(unused)}: a sweep has no use for it; leave it out")
    sweep = _scores_checked(sweep) if scores else _training_checked(_placed(sweep), out)
    with entered(sweep.config, out, _read(sweep)):
        _run(sweep, out)


def _read(sweep: Sweep) -> list[tuple[str, str | None]]:
    """Options whose paths the workers read."""
    names = (*PATHS, *MODELS, "lora")
    values = [(n, v) for n in names for v in _values(sweep, {n: None, **sweep.fixed}, n)]
    one = [(n, v) for n, value in values for v in (value if isinstance(value, list) else [value])]
    return [*one, ("store", sweep.config.store)]


def _run(sweep: Sweep, out: str) -> None:
    """See run, with OUT held."""
    scores = sweep.kind.name == "timesteps"
    rows, title, lost = _try_scores(sweep, out) if scores else _try_trainings(sweep, out)
    told = {**asdict(sweep.config), "sweep": sweep.kind.name, "options": sweep.fixed}
    told["axes"] = [str(axis) for axis in sweep.axes]
    _leave(sweep, ranked(rows, sweep.axes), out, title, record(told))
    if lost:
        raise Incomplete(lost)


def _refuse_keys(sweep: Sweep) -> None:
    """Raises InputError for a URI with keys: Ray Tune writes settings down as they are."""
    given = {"out": sweep.config.out, "store": sweep.config.store, **sweep.fixed}
    for name, value in [*given.items(), *((axis.name, axis.values) for axis in sweep.axes)]:
        value = list(value) if isinstance(value, tuple) else value
        if public(value) != value:
            raise InputError(
                f"{name}: holds keys, which Ray Tune would write down; set AWS_ACCESS_KEY_ID"
            )


def _placed(sweep: Sweep) -> Sweep:
    """The sweep with absolute paths: a trial runs in a folder of its own."""

    def place(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [place(name, item) for item in value]
        if name not in (*PATHS, *MODELS) or not isinstance(value, str) or value == "shapes":
            return value
        first, mark, last = value.partition(":")
        if "://" in value:
            return value
        if name == "clip" and mark and Path(last).expanduser().is_file():  # NAME:FILE
            return f"{first}:{storage.absolute(last)}"
        if name == "validation_tasks":  # FILE.py:CLASS
            return f"{storage.absolute(first)}:{last}" if first.endswith(".py") else value
        known = name in PATHS or Path(value).expanduser().exists()  # else it is a Hub id
        return storage.absolute(value) if known else value

    fixed = {name: place(name, value) for name, value in sweep.fixed.items()}
    axes = [replace(a, values=tuple(place(a.name, v) for v in a.values)) for a in sweep.axes]
    return replace(sweep, fixed=fixed, axes=tuple(axes))


def _training_checked(sweep: Sweep, out: str) -> Sweep:
    """The sweep with what its trials need beside the options. Raises InputError with all problems."""
    fixed, kind = dict(sweep.fixed), sweep.kind
    swept = {axis.name for axis in sweep.axes}
    clash = sorted(swept & set(OF_CACHE))
    if fixed.get("cache_latents") and clash:
        raise InputError(f"cache_latents: is for all trials alike, and {clash[0]} is swept")
    if sweep.config.early_stopping and (other := sorted(swept & set(OF_LENGTH))):
        raise InputError(
            f"{other[0]}: trainings of several lengths cannot be stopped by rank; add early_stopping=false"
        )
    steps = [step for step in _values(sweep, {"steps": None, **fixed}, "steps") if step]
    if "validate_every" not in swept | set(fixed) and steps:
        fixed["validate_every"] = max(1, min(steps) // 4)
    if kind.name == "recap-density" and not fixed.get("validation_data"):
        if fixed.get("data") != "shapes" and fixed.get("preset") != "shapes":
            raise InputError("validation_data: give the data root of the tasks that choose")
        fixed["validation_data"] = _drawn_validation(out)
    sweep = replace(sweep, fixed=fixed)
    problems: dict[str, None] = {}
    for setting in grid(sweep.axes):
        try:
            config = _trial(sweep, setting, out)
        except InputError as error:
            problems[str(error)] = None
            continue
        find = options.find_problems if kind.name == "lambda" else diva_options.find_problems
        problems.update(dict.fromkeys(find(config)))
        if not config.validate_every:
            problems["validate_every: 0 leaves nothing to compare settings by"] = None
    if problems:
        raise InputError("\n".join(problems))
    return sweep


def _drawn_validation(out: str) -> str:
    return storage.join(out, "trials", "work", f"validation-{SCENES}")


def _trial(sweep: Sweep, setting: dict[str, Any], out: str) -> Any:
    from diffitm.commands.workers.trials import trial_config

    return trial_config(sweep.kind.name, sweep.fixed, setting, storage.join(out, "trials"))


def _try_trainings(sweep: Sweep, out: str) -> tuple[list[TrialResult], str, str]:
    """Train with every setting; what they share is made ready once. The rows, what their accuracy is
    of, and what input could not be used."""
    from diffitm.commands import diva, finetune
    from diffitm.commands.workers.trials import train_trial
    from diffitm.distributed import session
    from diffitm.distributed.trainer import share, workers_of
    from diffitm.distributed.tuner import identity, run_trials, stopper

    # Without it Ray Train does not see that a training was stopped, and keeps its workers' share.
    session.connect(sweep.config.ray, dashboard=True, verbose=sweep.config.verbose)
    if sweep.fixed.get("validation_data") == _drawn_validation(out):
        from diffitm.shapes.layouts import write_world

        write_world(sweep.fixed["validation_data"], SCENES, seed=SEED)
    first = _trial(sweep, next(grid(sweep.axes)), out)
    pipeline: Any = finetune if sweep.kind.name == "lambda" else diva
    job = pipeline.build_plan(first).job
    if job.validation is None:
        raise InputError("validation_data: give the data root of the tasks that choose")
    workers = workers_of(first)
    cpus, gpus = share(workers)
    open_sweep(out, identity(sweep))
    if first.cache_latents:
        pipeline.encoded(job, first.out)
    # As the cluster is now, whatever comes up later: all trials train alike.
    sweep = replace(sweep, fixed=sweep.fixed | {"dtype": job.dtype, "gpus_per_worker": gpus})
    parallel = sweep.config.parallel or fitting(cpus, gpus, workers.most)
    trainable = functools.partial(
        train_trial,
        kind=sweep.kind.name,
        fixed=sweep.fixed,
        folder=storage.join(out, "trials"),
        steps=job.steps,
        own=sweep.config.search == "optuna",
    )
    asha = stopper(sweep, job.steps, job.validation.every)
    rows = run_trials(sweep, trainable, 0, parallel, asha, out)
    count = f"{job.validation.examples} examples at most of {', '.join(job.validation.tasks)}"
    unread = [row for row in rows if row.unread]
    lost = f"{len(unread)} trainings: {unread[0].unread}" if unread else ""
    title = f"accuracy in % on validation data ({count}), which also chose the best setting"
    return rows, title, lost


def fitting(cpus: float, gpus: float, workers: int) -> int:
    """Trials that fit on the cluster as it is, at least one."""
    from diffitm.distributed import session

    total = session.resources()
    found = int((total.get("CPU", 0) - session.SPARE_CPUS) / (workers * cpus))
    if gpus:
        found = min(found, int(total.get("GPU", 0) / (workers * gpus)))
    return max(1, found)


def _scores_checked(sweep: Sweep) -> Sweep:
    """The sweep with a value for everything that a score depends on. Raises InputError."""
    fixed = {"lora": "none", "protocol": "diffusionitm", "error": "auto", **sweep.fixed}
    swept = {axis.name: axis for axis in sweep.axes}
    if "model" not in {*fixed, *swept}:
        raise InputError("give model=, such as model=shapes")
    if other := sorted(set(swept) - set(OF_SCORE)):
        raise InputError(
            f"{other[0]}: give one value; scores are stored for one, and {', '.join(OF_SCORE)} are swept"
        )
    _graded(fixed.get("tasks", ["all"]))
    store = sweep.config.store
    if store and not storage.exists(storage.join(storage.absolute(store), "scores")):
        raise InputError(f"store: {store} holds no scores; give the OUT of a gdbench.py run")
    fixed = {name: value for name, value in fixed.items() if name not in swept}
    numbers = [*_values(sweep, fixed, "number")]
    if len(fixed["timesteps"]) != 1:
        raise InputError("timesteps: give one number, how many are stored; number= is swept")
    for text in _values(sweep, fixed, "range"):
        low, high = parse_range(text)
        for protocol in _values(sweep, fixed, "protocol"):
            planned = plan_timesteps(protocol, fixed["timesteps"][0], fixed.get("seed", 0))
            if not any(low <= step < high for step in planned):
                raise InputError(f"range: none of the {len(planned)} of {protocol} lies in {text}")
    if min(numbers) < 1:
        raise InputError(f"number: {min(numbers)} must be at least 1")
    return replace(sweep, fixed=fixed)


def _graded(tasks: list[str]) -> list[str]:
    """The tasks that tell a better setting from a worse one. Raises InputError for one that cannot."""
    every = [name for name in TASKS if find_task(name).graded]
    for name in tasks:
        if name != "all" and not find_task(name).graded:
            raise InputError(f"tasks: {name} has no right and wrong answers to choose a setting by")
    return list(itertools.chain.from_iterable(every if name == "all" else [name] for name in tasks))


def _values(sweep: Sweep, fixed: dict[str, Any], name: str) -> tuple[Any, ...]:
    """All values of an option, whether swept or not."""
    axes = {axis.name: axis for axis in sweep.axes}
    return axes[name].extremes if name in axes else (fixed[name],)


def _try_scores(sweep: Sweep, out: str) -> tuple[list[TrialResult], str, str]:
    """Score what the store lacks, then try every setting on the stored errors. See _try_trainings."""
    from ray import tune

    from diffitm.commands.workers.score_trials import Key, Table, score_trial
    from diffitm.distributed.tuner import identity, run_trials

    protocols = _values(sweep, sweep.fixed, "protocol")
    prepared = [gdbench.prepare(_gdbench(sweep, protocol, out)) for protocol in protocols]
    open_sweep(out, identity(sweep))
    forwards = gdbench.score_all(prepared, out)
    tables: dict[Key, Table] = {}
    for protocol, ready in zip(protocols, prepared, strict=True):
        for spec, store in zip(ready.specs, ready.stores, strict=True):
            assert isinstance(spec, DiffusionSpec)
            lora = storage.identity(spec.lora_name or "none")
            for error in _values(sweep, sweep.fixed, "error"):
                key = (storage.identity(spec.source.name), lora, protocol, error)
                kind = error_of(store, error)
                read = [
                    read_errors(find_task(name)(), uri, store, kind)
                    for name, uri in ready.files.items()
                ]
                tables[key] = (list(spec.timesteps), [table for table in read if table])
    log.info("%s U-Net forwards were needed; all settings read the stored errors", f"{forwards:,}")
    trainable = tune.with_parameters(score_trial, fixed=sweep.fixed, tables=tables)
    parallel = sweep.config.parallel or fitting(1.0, 0.0, 1)
    state = [[*key, steps, [t.identity for t in found]] for key, (steps, found) in tables.items()]
    rows = run_trials(sweep, trainable, 1.0, parallel, None, out, state)
    failures = [
        {"model": key[0], "lora": key[1], "protocol": key[2], "task": table.task.name, "example": example,
         "failure": reason}
        for key, (_, found) in tables.items() if key[3] == next(iter(tables))[3]
        for table in found for example, reason in table.failures.items()
    ]  # fmt: skip
    where = storage.join(out, "failures.json")
    storage.write_text(where, json.dumps({"failures": failures}, indent=2))
    left = f"; {len(failures)} examples without a score are left out" if failures else ""
    lost = (
        f"{len(failures):,} examples have no score; they are listed in {where}" if failures else ""
    )
    text = "accuracy in %, mean of the tasks: of the half of the examples that chooses, measured on the other"
    return rows, f"{text}; {forwards:,} U-Net forwards were done for it{left}", lost


def _gdbench(sweep: Sweep, protocol: str, out: str) -> gdbench.GdbenchConfig:
    """What the stored errors are of, under a protocol."""
    values = {k: v for k, v in sweep.fixed.items() if k not in OF_SCORE}
    values |= {
        "tasks": _graded(values.get("tasks", ["all"])),
        "model": list(_values(sweep, sweep.fixed, "model")),
        "lora": list(_values(sweep, sweep.fixed, "lora")),
        "protocol": protocol,
        "out": storage.absolute(sweep.config.store) if sweep.config.store else out,
        "ray": sweep.config.ray,
        "verbose": sweep.config.verbose,
    }
    return make(gdbench.GdbenchConfig, values)


def _leave(
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
    print(f"table   {storage.redacted(table)}")
    print(f"report  {storage.redacted(report)}")
    print(f"best    {storage.redacted(best)}: {describe(good[0].setting, sweep.axes)}")
    script = {"lambda": "finetune", "timesteps": "gdbench", "recap-density": "diva"}[kind]
    command = ["python", f"pipelines/{script}.py", "--config", storage.redacted(best)]
    print(f"use it  {shlex.join(command)}")
    if good[0].folder:
        print(f"trained {storage.redacted(good[0].folder)}")
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
