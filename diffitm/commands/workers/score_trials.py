"""What Ray Tune runs for a setting of the score: stored errors alone, without torch."""

from __future__ import annotations

from typing import Any

from ray import tune

from diffitm.core import storage
from diffitm.sweep.score_settings import Key, Table, measure


def score_trial(config: dict[str, Any], fixed: dict[str, Any], tables: dict[Key, Table]) -> None:
    """Tell what a setting reaches."""
    values = {**fixed, **config["setting"]}
    names = storage.without_query(values["model"]), storage.without_query(values["lora"])
    timesteps, errors = tables[*names, values["protocol"], values["error"]]
    found = measure(errors, timesteps, values["number"], values["range"], values["weighting"])
    tune.report({**found, "finished": True})
