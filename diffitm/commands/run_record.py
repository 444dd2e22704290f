"""What a run reports on, as run.json keeps it: examples, stores, and what lies beside the scores."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.evaluation.cut_texts import CutTexts
from diffitm.report.matrix import Generated
from diffitm.store.score_store import Store, read_store

log = logging.getLogger("diffitm")
LOG = "log.jsonl"
RUN = "run.json"


class RunArtifacts(NamedTuple):
    """What the report shows beside the scores, by model: generated images (folders below OUT), the log
    and the picture that a training left beside its result, results of probes (files below OUT)."""

    samples: dict[str, str]
    logs: dict[str, str]
    pictures: dict[str, str]
    probes: dict[str, list[str]]

    def noted(self) -> dict[str, dict[str, Any]]:
        """What run.json keeps."""
        return self._asdict()


@dataclass(frozen=True)
class RunRecord:
    """What a report is made of: the examples' files by task, the stores, the data root (`drawn`: it is
    the shapes world), texts that models cut, and which of the tasks are pictures that models made."""

    out: str
    examples: dict[str, str]
    stores: list[Store]
    root: str
    drawn: bool
    artifacts: RunArtifacts
    provenance: dict[str, Any]
    cut_texts: tuple[CutTexts, ...] = ()
    generated: tuple[Generated, ...] = ()

    def write(self) -> None:
        """What --report-only needs to find; from here on it reports on this run."""
        note = {
            "examples": {task: storage.name(uri) for task, uri in self.examples.items()},
            "stores": [store.name for store in self.stores],
            # Below OUT it moves with OUT.
            "root": storage.below(self.root, self.out),
            "drawn": self.drawn,
            **self.artifacts.noted(),
            "cut_texts": [asdict(part) for part in self.cut_texts],
            "generated": [asdict(part) for part in self.generated],
            "provenance": self.provenance,
        }
        storage.write_text(storage.join(self.out, RUN), json.dumps(note, indent=2))


def read_record(out: str) -> RunRecord:
    """The record of the last run at OUT. Raises InputError where there is none."""
    path = storage.join(out, RUN)
    try:
        note = json.loads(storage.read_text(path))
    except FileNotFoundError:
        raise InputError(f"--report-only: {out} holds no run; give the --out of one") from None
    except (OSError, ValueError) as error:
        raise InputError(f"--report-only: {path} cannot be read: {error}") from error
    root = note["root"]
    below = "://" not in root and not root.startswith("/")
    return RunRecord(
        out=out,
        examples={
            task: storage.join(out, "examples", name) for task, name in note["examples"].items()
        },
        stores=[read_store(storage.join(out, "scores", name)) for name in note["stores"]],
        root=storage.join(out, root) if below else root,
        drawn=note["drawn"],
        artifacts=RunArtifacts(*(note.get(name, {}) for name in RunArtifacts._fields)),
        provenance=note["provenance"],
        cut_texts=tuple(CutTexts(**part) for part in note.get("cut_texts", [])),
        generated=tuple(Generated(**part) for part in note.get("generated", [])),
    )


def log_of(lora: str) -> str:
    """Where finetune.py leaves the log of a LoRA: beside it or, of last/, above."""
    folder = storage.parent(lora)
    above = storage.join(storage.parent(folder), LOG)
    return above if storage.name(folder) == "last" else storage.join(folder, LOG)


def read_pictures(artifacts: RunArtifacts) -> dict[str, bytes]:
    """Model -> the PNG that diva.py left beside it, where there is one."""
    pictures = {}
    for name, uri in artifacts.pictures.items():
        with contextlib.suppress(OSError):
            pictures[name] = storage.read_bytes(uri)
    return pictures


def read_images(record: RunRecord) -> dict[str, dict[str, list[bytes]]]:
    """Model -> prompt -> PNGs."""
    from diffitm.commands.stages.sample import read_samples

    samples = record.artifacts.samples
    folders = {name: storage.join(record.out, folder) for name, folder in samples.items()}
    found = {name: read_samples(f) for name, f in folders.items() if storage.exists(f)}
    for made in record.generated:
        for prompt, paths in made.shown.items():
            with contextlib.suppress(OSError):
                images = [storage.read_bytes(storage.join(record.root, path)) for path in paths]
                found.setdefault(made.model, {})[prompt] = images
    return found


def read_curves(artifacts: RunArtifacts) -> dict[str, list[dict[str, float]]]:
    """Model -> lines of its training's log, where there is one that a training wrote."""
    curves = {}
    for name, uri in artifacts.logs.items():
        try:
            lines = [json.loads(line) for line in storage.read_text(uri).splitlines()]
            curves[name] = [{"step": int(line["step"]), **line} for line in lines]
        except (OSError, ValueError, TypeError, KeyError):
            log.info("%s: no training curves, %s is not there or not ours", name, uri)
    return curves
