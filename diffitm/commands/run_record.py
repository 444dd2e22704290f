"""What lies beside the scores and comes into the report: images, a training's log and picture, probes."""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any, NamedTuple

from diffitm.core import storage

log = logging.getLogger("diffitm")
LOG = "log.jsonl"


class RunArtifacts(NamedTuple):
    """What the report shows beside the scores, by model: generated images (folders below OUT), the log
    and the picture that a training left beside its result, results of probes (files below OUT)."""

    samples: dict[str, str]
    logs: dict[str, str]
    pictures: dict[str, str]
    probes: dict[str, list[str]]

    def noted(self) -> dict[str, dict[str, Any]]:
        """What run.json keeps: without keys of URIs."""
        uris = {"logs": self.logs, "pictures": self.pictures}
        public = {k: {n: storage.redacted(u) for n, u in v.items()} for k, v in uris.items()}
        return self._asdict() | public


def log_of(lora: str) -> str:
    """Where finetune.py leaves the log of a LoRA: beside it or, of last/, above."""
    folder = storage.parent(lora)
    above = storage.join(storage.parent(folder), LOG)
    return above if storage.name(folder) == "last" else storage.join(folder, LOG)


def read_pictures(beside: RunArtifacts) -> dict[str, bytes]:
    """Model -> the PNG that diva.py left beside it, where there is one."""
    found = {}
    for name, uri in beside.pictures.items():
        with contextlib.suppress(OSError):
            found[name] = storage.read_bytes(uri)
    return found


def read_images(out: str, beside: RunArtifacts) -> dict[str, dict[str, list[bytes]]]:
    """Model -> prompt -> PNGs."""
    from diffitm.commands.stages.sample import read_samples

    folders = {name: storage.join(out, folder) for name, folder in beside.samples.items()}
    return {name: read_samples(f) for name, f in folders.items() if storage.exists(f)}


def read_curves(beside: RunArtifacts) -> dict[str, list[dict[str, float]]]:
    """Model -> lines of its training's log, where there is one that a training wrote."""
    found = {}
    for name, uri in beside.logs.items():
        try:
            lines = [json.loads(line) for line in storage.read_text(uri).splitlines()]
            found[name] = [{"step": int(line["step"]), **line} for line in lines]
        except (OSError, ValueError, TypeError, KeyError):
            log.info("%s: no training curves, %s is not there or not ours", name, uri)
    return found
