"""What a tuning run leaves: weights, log, events, and the settings that a resume must have."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from diffitm.core import storage
from diffitm.core.errors import Incomplete, InputError
from diffitm.core.provenance import redact
from diffitm.training.tracking import write_events

# Files of a checkpoint.
WEIGHTS, AVERAGED, BEST, STATE, HISTORY = (
    "weights.safetensors",
    "averaged.safetensors",
    "best.safetensors",
    "state.pt",
    "history.json",
)
PICTURES = "pictures.png"
NOTE, FAILURES = "training.json", "failures.json"
CHECKPOINTS = "train"  # Ray Train's folder


@dataclass(frozen=True)
class RunState:
    """What OUT holds of a run: whether its result, and the name that trackers know it by."""

    done: bool
    key: str


def open_run(out: str, settings: dict[str, Any]) -> RunState:
    """Begin a run in OUT, or find the one that it holds.

    Raises InputError that names what differs if that is a run of other settings.
    """
    path = storage.join(out, NOTE)
    if not storage.exists(path):
        made = RunState(False, secrets.token_hex(6))
        write_note(out, settings, made)
        return made
    known = json.loads(storage.read_text(path))
    old = known["settings"]
    if old.get("pipeline") != settings.get("pipeline"):
        raise InputError(f"{out} holds a run of {old.get('pipeline')}: give another --out")
    # An option that a newer version has, and that is not given, is no other setting.
    if differ := [k for k in {**old, **settings} if old.get(k) != settings.get(k)]:
        told = ", ".join(f"{k} was {old.get(k)!r} and is {settings.get(k)!r}" for k in differ)
        raise InputError(f"{out} holds a run with other settings ({told}): give another --out")
    return RunState(bool(known["done"]), known["key"])


@contextmanager
def release_on_refusal(out: str) -> Iterator[None]:
    """A run that bad input ends before its first checkpoint leaves OUT to one of other settings."""
    try:
        yield
    except InputError:
        if not storage.files(storage.join(out, CHECKPOINTS), f"/{STATE}", recursive=True):
            storage.delete(storage.join(out, NOTE))
        raise


def write_note(out: str, settings: dict[str, Any], known: RunState, **more: Any) -> None:
    """training.json: what a resume must have in common with the run."""
    note = {"settings": settings, **asdict(known), **more}
    storage.write_text(storage.join(out, NOTE), json.dumps(note, indent=2))


def write_result(
    checkpoint: Path,
    save: Callable[[dict[str, Tensor], str], None],
    settings: dict[str, Any],
    known: RunState,
    provenance: dict[str, Any],
    lost: dict[str, int],
    out: str,
) -> dict[str, Any]:
    """Write what a last checkpoint says: the weights that the validation chose, else the last ones,
    log and events, provenance, unreadable images (path and reason -> how often). `save` writes weights to a
    folder. How far it came."""
    averaged = checkpoint / AVERAGED
    last = load_file(averaged if averaged.exists() else checkpoint / WEIGHTS)
    best = checkpoint / BEST
    save(load_file(best) if best.exists() else last, out)
    save(last, storage.join(out, "last"))
    progress = write_log(checkpoint, provenance, lost, out)
    write_note(out, settings, replace(known, done=True), best_step=progress["best_step"])
    return progress


def check_complete(out: str) -> None:
    """Raises Incomplete if the finished run in OUT could not use some of its images, texts or shards."""
    where = storage.join(out, FAILURES)
    if lost := json.loads(storage.read_text(where)):
        raise Incomplete(
            f"{len(lost):,} images, texts or shards could not be used; they are listed in {where}"
        )


def write_log(
    checkpoint: Path, provenance: dict[str, Any], lost: dict[str, int], out: str
) -> dict[str, Any]:
    """Log and events, provenance, unreadable images. How far the checkpoint came."""
    progress: dict[str, Any] = json.loads((checkpoint / HISTORY).read_text())
    lines = "".join(json.dumps(line) + "\n" for line in progress["history"])
    storage.write_text(storage.join(out, "log.jsonl"), lines)
    write_events(progress["history"], out)
    failures = redact(json.dumps(lost, indent=2))
    storage.write_text(storage.join(out, FAILURES), failures)
    storage.write_text(storage.join(out, "provenance.json"), json.dumps(provenance, indent=2))
    return progress
