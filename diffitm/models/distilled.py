"""Distilled models: what is known of them by their names and settings."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

log = logging.getLogger("diffitm")
NAMED = re.compile(r"turbo|schnell|lightning|hyper-sd|\blcm\b", re.I)
# SD-Turbo and SDXL-Turbo (Sauer et al. 2023), and the timesteps that they were trained at.
TURBO = re.compile(r"\bsd(xl)?[-_]turbo", re.I)
TURBO_STEPS = (999, 749, 499, 249)


def why_no_unconditional(name: str, settings: Mapping[str, Any]) -> str | None:
    """Why the error of no text is no unconditional one, as far as a model's name and what its stores say
    (Family.told) tell; None where they do not."""
    if not settings.get("unconditional", True):
        return "is distilled and was not trained without a text"
    if NAMED.search(name):
        return "is named as step-distilled ones are, which are trained at few timesteps and without guidance"
    return None


def tell_untrained(name: str, timesteps: Sequence[float]) -> None:
    """Log how many of the timesteps a model of this name was not trained at, as far as its name tells."""
    others = [step for step in timesteps if step not in TURBO_STEPS]
    if TURBO.search(name) and others:
        log.warning(
            "%s is named as the turbo models are, which were trained at timesteps %s alone: %s of these %s "
            "are others, such as %g (--timestep-list %s)",
            name, ", ".join(map(str, TURBO_STEPS)), len(others), len(timesteps), others[0],
            " ".join(map(str, TURBO_STEPS)),
        )  # fmt: skip
