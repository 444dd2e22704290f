"""Options of pipelines/diva.py."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from diffitm.core.config import lacking, option
from diffitm.core.errors import InputError, flag
from diffitm.training.diva.recap import FORMS, parse_recap
from diffitm.training.options import Shared, shared_problems, span

# What the published code does for every CLIP; what it does for each is in PRESETS.
PUBLISHED: dict[str, Any] = {
    "teacher": "stabilityai/stable-diffusion-2-1-base",
    "prompt": "a photo of a .",
    "batch_size": 16,
    "effective_batch": 640,
    "steps": 4600,
    "lr": 1e-4,
    "lr_schedule": "cosine",
    "warmup_steps": 23,
    "repeats": 2,
    "repeats_reduce": "published",
    "dtype": "bf16",
}


def _preset(clip: str, recap: str, add: str = "mean") -> dict[str, Any]:
    return PUBLISHED | {"clip": clip, "recap": recap, "add_prompt": add}


@dataclass(frozen=True)
class DivaConfig(Shared):
    """Options of pipelines/diva.py."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "shapes": {
            "clip": "shapes",
            "teacher": "shapes",
            "data": "shapes",
            "repeats": 1,
            "crop_scale": 1.0,
            "steps": 600,
            "optimizer": "adamw",
            "lr": 3e-4,
            "projection_lr": 3e-3,
            "projection_steps": 300,
            "warmup_steps": 10,
            "effective_batch": 32,
            "batch_size": 32,
        },
        "sds-shapes": {
            "objective": "sds-clip",
            "clip": "shapes",
            "teacher": "shapes",
            "data": "shapes",
            "steps": 300,
            "optimizer": "adamw",
            "lr": 1e-3,
            "warmup_steps": 10,
            "effective_batch": 64,
            "batch_size": 64,
        },
        "openai-224": _preset("ViT-L-14-quickgelu:openai", "random:0.3:replaced", "tokens"),
        "openai-336": _preset("ViT-L-14-336-quickgelu:openai", "random:0.132:replaced", "tokens"),
        "metaclip-l": _preset("ViT-L-14-quickgelu:metaclip_fullcc", "all"),
        "metaclip-h": _preset("ViT-H-14-quickgelu:metaclip_fullcc", "all"),
        "siglip-224": _preset("ViT-SO400M-14-SigLIP:webli", "pool:6"),
        "siglip-384": _preset("ViT-SO400M-14-SigLIP-384:webli", "pool:10"),
        "dfn-224": _preset("ViT-H-14-quickgelu:dfn5b", "all"),
        "dfn-378": _preset("ViT-H-14-378-quickgelu:dfn5b", "random:0.5:replaced"),
    }
    clip: str = option(
        "", "CLIP to tune: shapes, NAME:TAG, NAME:FILE or a folder, or their URIs, as gdbench takes"
    )
    teacher: str = option(
        "", "frozen diffusion model: shapes, a diffusers folder (or URI of one) or a Hub id"
    )
    data: str = option(
        "", "images: shapes, a folder, a table or .tar shards, or its URI: see docs/data.md"
    )
    out: str = option("out/diva", "folder or URI for the tuned CLIP, checkpoints and the log")
    preset: str | None = option(
        None, f"the shapes world's or published settings: {', '.join(PRESETS)}; options given win"
    )
    objective: Literal["diva", "sds-clip"] = option(
        "diva",
        "diva: the teacher is told of an image by CLIP's tokens; sds-clip: the contrastive loss of images "
        "with their captions, and the teacher's error for the image's embedding as its input",
    )
    lambda_: float = option(
        1e-3, "sds-clip: weight of the teacher's error beside the contrastive loss", at_least=0
    )
    jacobian: bool = option(
        True, "sds-clip: the gradient goes through the teacher's network, else past it"
    )
    control: bool = option(
        False, "sds-clip: train a second CLIP with --lambda 0, to OUT-control, and report both"
    )
    recap: str = option("random:0.3", f"patch tokens that the teacher sees: {FORMS}")
    prompt: str = option("", "text whose embedding meets the recap")
    add_prompt: Literal["mean", "tokens", "none"] = option(
        "mean", "its tokens' mean added to each of the recap, its tokens one to one, or not at all"
    )
    repeats: int = option(
        2, "draws of timestep, noise and patches for an image in a step", at_least=1
    )
    repeats_reduce: Literal["mean", "published"] = option(
        "mean", "their mean gradient, or the published code's, where the first counts five times"
    )
    crop_scale: float = option(0.9, "least share of an image in its random crop; 1 is the whole")
    max_images: int | None = option(
        None, "train on this many of the images, evenly spread", at_least=1
    )
    held_out: int = option(
        64, "images that the reconstruction error is measured on, not trained on", at_least=0
    )
    batch_size: int = option(
        16,
        "images of a micro-batch, at most; fewer where more workers than that have micro-batches",
        at_least=1,
    )
    optimizer: Literal["sgd", "adamw"] = option("sgd", "SGD with momentum 0.9, or AdamW")
    lr: float = option(1e-4, "learning rate", above=0)
    projection_lr: float | None = option(None, "that of the projection (default: --lr)", above=0)
    projection_steps: int = option(
        0,
        "updates at first that train the projection alone: CLIP learns from one that can be read",
        at_least=0,
    )
    lr_schedule: Literal["constant", "constant_with_warmup", "cosine", "linear"] = option(
        "cosine", "diffusers' schedules"
    )
    weight_decay: float = option(0.0, "of the optimizer", at_least=0)
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto", "auto: bf16 on a GPU, else fp32; the trained weights are float32"
    )
    cache_latents: bool = option(
        False, "encode images for the teacher once, beforehand; needs --crop-scale 1"
    )
    measure_every: int = option(
        100, "updates between reconstruction errors of held-out images", at_least=0
    )
    validate_every: int = option(
        100, "updates between accuracies on --validation-data; 0 for none", at_least=0
    )
    validation_data: str | None = option(
        None, "data root of the tasks whose accuracy is logged (it chooses nothing)"
    )
    validation_tasks: list[str] = option(
        [], "tasks of it (default: mmvp_vlm; of sds-clip winoground and ARO's four)"
    )
    validation_examples: int = option(300, "examples of each, evenly spread", at_least=1)


