"""What a tuning run leaves: weights, log, events, and the settings that a resume must have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from diffitm import storage
from diffitm.errors import InputError
from diffitm.models.lora import save_lora
from diffitm.training.track import write_events

# Files of a checkpoint.
WEIGHTS, AVERAGED, BEST, STATE, HISTORY = (
    "weights.safetensors",
    "averaged.safetensors",
    "best.safetensors",
    "state.pt",
    "history.json",
)
NOTE = "finetune.json"


def is_complete(out: str, settings: dict[str, Any]) -> bool:
    """Whether OUT holds the result of this run.

    Raises InputError that names what differs if OUT belongs to a run of other settings.
    """
    path = storage.join(out, NOTE)
    if not storage.exists(path):
        storage.write_text(path, json.dumps({"settings": settings, "done": False}, indent=2))
        return False
    known = json.loads(storage.read_text(path))
    old = known["settings"]
    if old != settings:
        differ = [k for k in settings if old.get(k) != settings[k]]
        told = ", ".join(f"{k} was {old.get(k)!r} and is {settings[k]!r}" for k in differ)
        raise InputError(f"{out} holds a run with other settings ({told}): give another --out")
    return bool(known["done"])


def write_result(
    checkpoint: Path,
    rank: int,
    settings: dict[str, Any],
    provenance: dict[str, Any],
    lost: dict[str, int],
    out: str,
) -> dict[str, Any]:
    """Write what a last checkpoint says: the weights that the validation chose, else the last ones,
    log and events, provenance, unreadable images (path and reason -> how often). How far it came."""
    averaged = checkpoint / AVERAGED
    last = load_file(averaged if averaged.exists() else checkpoint / WEIGHTS)
    best = checkpoint / BEST
    save_lora(load_file(best) if best.exists() else last, out, rank)
    save_lora(last, storage.join(out, "last"), rank)
    progress: dict[str, Any] = json.loads((checkpoint / HISTORY).read_text())
    lines = "".join(json.dumps(line) + "\n" for line in progress["history"])
    storage.write_text(storage.join(out, "log.jsonl"), lines)
    write_events(progress["history"], out)
    storage.write_text(storage.join(out, "failures.json"), json.dumps(lost, indent=2))
    storage.write_text(storage.join(out, "provenance.json"), json.dumps(provenance, indent=2))
    done = {"settings": settings, "done": True, "best_step": progress["best_step"]}
    storage.write_text(storage.join(out, NOTE), json.dumps(done, indent=2))
    return progress
