"""Settings through Ray Tune: grid, random and Optuna search, ASHA, restore, progress."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune
from ray.tune.execution.class_cache import ENV_VARS_TO_PROPAGATE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from diffitm.core import storage
from diffitm.core.config import ON_RAY
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint, redact
from diffitm.distributed.progress import clock
from diffitm.distributed.trainer import NOT_SETTINGS
from diffitm.sweep.options import Sweep
from diffitm.sweep.result import TrialResult
from diffitm.sweep.space import Axis, describe, draw, grid

log = logging.getLogger("diffitm")
METRIC = "accuracy"
RETRIES = 3  # of a trial whose node is lost
VERSION = 2  # grows when Tune's bookkeeping, which pickles our classes, cannot be read any more
HEAD = {"node:__internal_head__": 0.0001}
# Scores do not depend on these options.
NOT_SCORES = {"actors", "max_actors", "cpus_per_actor", "gpus_per_actor", "batch_size", "store"}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Trials of a sweep, `parallel` of them at a time, each with so many processors.

    Trials without processors stay on the head node, which outlives the others. `state` is what the
    trials read beside their settings: with another one all are run again. Another `parallel` begins
    Tune's bookkeeping anew; trainings that are complete are found by their OUT.
    """

    sweep: Sweep
    out: str
    trainable: Any
    cpus: float
    parallel: int
    stopper: Any = None
    state: Sequence[Any] = ()

    def run(self) -> list[TrialResult]:
        """Run all settings that are not done; a sweep that was interrupted goes on. A line a setting.

        Raises InputError where Tune's own state is cut off.
        """
        _quiet()
        axes = "; ".join(map(str, self.sweep.axes)) or "no option"
        log.info("%d settings of %s, %d at a time", self.total, axes, self.parallel)
        rows = [_row(result) for result in self._tuner().fit()]
        if len(rows) < self.total:
            raise InputError(
                f"{self.place[1]}: its state is cut off, {len(rows)} of {self.total}; delete it, run again"
            )
        return rows

    @property
    def is_optuna(self) -> bool:
        """Whether Optuna proposes the settings, or they stand beforehand."""
        return self.sweep.config.search == "optuna"

    @functools.cached_property
    def settings(self) -> list[dict[str, Any]]:
        """Those that stand beforehand."""
        return [] if self.is_optuna else _settings(self.sweep)

    @property
    def total(self) -> int:
        """How many trials."""
        return self.sweep.config.samples if self.is_optuna else len(self.settings)

    @functools.cached_property
    def name(self) -> str:
        """Of Tune's bookkeeping."""
        content = [VERSION, *identity(self.sweep).values(), self.sweep.config.parallel, *self.state]
        return fingerprint(content)[:12]

    @functools.cached_property
    def place(self) -> tuple[Any, str]:
        """The file system and the folder of Tune's bookkeeping."""
        filesystem, folder = storage.filesystem(storage.join(self.out, "tune"))
        filesystem.create_dir(folder, recursive=True)
        return filesystem, f"{folder}/{self.name}"

    def _tuner(self) -> tune.Tuner:
        """A new one, or the one that goes on."""
        axes = {axis.name: _domain(axis) for axis in self.sweep.axes} if self.is_optuna else None
        space = {"setting": axes or tune.grid_search(self.settings)}
        trainable = tune.with_resources(self.trainable, {"CPU": self.cpus} if self.cpus else HEAD)
        filesystem, folder = self.place
        files = storage.files(storage.join(self.out, "tune", self.name))
        begun = any("experiment_state-" in path for path in files)
        if begun and tune.Tuner.can_restore(folder, storage_filesystem=filesystem):
            log.info("going on with the sweep in %s", self.out)
            return tune.Tuner.restore(
                folder,
                trainable,
                resume_unfinished=True,
                # Optuna knows a trial by its id, which a restarted one has not.
                resume_errored=self.is_optuna,
                restart_errored=not self.is_optuna,
                storage_filesystem=filesystem,
                param_space=space,
            )
        return tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                search_alg=_search(self.sweep, self.parallel),
                scheduler=self.stopper or FIFOScheduler(),
                num_samples=self.total if self.is_optuna else 1,
                max_concurrent_trials=self.parallel if self.is_optuna else None,
                reuse_actors=self.sweep.kind.name == "timesteps",
            ),
            run_config=tune.RunConfig(
                name=self.name,
                storage_path=folder.rpartition("/")[0],
                storage_filesystem=filesystem,
                # A training has Ray Train's retries, and its driver ends with the head alone.
                failure_config=tune.FailureConfig(max_failures=RETRIES if self.cpus else 0),
                callbacks=[_Progress(self.sweep.axes, self.total)],
                verbose=0,
            ),
        )


