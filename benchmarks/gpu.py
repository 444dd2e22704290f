"""diffitm on a machine with one NVIDIA GPU, in one call: python -m benchmarks.gpu --out out/gpu

The GPU tests; gdbench on the shapes world through Ray in three precisions, its decisions beside those of
the processor in fp32; a few updates of finetune and diva in each; and how fast a Stable Diffusion
2.1-base of random weights is scored (what it scores means nothing). Each part has its own clock, and
one that fails does not keep the next from running. `--numbers` runs it all on the processor, with a
Ray whose GPUs are numbers and a small model, to try the script itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("fp32", "fp16", "bf16")
TASKS = ("winoground", "clevr", "flickr30k", "flickr30k_text", "mmvp_vlm")
SCENES, TIMESTEPS = 60, 10
NEAR = 1e-3  # of the larger score: decisions closer than that are near-ties
BATCHES = (8, 16, 32, 64, 128)
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


def write_stable_diffusion(folder: Path, small: bool) -> None:
    """A Stable Diffusion 2.1-base of random weights in fp16; `small` one for the processor."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from diffitm.models.loading import SHAPES

    scale, width = (10, 64) if small else (1, 1024)
    device = "cpu" if small else "cuda"
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=64 // (4 if small else 1),
            block_out_channels=tuple(c // scale for c in (320, 640, 1280, 1280)),
            attention_head_dim=(1, 1, 2, 2) if small else (5, 10, 20, 20),
            cross_attention_dim=width,
            use_linear_projection=True,
            norm_num_groups=8 if small else 32,
        )
        vae = AutoencoderKL(
            sample_size=512 // (4 if small else 1),
            block_out_channels=tuple(c // scale // 4 * 4 for c in (128, 256, 512, 512)),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4 if small else 32,
        )
        sizes = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=16)
        layers = 2 if small else 23
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, num_hidden_layers=layers, **sizes))
    for part, model in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        model.half().save_pretrained(folder / part, safe_serialization=True)
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    DDIMScheduler(**betas, prediction_type="epsilon").save_pretrained(folder / "scheduler")
    tokenizer = SHAPES / "diffusion" / "tokenizer"
    (folder / "tokenizer").mkdir()
    for file in tokenizer.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.0"}
    (folder / "model_index.json").write_text(json.dumps(index))


def measure_throughput(out: Path, numbers: bool) -> Report:
    """Forwards a second of the U-Net by precision and batch size, images and texts a second, beside the
    rate at which the card multiplies matrices."""
    from diffitm.models.loading import load_denoiser, resolve

    device = "cpu" if numbers else "cuda"
    write_stable_diffusion(out / "model", numbers)
    source, found = resolve(str(out / "model")), Report()
    for dtype in PRECISIONS:
        sizes = BATCHES[:1] if numbers else BATCHES
        found[dtype] = measure_model(load_denoiser(source, dtype, device), sizes, device)
        if not numbers:
            found[dtype]["GB"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
    return found | {"matmul TFLOP/s": {d: matmul_rate(d, device) for d in PRECISIONS}}


def measure_model(model: Any, sizes: Sequence[int], device: str) -> Report:
    """Forwards a second at each batch size, as long as they fit; images and texts a second."""
    from diffitm.scoring.batching import Batch
    from diffitm.scoring.noise_plan import make_plan
    from diffitm.scoring.pair_errors import pair_errors

    line, few = Report(), device == "cpu"
    latents = torch.randn(4, *model.latent_shape, device=device)
    condition = model.encode_texts([f"text {i}" for i in range(8)])
    plan = make_plan(list(range(10, 990, 100)), model.latent_shape)
    pairs = torch.tensor([(i, t) for i in range(4) for t in range(8)])[: 2 if few else None]
    for size in sizes:
        batch = Batch(size)
        score = partial(pair_errors, model, latents, condition, plan, pairs, batch)
        score()
        line[f"forwards/s at {size}"] = len(pairs) * len(plan) / clock(score, device, 1)
        if batch.size < size:
            break
    pixels = torch.rand(4, 3, model.resolution, model.resolution) * 2 - 1
    model.encode_images(pixels)
    seconds = clock(partial(model.encode_images, pixels), device, 1 if few else 5)
    line["images/s"] = len(pixels) / seconds
    texts = [f"text {i}" for i in range(64)]
    line["texts/s"] = len(texts) / clock(partial(model.encode_texts, texts), device, 2)
    return line


def clock(call: Callable[[], object], device: str, times: int) -> float:
    """Seconds of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / times


def matmul_rate(dtype: str, device: str) -> float:
    """TFLOP/s of one large product."""
    side = 256 if device == "cpu" else 8192
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    a = torch.randn(side, side, device=device, dtype=kind)
    a @ a
    return 2 * side**3 / clock(lambda: a @ a, device, 10) / 1e12


def describe_machine() -> Report:
    has_gpu = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if has_gpu else None,
        "memory GB": torch.cuda.get_device_properties(0).total_memory / 2**30 if has_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


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
    parser.add_argument("--numbers", action="store_true", help="GPUs are numbers; a small model")
    given = parser.parse_args()
    if not given.numbers and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --numbers tries the script without one")
    given.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Callable[[], Report]] = {
        "throughput": lambda: measure_throughput(given.out, given.numbers),
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
