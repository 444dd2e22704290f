"""A sweep over settings of the score: every pair is scored once, and trials read the stored errors."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from typing import Any

from diffitm.commands import gdbench
from diffitm.core import storage
from diffitm.core.config import make
from diffitm.core.errors import InputError
from diffitm.evaluation.evaluate import error_of
from diffitm.evaluation.options import GdbenchConfig
from diffitm.scoring.protocols import FLOW_PROTOCOLS, PROTOCOLS, planned
from diffitm.scoring.specs import DiffusionSpec
from diffitm.sweep.options import Sweep, values_of
from diffitm.sweep.result import Tried, open_sweep
from diffitm.sweep.score_settings import Key, Table, parse_range, read_errors
from diffitm.tasks.registry import SUITES, find_task, named

log = logging.getLogger("diffitm")
OF_SCORE = ("model", "lora", "protocol", "error", "number", "range", "weighting")
UNUSED = (
    *("clip", "prompts", "segmentation", "clip_benchmark", "mllm", "check"),
    *("report_only", "timestep_list", "timestep_weights", "published_bias"),
    *("racing", "n_samples", "to_keep", "racing_audit", "dpt", "dpt_timestep"),
)


def check(sweep: Sweep, out: str) -> Sweep:
    """The sweep with a value for everything that a score depends on. Raises InputError."""
    unused = [name for name in UNUSED if name in sweep.fixed]
    if unused:
        raise InputError(f"{', '.join(unused)}: a sweep has no use for it; leave it out")
    fixed = {"lora": "none", "protocol": "diffusionitm", "error": "auto", **sweep.fixed}
    swept = {axis.name: axis for axis in sweep.axes}
    if "model" not in {*fixed, *swept}:
        raise InputError("give model=, such as model=shapes")
    if other := sorted(set(swept) - set(OF_SCORE)):
        raise InputError(
            f"{other[0]}: give one value; scores are stored for one, and {', '.join(OF_SCORE)} are swept"
        )
    _graded(fixed.get("tasks", ["gdbench"]))
    store = sweep.config.store
    if store and not storage.exists(storage.join(storage.absolute(store), "scores")):
        raise InputError(f"store: {store} holds no scores; give the OUT of a run of gdbench")
    fixed = {name: value for name, value in fixed.items() if name not in swept}
    numbers = [*values_of(sweep, fixed, "number")]
    if len(fixed["timesteps"]) != 1:
        raise InputError("timesteps: give one number, how many are stored; number= is swept")
    if "auto" in values_of(sweep, fixed, "protocol"):
        names = ", ".join((*PROTOCOLS, *FLOW_PROTOCOLS))
        raise InputError(
            f"protocol: auto is none that a sweep can store under, give one of {names}"
        )
    for text in values_of(sweep, fixed, "range"):
        low, high = parse_range(text)
        for protocol in values_of(sweep, fixed, "protocol"):
            steps = planned(protocol, fixed["timesteps"][0], fixed.get("seed", 0))
            if not any(low <= step < high for step in steps):
                raise InputError(f"range: none of the {len(steps)} of {protocol} lies in {text}")
    if min(numbers) < 1:
        raise InputError(f"number: {min(numbers)} must be at least 1")
    return replace(sweep, fixed=fixed)


def _graded(tasks: list[str]) -> list[str]:
    """The tasks that tell a better setting from a worse one. Raises InputError for one that cannot."""
    for name in tasks:
        if name not in SUITES and not find_task(name).graded:
            raise InputError(f"tasks: {name} has no right and wrong answers to choose a setting by")
    return [name for name in named(tasks) if find_task(name).graded]


def gdbench_config(sweep: Sweep, protocol: str, out: str) -> GdbenchConfig:
    """What the stored errors are of, under a protocol."""
    values = {k: v for k, v in sweep.fixed.items() if k not in OF_SCORE}
    values |= {
        "tasks": _graded(values.get("tasks", ["gdbench"])),
        "model": list(values_of(sweep, sweep.fixed, "model")),
        "lora": list(values_of(sweep, sweep.fixed, "lora")),
        "protocol": protocol,
        "out": storage.absolute(sweep.config.store) if sweep.config.store else out,
        "ray": sweep.config.ray,
        "verbose": sweep.config.verbose,
    }
    return make(GdbenchConfig, values)


@dataclass(frozen=True)
class StoredErrors:
    """What trials read, and how many forwards of the model it took to have it."""

    tables: dict[Key, Table]
    forwards: int

    @property
    def identity(self) -> list[Any]:
        """What the trials' results depend on beside their settings."""
        return [
            [*key, steps, [task.identity for task in tasks]]
            for key, (steps, tasks) in self.tables.items()
        ]

    def failures(self) -> list[dict[str, str]]:
        """Examples without a score, each once, whatever the kind of error."""
        kind = next(iter(self.tables))[3]
        return [
            {"model": key[0], "lora": key[1], "protocol": key[2], "task": errors.task.name,
             "example": example, "failure": reason}
            for key, (_, tasks) in self.tables.items() if key[3] == kind
            for errors in tasks for example, reason in errors.failures.items()
        ]  # fmt: skip


def score(sweep: Sweep, out: str) -> StoredErrors:
    """Score what the store lacks; the errors of every model, LoRA, protocol and kind of error."""
    from diffitm.distributed.tuner import identity

    protocols = values_of(sweep, sweep.fixed, "protocol")
    prepared = [gdbench.prepare(gdbench_config(sweep, protocol, out)) for protocol in protocols]
    open_sweep(out, identity(sweep))
    forwards = gdbench.score_all(prepared, out)
    tables: dict[Key, Table] = {}
    for protocol, ready in zip(protocols, prepared, strict=True):
        for spec, store in zip(ready.specs, ready.stores, strict=True):
            assert isinstance(spec, DiffusionSpec)
            model = storage.without_query(spec.source.name)
            lora = storage.without_query(spec.lora_name or "none")
            for error in values_of(sweep, sweep.fixed, "error"):
                tasks = [
                    read_errors(find_task(name)(), uri, store, error_of(store, error))
                    for name, uri in ready.files.items()
                ]
                tables[model, lora, protocol, error] = (
                    list(spec.timesteps),
                    [errors for errors in tasks if errors],
                )
    log.info("%s forwards were needed; all settings read the stored errors", f"{forwards:,}")
    return StoredErrors(tables, forwards)


def run(sweep: Sweep, out: str) -> Tried:
    """Try every setting on the stored errors."""
    from ray import tune

    from diffitm.commands.workers.score_trials import score_trial
    from diffitm.distributed import session
    from diffitm.distributed.tuner import Experiment

    stored = score(sweep, out)
    rows = Experiment(
        sweep=sweep,
        out=out,
        trainable=tune.with_parameters(score_trial, fixed=sweep.fixed, tables=stored.tables),
        cpus=1.0,
        parallel=sweep.config.parallel or session.fitting(1.0, 0.0),
        state=stored.identity,
    ).run()
    failures, where = stored.failures(), storage.join(out, "failures.json")
    storage.write_text(where, json.dumps({"failures": failures}, indent=2))
    text = "accuracy in %, mean of the tasks: of the half of the examples that chooses, measured on the other"
    text += f"; {stored.forwards:,} forwards were done for it"
    if not failures:
        return Tried(rows, text, "")
    return Tried(
        rows,
        f"{text}; {len(failures)} examples without a score are left out",
        f"{len(failures):,} examples have no score; they are listed in {where}",
    )
