"""A sweep over trainings: finetune.py or diva.py with every setting, compared on validation data."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.models.embedded import EMBEDDED
from diffitm.sweep.options import Sweep, values_of
from diffitm.sweep.result import Tried, open_sweep
from diffitm.sweep.space import grid
from diffitm.training.diva import options as diva_options
from diffitm.training.lora import options

SCENES, SEED = 100, 201  # of the drawn tasks that a sweep over recaps is validated on
# Encoded beforehand for all trials alike, so these must be the same in all.
PATHS, MODELS = (
    ("data", "images", "validation_data", "adapter"),
    ("model", "teacher", "single_file_config", "clip", "validation_tasks"),
)
OF_LENGTH = ("steps", "epochs", "effective_batch", "validate_every", "max_images", "data")
OF_CACHE = (
    "model",
    "teacher",
    "single_file_config",
    "variant",
    "dtype",
    "resize",
    "data",
    "seed",
    "max_images",
)


def check(sweep: Sweep, out: str) -> Sweep:
    """The sweep with what its trials need beside the options, its paths absolute.

    Raises InputError with all problems.
    """
    sweep = placed(sweep)
    _check_axes(sweep)
    sweep = replace(sweep, fixed=sweep.fixed | _validation(sweep, out))
    problems: dict[str, None] = {}
    for setting in grid(sweep.axes):
        problems.update(dict.fromkeys(_problems(sweep, setting, out)))
    if problems:
        raise InputError("\n".join(problems))
    return sweep


def placed(sweep: Sweep) -> Sweep:
    """The sweep with absolute paths: a trial runs in a folder of its own."""

    def place(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [place(name, item) for item in value]
        if name not in (*PATHS, *MODELS) or not isinstance(value, str) or value in EMBEDDED:
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


def _check_axes(sweep: Sweep) -> None:
    """Raises InputError for an option that cannot be swept here."""
    swept = {axis.name for axis in sweep.axes}
    clash = sorted(swept & set(OF_CACHE))
    if sweep.fixed.get("cache_latents") and clash:
        raise InputError(f"cache_latents: is for all trials alike, and {clash[0]} is swept")
    if sweep.config.early_stopping and (other := sorted(swept & set(OF_LENGTH))):
        raise InputError(
            f"{other[0]}: trainings of several lengths cannot be stopped by rank; add early_stopping=false"
        )


def _validation(sweep: Sweep, out: str) -> dict[str, Any]:
    """Options of a validation that the sweep leaves open. Raises InputError if there is none."""
    fixed, more = sweep.fixed, dict[str, Any]()
    swept = {axis.name for axis in sweep.axes}
    steps = [step for step in values_of(sweep, {"steps": None, **fixed}, "steps") if step]
    if "validate_every" not in swept | set(fixed) and steps:
        more["validate_every"] = max(1, min(steps) // 4)
    if sweep.kind.name == "recap-density" and not fixed.get("validation_data"):
        if fixed.get("data") != "shapes" and fixed.get("preset") != "shapes":
            raise InputError("validation_data: give the data root of the tasks that choose")
        more["validation_data"] = _drawn_validation(out)
    return more


def _problems(sweep: Sweep, setting: dict[str, Any], out: str) -> list[str]:
    """What is wrong with a setting's options."""
    try:
        config = _trial(sweep, setting, out)
    except InputError as error:
        return [error.on_command_line()]
    find = options if sweep.kind.name == "lambda" else diva_options
    problems = find.find_problems(config)
    if not config.validate_every:
        problems.append("validate_every: 0 leaves nothing to compare settings by")
    return problems


def _drawn_validation(out: str) -> str:
    return storage.join(out, "trials", "work", f"validation-{SCENES}")


def _trial(sweep: Sweep, setting: dict[str, Any], out: str) -> Any:
    from diffitm.commands.workers.trials import trial_config

    return trial_config(sweep.kind.name, sweep.fixed, setting, storage.join(out, "trials"))


def run(sweep: Sweep, out: str) -> Tried:
    """Train with every setting; what they share is made ready once."""
    from diffitm.commands import diva, finetune
    from diffitm.commands.workers.trials import train_trial
    from diffitm.distributed import session
    from diffitm.distributed.trainer import worker_share, workers_of
    from diffitm.distributed.tuner import Experiment, identity, stopper

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
    cpus, gpus = worker_share(workers)
    open_sweep(out, identity(sweep))
    if first.cache_latents:
        pipeline.encoded(job, first.out)
    # As the cluster is now, whatever comes up later: all trials train alike.
    sweep = replace(sweep, fixed=sweep.fixed | {"dtype": job.dtype, "gpus_per_worker": gpus})
    trainable = functools.partial(
        train_trial,
        kind=sweep.kind.name,
        fixed=sweep.fixed,
        folder=storage.join(out, "trials"),
        steps=job.steps,
        own=sweep.config.search == "optuna",
    )
    rows = Experiment(
        sweep=sweep,
        out=out,
        trainable=trainable,
        cpus=0,
        parallel=sweep.config.parallel or session.fitting(workers.most * cpus, workers.most * gpus),
        stopper=stopper(sweep, job.steps, job.validation.every),
    ).run()
    count = f"{job.validation.examples} examples at most of {', '.join(job.validation.tasks)}"
    unread = [row for row in rows if row.unread]
    return Tried(
        rows,
        f"accuracy in % on validation data ({count}), which also chose the best setting",
        f"{len(unread)} trainings: {unread[0].unread}" if unread else "",
    )
