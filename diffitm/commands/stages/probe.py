"""Evaluations of CLIPs that are no image-text pairs: each one a task of Ray, its result a file below OUT."""

from __future__ import annotations

import importlib.util
import itertools
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffitm.core import storage
from diffitm.core.errors import InputError
from diffitm.core.provenance import fingerprint
from diffitm.evaluation.evaluate import Comparison, Evaluation, ResultRow
from diffitm.models.weight_cache import content_digest

if TYPE_CHECKING:
    from diffitm.distributed.session import ActorPool
    from diffitm.models.clip import ClipSource
    from diffitm.probes.mllm import Measured

log = logging.getLogger("diffitm")
FOLDER, VERSION = "probes", 1
SCORE = "probe"  # of the rows
WORKERS = 2  # processes that decode images of clip-benchmark


@dataclass(frozen=True)
class Probe:
    """What is measured: 'segmentation' on a folder, 'clip-benchmark' on a data set below a root, or
    'mllm' by a function of the user's. `state` is what changes when files behind it do."""

    kind: str
    target: str
    root: str = ""
    state: str | None = None

    @property
    def task(self) -> str:
        """The name in tables."""
        return self.kind if self.kind == "segmentation" else f"{self.kind}: {self.target}"

    def file(self, clip: ClipSource) -> str:
        """Below OUT, by everything that the result depends on."""
        from diffitm.models.clip import preprocessing

        settings = {**asdict(self), "clip": clip.digest, "version": VERSION, **preprocessing(clip)}
        return f"{FOLDER}/{self.kind}-{fingerprint(settings)[:12]}.json"


def find_probes(
    segmentation: str | None,
    scenes: int,
    benchmarks: Sequence[str],
    root: str,
    mllm: str | None,
    out: str,
) -> list[Probe]:
    """What CLIPs are measured on beside image-text pairs; draws the scenes of 'shapes'.

    Raises InputError for a folder, function or package that is not there.
    """
    found = []
    if segmentation is not None:
        folder = storage.absolute(segmentation)
        if segmentation == "shapes":
            from diffitm.shapes.masks import VERSION, write_masks

            folder = storage.join(out, f"shapes-masks-{scenes}-v{VERSION}")
            write_masks(folder, scenes)
        from diffitm.probes.labelled import read_split

        try:
            files = [file for split in ("train", "val") for file in read_split(folder, split)]
        except InputError as error:
            wants = "it wants train/ and val/, each with images/ and masks/"
            raise InputError(f"--segmentation {segmentation}: {error}; {wants}") from None
        stamp = storage.stamp(folder, [name for pair in files for name in pair])
        found.append(Probe("segmentation", folder, state=stamp))
    root = storage.absolute(root)
    if benchmarks:
        from diffitm.probes.benchmark import INSTALL, PACKAGE

        if importlib.util.find_spec(PACKAGE) is None:
            raise InputError(f"--clip-benchmark needs its package: {INSTALL}")
    found += [Probe("clip-benchmark", name, root) for name in dict.fromkeys(benchmarks)]
    if mllm is not None:
        from diffitm.probes.mllm import find_hook

        find_hook(mllm)
        place = mllm.rpartition(":")[0]
        spec = None if place.endswith(".py") else importlib.util.find_spec(place)
        file = Path((spec and spec.origin) or place).expanduser()
        digest = content_digest([file]) if file.is_file() else None
        found.append(Probe("mllm", mllm, state=digest))
    return found


def probe(probes: Sequence[Probe], clip: ClipSource, out: str, pool: ActorPool) -> list[str]:
    """Measure what OUT does not hold yet; the files of all results.

    Raises InputError for what a probe finds wrong; results before that are kept.
    """
    from diffitm.distributed import session

    files = []
    for wanted in probes:
        file = storage.join(out, wanted.file(clip))
        if not storage.exists(file):
            log.info("%s: %s", clip.name, wanted.task)
            found = session.ask(pool.cpus, pool.gpus, measure, wanted, clip, pool.device)
            storage.write_text(file, json.dumps(found, indent=1))
        files.append(wanted.file(clip))
    return files


def measure(wanted: Probe, clip: ClipSource, device: str) -> dict[str, Any]:
    """On a worker: figures (metric -> value, low, high), and what paired tests need."""
    from diffitm.models.clip import load_clip

    loaded = load_clip(clip, device)
    made: dict[str, Any] = {"task": wanted.task, "raw": wanted.kind == "mllm", "segmentation": None}
    if wanted.kind == "segmentation":
        from diffitm.probes.segmentation import evaluate, interval

        result = evaluate(loaded.model, clip.name, wanted.target, device)
        figures: dict[str, Measured] = {"mIoU": (result.miou, *interval(result))}
        figures |= {"pixel accuracy": (result.accuracy, None, None)}
        made |= {"segmentation": result.to_json(), "n": result.images}
    elif wanted.kind == "clip-benchmark":
        from diffitm.probes.benchmark import benchmark

        found = benchmark(loaded, wanted.target, wanted.root, device, workers=WORKERS)
        figures = {name: (value, None, None) for name, value in found.items()}
    else:
        from diffitm.models.clip_export import write_transformers
        from diffitm.probes.mllm import find_hook, run_hook

        with tempfile.TemporaryDirectory() as folder:
            if reason := write_transformers(loaded.model, clip, folder):
                raise InputError(f"--mllm: {clip.name} has no form in transformers: {reason}")
            figures = run_hook(find_hook(wanted.target), clip.name, folder)
    return made | {"figures": figures}


def add_probes(evaluation: Evaluation, out: str, files: dict[str, list[str]]) -> None:
    """Add rows of all models (title -> files below OUT), and paired tests of segmentation."""
    kept = []
    for model, names in files.items():
        for name in names:
            found = json.loads(storage.read_text(storage.join(out, name)))
            for metric, (value, low, high) in found["figures"].items():
                shared = {"group": "all", "n": found.get("n", 0), "chance": None}
                figures = {"metric": metric, "value": value, "low": low, "high": high}
                figures["unit"] = "number" if found["raw"] else "share"
                task = {"model": model, "task": found["task"], "score": SCORE, "protocol": SCORE}
                evaluation.rows.append(ResultRow(**shared, **figures, **task))
            if found["segmentation"] is not None:
                kept.append((model, found["task"], found["segmentation"]))
    for one, two in itertools.combinations(kept, 2):
        evaluation.comparisons.append(_compare(one, two))


def _compare(one: tuple[str, str, Any], two: tuple[str, str, Any]) -> Comparison:
    from diffitm.probes.segmentation import SegmentationResult, paired

    first, second = (SegmentationResult.from_json(found[2]) for found in (one, two))
    difference, low, high, p = paired(first, second)
    return Comparison(
        task=one[1],
        metric="mIoU",
        first=one[0],
        first_score=SCORE,
        second=two[0],
        second_score=SCORE,
        difference=difference,
        low=low,
        high=high,
        p=p,
        test="bootstrap of images",
        n=first.images,
    )
