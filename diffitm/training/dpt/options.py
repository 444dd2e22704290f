"""Options of pipelines/finetune.py that are DPT's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from diffitm.core.config import option
from diffitm.core.errors import InputError, flag
from diffitm.models.dpt_file import find_adapter

DPT = "dpt"  # the objective
# Of Qu et al. 2024, as their code has them.
_SHARED: dict[str, Any] = {
    "model": "stabilityai/stable-diffusion-2-1-base",
    "objective": DPT,
    "lr": 1e-4,
    "weight_decay": 1e-2,
    "clip_norm": 1.0,
    "seed": 1337,
    "validate_every": 1000,
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


def unused_problems(config: Any) -> list[str]:
    """What is given of these options, where the objective is another."""
    return [
        f"{flag(field.name)} is of --objective dpt"
        for field in fields(DptOptions)
        if getattr(config, field.name) != field.default
    ]


def dpt_problems(config: Any) -> list[str]:
    """What is wrong with these options, where the objective is DPT."""
    plain = {field.name: field.default for field in fields(config)}
    problems = [
        f"{flag(name)} {getattr(config, name)}: dpt has no use for it"
        for name in OTHERS
        if getattr(config, name) != plain[name]
    ]
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
    return problems
