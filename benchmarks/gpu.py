"""diffitm on a machine with one NVIDIA GPU, in one call: python -m benchmarks.gpu --out out/gpu

The GPU tests; gdbench on the shapes world through Ray in three precisions, its decisions beside those of
the processor in fp32; a few updates of finetune and diva in each. Each part has its own clock, and one
that fails does not keep the next from running. `--numbers` runs it all on the processor, with a Ray whose
GPUs are numbers, to try the script itself. How fast models of published sizes are, gpu_speed.py measures.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_speed import describe_machine

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "fp16", "bf16")
TASKS = ("winoground", "clevr", "flickr30k", "flickr30k_text", "mmvp_vlm")
SCENES, TIMESTEPS = 60, 10
NEAR = 1e-3  # of the larger score: decisions closer than that are near-ties
Report = dict[str, Any]


def run_tests(numbers: bool) -> Report:
    """pytest's count of the tests that are marked gpu."""
    call = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 5):
        raise RuntimeError(done.stdout[-3000:])
    return {"last line": done.stdout.strip().splitlines()[-1]}


def pipeline(script: str, numbers: bool, *options: object) -> float:
    """Seconds that a pipeline takes; raises RuntimeError with its log where it fails."""
    call = [sys.executable, "-m", "benchmarks.numbers"] if numbers else [sys.executable]
    begin = time.monotonic()
    done = subprocess.run(
        [*call, str(ROOT / "pipelines" / f"{script}.py"), *map(str, options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode:
        raise RuntimeError(f"{script}.py exits with {done.returncode}\n{done.stderr[-3000:]}")
    return time.monotonic() - begin


def compare_decisions(out: Path, numbers: bool) -> Report:
    """gdbench on the processor in fp32, then on the GPU in each precision: how many decisions differ,
    and how many of those were near-ties."""
    scenes, steps = (10, 2) if numbers else (SCENES, TIMESTEPS)
    shared = ["--model", "shapes", "--data", "shapes", "--scenes", scenes, "--timesteps", steps]
    shared += ["--tasks", *TASKS]
    seconds = {}
    name = "processor fp32"
    cpu = ["--gpus-per-actor", 0, "--dtype", "fp32", "--out", out / "cpu"]
    seconds[name] = pipeline("gdbench", numbers, *shared, *cpu)
    reference = read_scores(out / "cpu")
    found = {}
    for dtype in PRECISIONS:
        where = out / dtype
        seconds[dtype] = pipeline("gdbench", numbers, *shared, "--dtype", dtype, "--out", where)
        found[dtype] = count_differences(reference, read_scores(where))
    summary = json.loads((out / "fp16" / "summary.json").read_text())["total"]
    return {"seconds": seconds, "decisions": found, "summary fp16": summary}


def read_scores(out: Path) -> dict[tuple[str, str, str], np.ndarray]:
    """(task, example, kind of score) -> scores [images, texts] of the run's one model."""
    from diffitm.store.join import read_scored
    from diffitm.store.score_store import read_store

    run = json.loads((out / "run.json").read_text())
    store = read_store(str(out / "scores" / run["stores"][0]))
    return {
        (task, scored.example.id, kind): values
        for task, name in run["examples"].items()
        for scored in read_scored(str(out / "examples" / name), store, "l2")
        for kind, values in scored.scores().items()
    }


def count_differences(
    reference: dict[tuple[str, str, str], np.ndarray], other: dict[tuple[str, str, str], np.ndarray]
) -> Report:
    """Decisions (the best text of each image, the best image of each text) that differ."""
    if reference.keys() != other.keys():
        raise RuntimeError("the two runs did not score the same examples")
    total = differ = near = 0
    for key, (one, two) in ((k, (reference[k], other[k])) for k in reference):
        for axis in (axis for axis in (0, 1) if one.shape[axis] > 1):
            total += one.shape[1 - axis]
            for a, b in zip(np.moveaxis(one, axis, -1), np.moveaxis(two, axis, -1), strict=True):
                if a.argmax() != b.argmax():
                    differ += 1
                    best = np.sort(a)[-2:]
                    near += bool(best[1] - best[0] <= NEAR * np.abs(best).max())
        assert np.isfinite(two).all(), key
    return {"decisions": total, "differ": differ, "of them near-ties": near}


def train(out: Path, numbers: bool) -> Report:
    """Seconds of a few updates of each tuning in each precision; the losses are finite, or it fails."""
    found = {}
    precisions = PRECISIONS[:1] if numbers else PRECISIONS
    for script, dtype in itertools.product(("finetune", "diva"), precisions):
        where = out / f"{script}-{dtype}"
        options: list[object] = ["--data", "shapes", "--scenes", 40, "--steps", 4, "--log-every", 1]
        options += ["--dtype", dtype, "--effective-batch", 8, "--batch-size", 8, "--out", where]
        options += ["--validate-every", 0]
        if script == "finetune":
            options += ["--model", "shapes"]
        else:
            options += ["--clip", "shapes", "--teacher", "shapes", "--measure-every", 0]
        seconds = pipeline(script, numbers, *options)
        lines = [json.loads(line) for line in (where / "log.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if "loss" in line]
        if len(losses) != 4 or not np.isfinite(losses).all():
            raise RuntimeError(f"{script} {dtype}: losses {losses}")
        found[f"{script} {dtype}"] = {"seconds": seconds, "losses": losses}
    return found


def show(report: Report) -> str:
    """The report as a Markdown table: a line a figure."""
    lines = ["| part | what | figure |", "|---|---|---|"]

    def add(part: str, what: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(part, f"{what} {key}".strip(), inner)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            lines.append(f"| {part} | {what} | {text.splitlines()[-1] if text else text} |")

    for part, value in report.items():
        add(part, "", value)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--numbers", action="store_true", help="GPUs are numbers")
    given = parser.parse_args()
    if not given.numbers and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --numbers tries the script without one")
    given.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Report]] = {
        "gdbench": lambda: compare_decisions(given.out, given.numbers),
        "training": lambda: train(given.out, given.numbers),
        "tests": lambda: run_tests(given.numbers),
    }
    report: Report = {"machine": describe_machine() | {"numbers": given.numbers}}
    failed = False
    for name, part in parts.items():
        begin = time.monotonic()
        try:
            report[name] = part()
        except Exception:
            report[name], failed = {"failed": traceback.format_exc()}, True
        report[name]["seconds in all"] = time.monotonic() - begin
        (given.out / "gpu.json").write_text(json.dumps(report, indent=1))
        print(f"{name}: {report[name]['seconds in all']:.0f} s", flush=True)
    table = show(report)
    (given.out / "gpu.md").write_text(f"{table}\n")
    print(table)
    sys.exit(failed)


if __name__ == "__main__":
    main()
