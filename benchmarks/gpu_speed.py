"""How fast one GPU scores with Stable Diffusion 2.1-base and SDXL.

    python -m benchmarks.gpu_speed --out out/speed

Random weights at the published sizes (benchmarks/published.py): what they score means nothing, what it
costs does. Models are saved, loaded and called as diffitm does; beside the rates stands how fast the card
multiplies matrices in the same precision. Every line is written as it is measured, and what does not fit
into `--minutes` is left out by name. Needs torch, torchvision, diffusers, transformers, safetensors,
pyarrow and fsspec, but no Ray, no network and no data; `--tiny` tries it on a processor.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.published import MODELS, Model, Part, count_flops
from diffitm.models.embedded import SHAPES
from diffitm.models.loading import DTYPES, load_denoiser, resolve
from diffitm.scoring.batching import Batch
from diffitm.scoring.compiled import CompiledPredict
from diffitm.scoring.noise_plan import make_plan
from diffitm.scoring.pair_errors import error_batches

SIDE, TINY_SIDE = 8192, 256  # of the matrices that are multiplied
IMAGES, TEXTS, ROUNDS = 4, 64, 3
COMPILING = 150.0  # seconds that must be left for it
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
WORDS = 49408
Report = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model, the batch sizes of its forwards, and the one that all else is compared at."""

    name: str
    model: Model
    batches: tuple[int, ...]
    usual: int

    @property
    def pipeline(self) -> str:
        """The class that a folder names."""
        xl = len(self.model.parts) > 3
        return "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"


CASES = (
    Case("SD 2.1-base", MODELS["SD 2.1-base"], (8, 16, 32, 64, 128), 64),
    Case("SDXL-base", MODELS["SDXL-base"], (4, 8, 16, 32), 16),
)


@dataclass(frozen=True)
class Line:
    """A rate: items a second, the computing that is, and its share of the matrix product's."""

    model: str
    dtype: str
    what: str
    batch: int
    rate: float
    tflops: float
    share: float
    gigabytes: float | None = None
    note: str = ""


def tiny(case: Case) -> Case:
    """The same kinds of parts, small."""
    unet, vae, *encoders = case.model.parts
    xl = len(encoders) > 1
    width = 32 * len(encoders)
    added: dict[str, Any] = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 32,
        }
        if xl
        else {}
    )
    network = partial(
        UNet2DConditionModel,
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=width,
        norm_num_groups=8,
        **added,
    )

    def forward(module: Any) -> object:
        told = {"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(1, 6)} if xl else None
        hidden = torch.zeros(1, 77, width)
        return module(torch.zeros(1, 4, 8, 8), torch.zeros(1), hidden, added_cond_kwargs=told)

    def encode(module: Any) -> object:
        return module.encode(torch.zeros(1, 3, 32, 32))

    sides = dict(block_out_channels=(8, 16, 16), norm_num_groups=8, latent_channels=4)
    blocks = dict(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3
    )
    config = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
    )
    kinds = (CLIPTextModel, CLIPTextModelWithProjection)
    parts = (
        replace(unet, make=network, call=forward),
        replace(vae, make=partial(AutoencoderKL, **sides, **blocks), call=encode),  # type: ignore[arg-type]
        *(replace(e, make=partial(kind, config)) for e, kind in zip(encoders, kinds, strict=False)),
    )
    return replace(case, model=replace(case.model, parts=parts), batches=(2, 4), usual=4)


def write_model(folder: Path, case: Case, device: str) -> None:
    """The model as a diffusers folder of random weights in fp16."""
    names = ["unet", "vae", "text_encoder", "text_encoder_2"]
    index: Report = {"_class_name": case.pipeline, "_diffusers_version": "0.0"}
    for name, part in zip(names, case.model.parts, strict=False):
        with torch.device(device):
            module: Any = part.make()
        module.half().save_pretrained(folder / name, safe_serialization=True)
        index[name] = [type(module).__module__.partition(".")[0], type(module).__name__]
        if name.startswith("text_encoder"):
            write_tokenizer(folder / name.replace("text_encoder", "tokenizer"))
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    betas: Report = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    DDIMScheduler(**betas).save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    if case.pipeline == "StableDiffusionPipeline":  # its VAE needs no float32, SDXL's does
        config = folder / "vae" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))