def _quiet() -> None:
    """Settings of Tune that it reads from the environment alone."""
    # Its loggers and its banner: the table and the log tell the same.
    os.environ |= {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_AIR_NEW_OUTPUT": "0"}
    # Its handler of SIGINT would go on to the table of a sweep that is cut off.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Tune would hand keys to the trials as an option of Ray, which Ray's logs show in clear.
    ENV_VARS_TO_PROPAGATE.difference_update({n for n in ENV_VARS_TO_PROPAGATE if "AWS" in n})


def identity(sweep: Sweep) -> dict[str, Any]:
    """What the results of a sweep depend on, as JSON has it."""
    apart = {"out", "parallel", *ON_RAY, *NOT_SETTINGS, *NOT_SCORES}
    searched = {k: v for k, v in asdict(sweep.config).items() if k not in apart}
    options = {k: v for k, v in sweep.fixed.items() if k not in apart}
    axes = [str(axis) for axis in sweep.axes]
    told = {"sweep": sweep.kind.name, "axes": axes, **searched, "options": options}
    return json.loads(json.dumps(told))


def _settings(sweep: Sweep) -> list[dict[str, Any]]:
    config = sweep.config
    if config.search == "grid":
        return list(grid(sweep.axes))
    found = draw(sweep.axes, config.samples, config.search_seed)
    if len(found) < config.samples:
        log.info("there are %d settings, not samples=%d", len(found), config.samples)
    return found


def stopper(sweep: Sweep, steps: int, every: int) -> ASHAScheduler | None:
    """ASHA over updates, with rungs from the first validations on; None if it is switched off."""
    config = sweep.config
    if not config.early_stopping or every <= 0:
        return None
    grace = min(steps, every * config.grace)
    return ASHAScheduler(
        time_attr="step", max_t=steps + 1, grace_period=grace, reduction_factor=config.reduction
    )


def _domain(axis: Axis) -> Any:
    if axis.how == "randint":
        return tune.randint(int(axis.low), int(axis.high) + 1)
    if axis.how:
        return getattr(tune, axis.how)(axis.low, axis.high)
    return tune.choice(list(axis.values))


def _search(sweep: Sweep, parallel: int) -> Any:
    """Raises InputError if Optuna is asked for and not installed."""
    seed = sweep.config.search_seed
    if sweep.config.search != "optuna":
        return BasicVariantGenerator(max_concurrent=parallel)
    try:
        import optuna
    except ImportError:
        raise InputError("search=optuna: is not installed; pip install 'diffitm[optuna]'") from None
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return OptunaSearch(metric=METRIC, mode="max", sampler=optuna.samplers.TPESampler(seed=seed))


class _Progress(tune.Callback):
    """Lines of the log, with the time left."""

    def __init__(self, axes: tuple[Axis, ...], total: int) -> None:
        self.axes, self.total = axes, total

    def setup(self, **info: Any) -> None:
        """See tune.Callback: a run begins, or goes on."""
        self.first, self.ended = time.monotonic(), set[str]()

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: Any, **info: Any
    ) -> None:
        """See tune.Callback."""
        if "step" in result and not result.get("finished"):
            what = describe(trial.config["setting"], self.axes)
            log.info("%s: update %d, accuracy %.1f%%", what, result["step"], 100 * result[METRIC])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """See tune.Callback."""
        self._end(trials, trial, f"accuracy {100 * trial.last_result[METRIC]:.1f}%")

    def on_trial_recover(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """See tune.Callback."""
        why = _cause(trial.get_error() or "its node is lost")
        log.warning("%s: tried again after: %s", describe(trial.config["setting"], self.axes), why)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        """See tune.Callback."""
        self._end(trials, trial, "failed")

    def _end(self, trials: Any, trial: Any, what: str) -> None:
        self.ended.add(trial.trial_id)
        over = {t.trial_id for t in trials if t.status in ("TERMINATED", "ERROR")} | self.ended
        each = (time.monotonic() - self.first) / len(self.ended)
        left = each * (self.total - len(over))
        ending = f", about {clock(left)} left" if len(over) < self.total else ""
        text = "%s: %s (%d of %d done%s)"
        setting = describe(trial.config["setting"], self.axes)
        log.info(text, setting, what, len(over), self.total, ending)


def _row(result: Any) -> TrialResult:
    """A setting's line; a failure says why."""
    metrics = result.metrics or {}
    failure = redact(_cause(result.error)) if result.error is not None else None
    kept = {} if failure else {k: metrics.get(k) for k in TrialResult.MEASURED}
    return TrialResult(
        setting=dict(result.config["setting"]),
        state="failed" if failure else "done" if metrics.get("finished") else "stopped early",
        failure=failure,
        seconds=float(metrics.get("time_total_s", 0.0)),
        **kept,
    )


def _cause(error: Any) -> str:
    """The line of an error that says what happened: the first of one that a user is meant to read, else
    the last."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, InputError):
        return cause.on_command_line().strip().splitlines()[0]
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1].strip()