# What an objective does not take.
NOT_OF = {
    "diva": ("lambda_", "jacobian", "control"),
    "sds-clip": (
        *("recap", "prompt", "add_prompt", "repeats", "repeats_reduce", "crop_scale"),
        *("max_images", "held_out", "measure_every", "projection_steps", "cache_latents"),
    ),
}


def micro_batch(config: DivaConfig) -> int:
    """Images of a micro-batch: as many as --batch-size allows, as divide an update, and as leave the most
    workers one each."""
    _, workers = span(config.workers)
    most = min(config.batch_size, -(-config.effective_batch // workers))
    return next(n for n in range(most, 0, -1) if config.effective_batch % n == 0)


def find_problems(config: DivaConfig) -> list[str]:
    """What is wrong with the options, all of it."""
    examples = {"clip": "shapes", "teacher": "shapes", "data": "shapes"}
    found = lacking(config, examples)
    try:
        parse_recap(config.recap)
    except InputError as error:
        found.append(error.on_command_line())
    if config.steps is not None and config.projection_steps >= config.steps:
        found.append(
            f"--projection-steps {config.projection_steps}: leaves CLIP none of the {config.steps} updates"
        )
    if not 0 < config.crop_scale <= 1:
        found.append(f"--crop-scale {config.crop_scale:g}: must be above 0 and at most 1")
    elif config.objective == "diva" and config.cache_latents and config.crop_scale < 1:
        found.append("--cache-latents: latents of random crops cannot be kept; add --crop-scale 1")
    if config.steps is not None and config.epochs != 1:
        found.append(
            f"--epochs {config.epochs:g}: --steps {config.steps} decides; add --steps none for epochs"
        )
    return found + _of_the_other(config) + shared_problems(config)


def _of_the_other(config: DivaConfig) -> list[str]:
    """What is given that the objective does not take."""
    name = config.objective
    other = next(key for key in NOT_OF if key != name)
    found = [
        f"{flag(field.name)} {getattr(config, field.name)}: only {other} takes it, not {name}"
        for field in fields(config)
        if field.name in NOT_OF[name] and getattr(config, field.name) != field.default
    ]
    if config.control and config.lambda_ == 0:
        found.append("--control: is the run with --lambda 0 itself; give another --lambda")
    if name == "sds-clip" and config.effective_batch == 1:
        found.append("--effective-batch 1: sds-clip contrasts an update's examples, at least 2")
    return found
