"""Options of pipelines/finetune.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from diffitm.core.config import lacking, option
from diffitm.core.errors import InputError, suggest
from diffitm.training.dpt.options import DPT, DptOptions, dpt_problems, unused_problems
from diffitm.training.dpt.options import PRESETS as DPT_PRESETS
from diffitm.training.lora.objectives import OBJECTIVES, Objective
from diffitm.training.options import Shared, shared_problems


@dataclass(frozen=True)
class FinetuneConfig(DptOptions, Shared):
    """Options of pipelines/finetune.py."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "diffusionitm": {
            "objective": "hard-neg",
            "negatives": "mixed",
            "clip_over": "microbatch",
            "batch_size": 4,
            "effective_batch": 112,
            "epochs": 8,
            "validate_every": 500,
            "validation_examples": 328,
        },
        "softneg-sd15": {
            "model": "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "objective": "soft-neg",
            "negatives": "hard-text",
            "batch_size": 4,
            "effective_batch": 112,
            "epochs": 8,
            "validate_every": 500,
            "validation_examples": 328,
        },
        **DPT_PRESETS,
    }
    model: str = option(
        "", "diffusion model: shapes, a diffusers folder (or URI of one) or a Hub id"
    )
    data: str = option(
        "",
        "shapes, a data root in COCO's layout, or rows: a table, a folder or .tar, see docs/data.md",
    )
    images: str | None = option(None, "where a file's image paths start (default: its own folder)")
    out: str = option("out/finetune", "folder or URI for weights, checkpoints and the log")
    preset: str | None = option(
        None,
        "published or planned settings: diffusionitm, softneg-sd15, dpt-probe, dpt-tune; options given win",
    )
    objective: str = option("hard-neg", f"one of {', '.join([*OBJECTIVES, DPT])}")
    lambda_: float = option(1.0, "bound of the wrong pair's error, in errors of the right pair")
    clip_over: Literal["example", "microbatch"] = option("example", "where the bound holds")
    guard: Literal["none", "clip", "frozen"] = option("none", "what holds soft-neg's empty text")
    preference: Literal["sigmoid", "hinge", "ipo"] | None = option(
        None, "dpo's loss (default: sigmoid)"
    )
    beta: float | None = option(None, "of dpo (default: 2500)", above=0)
    scale: float | None = option(None, "of softrepa's logits (default: 4)", above=0)
    temperature: float | None = option(
        None, "of softrepa's logits, in errors (default: 0.07)", above=0
    )
    diagonal: float | None = option(
        None,
        "softrepa's weight of the right pairs' error (default: 10, of flow models 0)",
        at_least=0,
    )
    negatives: Literal["hard-text", "random-text", "hard-image", "mixed"] = option(
        "mixed", "what wrong pairs are made of, where the objective has any"
    )
    draw_negatives: Literal["batch", "example"] = option(
        "batch", "whether the kind of a mixed negative is drawn for a micro-batch or an example"
    )
    batch_size: int = option(
        8, "examples of a micro-batch, one forward of right and wrong pairs", at_least=1
    )
    lr: float = option(1e-4, "learning rate of AdamW", above=0)
    lr_schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = option(
        "constant", "diffusers' schedules"
    )
    weight_decay: float = option(1e-2, "of AdamW", at_least=0)
    rank: int = option(4, "of the LoRA on every attention projection", at_least=1)
    ema: float | None = option(None, "decay of averaged weights, which are then the result")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on a GPU, else fp32"
    )
    cache_latents: bool = option(
        False, "encode images and texts once, beforehand, into Parquet below work/ beside OUT"
    )
    resize: Literal["squash", "crop"] = option("squash", "squash to a square, or crop the centre")
    validate_every: int = option(100, "updates between validations; 0 for none", at_least=0)
    validation_data: str | None = option(
        None, "data root with coco_neg (default: --data, if it has one)"
    )
    validation_examples: int = option(
        328, "examples of each validation task, evenly spread", at_least=1
    )
    validation_timesteps: int = option(4, "timesteps of a validation score", at_least=1)


def objective_of(config: FinetuneConfig) -> Objective:
    """The objective of errors. Raises InputError for settings that it does not take."""
    return Objective(
        config.objective,
        config.lambda_,
        config.clip_over,
        config.guard,
        config.preference,
        config.beta,
        config.scale,
        config.temperature,
        config.diagonal,
    )


def negatives_of(config: FinetuneConfig) -> str:
    """The kind of negatives (rows.NEGATIVES) that the objective takes."""
    if config.objective == DPT:
        return "all"
    return config.negatives if objective_of(config).has_wrong_pairs else "none"


def find_problems(config: FinetuneConfig) -> list[str]:
    """What is wrong with the options, all of it."""
    found = lacking(config, {"model": "shapes", "data": "shapes"})
    if config.objective == DPT:
        found += dpt_problems(config)
    else:
        found += unused_problems(config)
        try:
            _check_objective(config)
        except InputError as error:
            found.append(error.on_command_line())
    if config.ema is not None and not 0 < config.ema < 1:
        found.append(f"--ema {config.ema:g}: must lie between 0 and 1")
    if config.objective == "softrepa" and config.batch_size == 1:
        found.append("--batch-size 1: softrepa contrasts a micro-batch's examples, at least 2")
    if config.batch_size > 0 and config.effective_batch % config.batch_size:
        found.append(
            f"--effective-batch {config.effective_batch}: must be a multiple of --batch-size "
            f"{config.batch_size}, the examples of a micro-batch"
        )
    return found + shared_problems(config)


def _check_objective(config: FinetuneConfig) -> None:
    if config.objective not in OBJECTIVES:
        known = suggest(config.objective, [*OBJECTIVES, DPT])
        raise InputError(f"{config.objective!r} is unknown{known}", "objective")
    objective = objective_of(config)
    # --clip-over passes, as the published control without negatives is a run of that preset.
    if not objective.clipped and config.lambda_ != 1.0:
        raise InputError(f"{config.lambda_:g}: {objective.name} has no bound", "lambda")
