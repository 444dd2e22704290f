"""What Ray Tune runs for a setting of a training: the pipeline, which tells its validations."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
from ray import tune

from diffitm.commands import diva, finetune
from diffitm.commands.run_record import LOG
from diffitm.core import storage
from diffitm.core.config import make
from diffitm.core.errors import Incomplete
from diffitm.core.provenance import fingerprint
from diffitm.distributed.monitor import Line
from diffitm.training.diva.options import DivaConfig
from diffitm.training.lora.options import FinetuneConfig


def trial_config(kind: str, fixed: dict[str, Any], setting: dict[str, Any], folder: str) -> Any:
    """The pipeline's config of a setting, with an OUT below the folder that the setting names.

    Raises InputError for values that do not fit.
    """
    values = {**fixed, **setting}
    density = values.pop("density", None)
    if density is not None:
        values["recap"] = {0: "class-only", 1: "all"}.get(density, f"random:{density}")
    values["out"] = storage.join(folder, fingerprint(setting)[:10])
    return make(FinetuneConfig if kind == "lambda" else DivaConfig, values)


class ValidationReporter:
    """Passes validations on to Tune: the mean accuracy of the tasks at each, but for the one at `end`,
    after which nothing is left to stop. `best`: a training's result is its best weights, so its value
    is the best accuracy so far, else the last one."""

    def __init__(self, best: bool, end: int) -> None:
        self.best, self.end, self.curve = best, end, list[tuple[int, float]]()

    def __call__(self, line: Line) -> None:
        if self.add(line) and self.last < self.end:
            tune.report(self.metrics())

    def add(self, line: Line) -> bool:
        """Whether a line of the log is a validation that was not known."""
        found = [value for key, value in line.items() if key.startswith("accuracy/")]
        new = bool(found) and (not self.curve or int(line["step"]) > self.last)
        if new:
            self.curve.append((int(line["step"]), float(np.mean(found))))
        return new

    @property
    def last(self) -> int:
        """The update of the last validation."""
        return self.curve[-1][0] if self.curve else 0

    def metrics(self, **more: Any) -> dict[str, Any]:
        """What a table needs of the training, as far as it is."""
        first, later = self.curve[0], [point for point in self.curve if point[0] > 0]
        chosen = max(later, key=lambda p: p[1]) if later and self.best else self.curve[-1]
        known = {"base": first[1]} if first[0] == 0 else {}
        told = {"step": self.last, "accuracy": chosen[1], "at_step": chosen[0]}
        return {**told, **known, "curve": [list(point) for point in self.curve], **more}


def train_trial(
    given: dict[str, Any], kind: str, fixed: dict[str, Any], folder: str, steps: int, own: bool
) -> None:
    """Train with a setting; one that was interrupted goes on, one that is complete is read. `steps`
    are those of a setting that does not say; `own`: a setting can come twice, so each trial has an
    OUT of its own."""
    config = trial_config(kind, fixed, given["setting"], folder)
    if own:
        trial = f"{storage.name(config.out)}-{tune.get_context().get_trial_id()}"
        config = replace(config, out=storage.join(folder, trial))
    told = ValidationReporter(kind == "lambda", config.steps or steps)
    unread = None
    try:
        (finetune.run if kind == "lambda" else diva.run)(config, told)
    except Incomplete as error:
        unread = str(error)
    lines = [json.loads(s) for s in storage.read_text(storage.join(config.out, LOG)).splitlines()]
    whole = ValidationReporter(told.best, told.end)
    for line in lines:
        whole.add(line)
    tune.report(whole.metrics(finished=True, folder=config.out, unread=unread))