def write_tokenizer(folder: Path) -> None:
    """The embedded model's, with as many words as a CLIP's and texts as long."""
    there = SHAPES / "diffusion" / "tokenizer"
    folder.mkdir()
    words = list(json.loads((there / "vocab.json").read_text()))
    marks = [word for word in words if word.startswith("<|")]
    words = [word for word in words if word not in marks]
    words += [f"<{number}>" for number in range(WORDS - len(words) - len(marks))] + marks
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    shutil.copy(there / "merges.txt", folder)
    settings = json.loads((there / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


class Stand:
    """A loaded model on which rates are measured."""

    def __init__(self, case: Case, dtype: str, model: Any, flops: Report, matmul: float) -> None:
        self.case, self.dtype, self.model, self.flops = case, dtype, model, flops
        self.matmul, self.device = matmul, str(model.device)
        generator = torch.Generator().manual_seed(0)
        self.latents = torch.randn(IMAGES, *model.latent_shape, generator=generator).to(self.device)
        self.condition = model.encode_texts([f"a red circle {i}" for i in range(8)])
        self.plan = make_plan(list(range(10, 990, 100)), model.latent_shape)
        self.plan = replace(self.plan, noise=self.plan.noise.to(self.device))

    def line(self, what: str, item: str, batch: int, rate: float, note: str = "") -> Line:
        """The line of a rate of items."""
        tflops = rate * self.flops[item] / 1e12
        used = torch.cuda.max_memory_allocated() / 2**30 if self.device != "cpu" else None
        share = tflops / self.matmul
        return Line(self.case.name, self.dtype, what, batch, rate, tflops, share, used, note)

    def forwards(self, what: str, size: int, compiled: bool = False) -> Line:
        """Errors of pairs, two batches of them at a time, as an actor makes them."""
        batch, causes = Batch(size), list[str]()
        predict = CompiledPredict(self.model, batch) if compiled else None
        if predict:
            predict.tell = causes.append
        items = torch.tensor([[i % IMAGES, i % 8, i % 10] for i in range(2 * size)])

        def score() -> None:
            list(
                error_batches(
                    self.model, self.latents, self.condition, self.plan, items, batch, predict
                )
            )

        first = clock(score, self.device)
        seconds = statistics.median(clock(score, self.device) for _ in range(ROUNDS))
        note = f"not compiled: {causes[0]}" if causes else f"first call {first:.0f} s"
        note = f"only {batch.size} fit" if batch.size < size else note if compiled else ""
        return self.line(what, "forwards", size, len(items) / seconds, note)

    def bare(self, size: int) -> Line:
        """The network alone on the same inputs again and again."""
        rows = torch.arange(size) % 8
        condition = {k: v[rows.to(v.device)] for k, v in self.condition.items()}
        noised = self.latents[rows.to(self.device) % IMAGES]
        steps = torch.full((size,), 500, device=self.device)

        @torch.inference_mode()
        def call() -> None:
            for _ in range(2):
                self.model.predict(noised, steps, condition)

        call()
        seconds = statistics.median(clock(call, self.device) for _ in range(ROUNDS))
        return self.line("the network alone", "forwards", size, 2 * size / seconds)

    def encode_images(self) -> Line:
        """The VAE, in the precision that its config asks for."""
        side = self.model.resolution
        call = partial(self.model.encode_images, torch.rand(IMAGES, 3, side, side) * 2 - 1)
        call()
        seconds = statistics.median(clock(call, self.device) for _ in range(ROUNDS))
        kind = {v: k for k, v in DTYPES.items()}[self.model.vae.dtype]
        return self.line(f"VAE, encode, in {kind}", "images", IMAGES, IMAGES / seconds)

    def encode_texts(self) -> Line:
        call = partial(self.model.encode_texts, [f"a red circle {i}" for i in range(TEXTS)])
        call()
        seconds = statistics.median(clock(call, self.device) for _ in range(ROUNDS))
        return self.line("text encoders", "texts", TEXTS, TEXTS / seconds)

    def lie(self, layout: torch.memory_format) -> None:
        """Put the network's weights so in memory."""
        self.model.network.to(memory_format=layout)

    def jobs(self) -> Iterator[tuple[str, float, Callable[[], Line]]]:
        """What is measured, in the order of its worth: a name, and the seconds that must be left for it."""
        usual = self.case.usual
        yield "VAE", 5, self.encode_images
        yield "text encoders", 5, self.encode_texts
        for name, layout in LAYOUTS.items():
            self.lie(layout)
            yield f"{name}, {usual}", 10, partial(self.forwards, f"forwards, {name}", usual)
        yield "network alone", 10, partial(self.bare, usual)
        name = "forwards, channels last, compiled"
        yield f"{name}, {usual}", COMPILING, partial(self.forwards, name, usual, compiled=True)
        for size in self.case.batches:
            if size != usual:
                name = "forwards, channels last"
                yield f"{name}, {size}", 10, partial(self.forwards, name, size)


def clock(call: Callable[[], object], device: str) -> float:
    """Seconds of a call."""
    if device != "cpu":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def matmul_rate(dtype: str, device: str) -> float:
    """TFLOP/s of one large product, the median of ten."""
    side = TINY_SIDE if device == "cpu" else SIDE
    a = torch.randn(side, side, device=device, dtype=DTYPES[dtype])
    for _ in range(3):
        a @ a
    seconds = statistics.median(clock(lambda: a @ a, device) for _ in range(10))
    return 2 * side**3 / seconds / 1e12


def flops_of(model: Model) -> Report:
    """FLOPs of one forward, image and text."""
    found: Report = {}
    for part in model.parts:
        found[part.item] = found.get(part.item, 0) + count_flops(empty(part), part.call)
    return found


def empty(part: Part) -> nn.Module:
    with torch.device("meta"):
        return part.make().eval()


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


def measure(
    cases: Sequence[Case],
    dtypes: Sequence[str],
    device: str,
    end: float,
    keep: Callable[[Report], None],
) -> Report:
    """All rates for which there is time until `end` of the monotonic clock; `keep` is given the report with
    each of them."""
    report: Report = {"machine": describe_machine(), "lines": [], "left out": []}
    report["matmul TFLOP/s"] = {dtype: matmul_rate(dtype, device) for dtype in dtypes}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            for case in cases:
                path = Path(folder, case.name)
                if not path.exists():
                    write_model(path, case, device)
                if device != "cpu":
                    torch.cuda.empty_cache()
                model = load_denoiser(resolve(str(path)), dtype, device)
                rate = report["matmul TFLOP/s"][dtype]
                stand = Stand(case, dtype, model, flops_of(case.model), rate)
                for name, needed, job in stand.jobs():
                    if end - time.monotonic() < needed:
                        report["left out"].append(f"{case.name}, {dtype}: {name}")
                        continue
                    if device != "cpu":
                        torch.cuda.reset_peak_memory_stats()
                    report["lines"].append(asdict(job()))
                    keep(report)
                del stand, model
    return report


def show(report: Report) -> str:
    """The report in Markdown."""
    machine = report["machine"]
    rates = ", ".join(f"{v:,.3g} in {k}" for k, v in report["matmul TFLOP/s"].items())
    lines = [
        f"{machine['card'] or 'a processor'}, torch {machine['torch']}, {machine['date']}; "
        f"a matrix product does {rates} TFLOP/s",
        "",
        "| model | precision | what | batch | a second | TFLOP/s | of the product's | GB | |",
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for line in (Line(**line) for line in report["lines"]):
        gigabytes = "-" if line.gigabytes is None else f"{line.gigabytes:.1f}"
        lines.append(
            f"| {line.model} | {line.dtype} | {line.what} | {line.batch} | {line.rate:,.1f} | "
            f"{line.tflops:,.3g} | {line.share:.0%} | {gigabytes} | {line.note} |"
        )
    if report["left out"]:
        lines += ["", f"No time was left for: {'; '.join(report['left out'])}"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/speed"))
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing is begun after them")
    parser.add_argument("--tiny", action="store_true", help="small models, on the processor")
    given = parser.parse_args()
    if not given.tiny and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --tiny tries the script without one")
    given.out.mkdir(parents=True, exist_ok=True)

    def keep(report: Report) -> None:
        (given.out / "speed.json").write_text(json.dumps(report, indent=1))
        (given.out / "speed.md").write_text(f"{show(report)}\n")
        print(json.dumps(report["lines"][-1:]), flush=True)

    cases = [tiny(case) for case in CASES] if given.tiny else CASES
    end = time.monotonic() + 60 * given.minutes
    report = measure(cases, ("fp16", "bf16"), "cpu" if given.tiny else "cuda", end, keep)
    keep(report)
    print(show(report))


if __name__ == "__main__":
    main()
