"""Options of pipelines/finetune.py that are DPT's."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from diffitm.core.config import option
from diffitm.core.errors import InputError, flag
from diffitm.models.dpt_file import find_adapter

DPT = "dpt"  # the objective
SHAPES = "shapes"  # drawn data
# Of Qu et al. 2024, as their code has them.
_SHARED: dict[str, Any] = {
    "model": "stabilityai/stable-diffusion-2-1-base",
    "objective": DPT,
    "lr": 1e-4,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
    "seed": 1337,
    "validate_every": 1000,
    "grounding_weights": [1.0, 5.0, 2.0, 1.0],
}
PRESETS: dict[str, dict[str, Any]] = {
    "dpt-probe": _SHARED
    | {"stage": "probe", "batch_size": 48, "effective_batch": 48, "steps": 60_000},
    "dpt-tune": _SHARED
    | {
        "stage": "tune",
        "batch_size": 8,
        "effective_batch": 64,
        "steps": 5000,
        "lr_schedule": "cosine",
        "rank": 4,
    },
}
# Options of the objectives of errors, which DPT has no use for.
OTHERS = (
    *("lambda_", "clip_over", "guard", "negatives", "draw_negatives", "validation_timesteps"),
    *("preference", "beta", "scale", "temperature", "diagonal"),
)


@dataclass(frozen=True)
class DptOptions:
    """Options of --objective dpt."""

    stage: Literal["probe", "tune"] = option(
        "probe", "of dpt: its adapter alone, or a LoRA and the adapter of a probe"
    )
    adapter: str | None = option(
        None, "of --stage tune: what the probe left, a file or a folder or its URI"
    )
    feature_map: str = option(
        "up1", "of --stage probe: which block of the U-Net dpt reads: bottom0 .., mid, up0 .."
    )
    train_adapter: bool = option(True, "whether --stage tune trains the adapter beside the LoRA")
    grounding: str | None = option(
        None,
        "MDETR's annotations, a file or its URI: dpt learns boxes, too; shapes with --data shapes",
    )
    grounding_images: str | None = option(
        None, "where file names of annotations start, below the images (default: there)"
    )
    grounding_validation: str | None = option(
        None, "MDETR's annotations of other images, whose boxes are measured at validations"
    )
    grounding_weights: list[float] = option(
        [1.0, 5.0, 2.0, 1.0], "of the losses of boxes: classes, L1, GIoU, alignment"
    )


def unused_problems(config: Any) -> list[str]:
    """What is given of these options, where the objective is another."""
    plain = DptOptions()
    return [
        f"{flag(field.name)} is of --objective dpt"
        for field in fields(DptOptions)
        if getattr(config, field.name) != getattr(plain, field.name)
    ]


def dpt_problems(config: Any) -> list[str]:
    """What is wrong with these options, where the objective is DPT."""
    plain = {field.name: field.default for field in fields(config)}
    problems = [
        f"{flag(name)} {getattr(config, name)}: dpt has no use for it"
        for name in OTHERS
        if getattr(config, name) != plain[name]
    ]
    problems += _grounding_problems(config)
    if config.stage == "probe":
        of_tune = {
            "adapter": config.adapter is not None,
            "train_adapter": not config.train_adapter,
            "rank": config.rank != plain["rank"],
        }
        problems += [f"{flag(name)} is of --stage tune" for name, given in of_tune.items() if given]
        return problems
    if config.feature_map != plain["feature_map"]:
        problems.append(f"--feature-map {config.feature_map}: --stage tune has the adapter's")
    if config.adapter is None:
        return [*problems, "--stage tune begins with a probe's adapter: give its OUT as --adapter"]
    try:
        found = find_adapter(config.adapter, "adapter")
    except InputError as error:
        return [*problems, error.on_command_line()]
    if found.lora_digest is not None:
        text = f"--adapter {config.adapter}: was tuned with a LoRA already; give a probe's"
        problems.append(text)
    if config.grounding is not None and not found.shape.grounding:
        text = f"--grounding {config.grounding}: the probe of --adapter {config.adapter} learned no boxes"
        problems.append(f"{text}; give one that was trained with --grounding, or leave it out")
    return problems


def _grounding_problems(config: Any) -> list[str]:
    plain, problems = DptOptions(), list[str]()
    names = ("grounding_images", "grounding_validation", "grounding_weights")
    given = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if config.grounding is None:
        return [f"{flag(name)} is of --grounding" for name in given]
    if config.grounding == SHAPES != config.data:
        problems.append(f"--grounding {SHAPES} is of --data {SHAPES}: give a file of annotations")
    if config.grounding == SHAPES:
        drawn = [name for name in given if name != "grounding_weights"]
        problems += [f"{flag(name)}: --grounding {SHAPES} has its own" for name in drawn]
    if config.grounding_validation is not None and not config.validate_every:
        text = f"--grounding-validation {config.grounding_validation}: --validate-every 0 measures none"
        problems.append(text)
    weights = config.grounding_weights
    if len(weights) != 4 or not all(0 <= weight < math.inf for weight in weights):
        told = " ".join(f"{weight:g}" for weight in weights)
        text = "must be four numbers of at least 0: classes, L1, GIoU, alignment"
        problems.append(f"--grounding-weights {told}: {text}")
    return problems
