"""A diffusion model, and the LoRAs for it, opened and checked against each other without their weights in
memory: before anything is scored, and on the driver."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn

from diffitm.core.errors import InputError
from diffitm.models.hub_weights import check_variant, needed
from diffitm.models.latent_diffusion import check_network, check_vae, check_width
from diffitm.models.loading import FAMILIES, ModelSource, files_of, on_machine
from diffitm.models.lora import match_lora, naming, read_lora
from diffitm.models.parts import (
    check_settings,
    read_json,
    read_schedule,
    read_tokenizer,
    schedule_defaults,
    strange_scheduler,
    tokenizer_defaults,
)
from diffitm.models.weight_files import Shapes, check_whole, few, read_shapes

log = logging.getLogger("diffitm")
ENDINGS = (".safetensors", ".bin")
SCHEDULE = "scheduler/scheduler_config.json"
# What of a part's settings no shape of a tensor shows, so that a wrong default would go unseen.
_OF_TEXT = ("hidden_act", "num_attention_heads")
UNSEEN = {
    "unet": ("attention_head_dim",),
    "vae": ("scaling_factor",),
    "transformer": ("attention_head_dim",),
    "text_encoder": _OF_TEXT,
    "text_encoder_2": _OF_TEXT,
}
ALWAYS_UPCAST = "StableDiffusionXLPipeline"  # its stores need not say so
# What files hold beyond their configs that changes nothing: buffers of older versions, and what a whole CLIP
# has beside its text model.
LITTER = (
    r"(^|\.)position_ids$",
    r"^pos_embed\.pos_embed$",
    r"^(vision_model|visual_projection)\.",
    r"^(logit_scale|text_projection\.weight)$",
)
# Attention of older VAEs, which diffusers renames.
OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def check_loadable(
    source: ModelSource, loras: Sequence[str] = (), variant: str | None = None
) -> None:
    """What can be told of a model without its weights in memory: whether its files are whole, its tensors
    those of its configs, its parts of one model, and whether LoRA files fit it. Logs what its configs
    do not say.

    Raises InputError that names the file.
    """
    location, revision = on_machine(source)
    if revision is not None:  # of the Hub, and not here
        return
    try:
        parts = _check_parts(Path(location), FAMILIES[source.family].parts, variant)
        _tell_defaults(source, Path(location), parts)
    except InputError as error:
        raise InputError(f"{source.name!r}: {error.message}", source.field) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{source.name!r}: {text}", source.field) from error
    if "unet" in parts:
        encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        for lora in loras:
            tensors = read_lora(lora)[0]
            with naming(lora):
                match_lora(parts["unet"], tensors, encoders)
    elif loras:
        raise InputError(
            f"{source.name!r} takes no LoRA, only Stable Diffusion's U-Net does", "lora"
        )


def settled(source: ModelSource, prediction: str | None = None) -> ModelSource:
    """The source with what of its folder, whose weights are on this machine, a score depends on beside
    them: whether its VAE stays in float32, and what its network predicts, where `prediction` is given and
    is not what the folder says; that is logged. Raises InputError."""
    location, revision = on_machine(source)
    try:
        source = replace(source, upcast=_is_upcast(source, location, revision))
        if prediction is None:
            return source
        there = read_schedule(location, revision).config.prediction_type
    except (OSError, ValueError) as error:
        raise InputError(f"{source.name!r}: {error}", source.field) from error
    if there == prediction:
        return source
    text = "%s: its output is read as %s, not as the %s that its scheduler gives"
    log.info(text, source.name, prediction, there)
    return replace(source, prediction=prediction)


def _is_upcast(source: ModelSource, location: str, revision: str | None) -> bool:
    file = Path(location, "vae", "config.json")
    if revision is not None or not file.is_file() or source.family == ALWAYS_UPCAST:
        return False
    return bool(read_json(file).get("force_upcast"))


def _check_parts(folder: Path, names: tuple[str, ...], variant: str | None) -> dict[str, nn.Module]:
    """The parts without weights, by name, once their files are found to be theirs."""
    files = files_of(folder)
    check_variant(files, names, variant)
    check_settings(folder, names)
    parts: dict[str, nn.Module] = {}
    for name in names:
        weights = [folder / n for n in needed(files, (name,), variant) if n.endswith(ENDINGS)]
        if (part := _empty(folder, name)) is not None:
            parts[name] = part
            if name == "vae":
                check_vae(cast("Any", part).config)
            _check_shapes(part, name, weights)
        else:
            for file in weights:
                check_whole(file)
    _check_together(folder, names, parts)
    return parts


def _makers() -> dict[str, Callable[[Any], nn.Module]]:
    """A part's name -> what makes it of its settings."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(kind: Any) -> Callable[[Any], nn.Module]:
        return lambda settings: kind(CLIPTextConfig.from_dict(of_text(settings)))

    return {
        "unet": UNet2DConditionModel.from_config,
        "vae": AutoencoderKL.from_config,
        "transformer": DiTTransformer2DModel.from_config,
        "text_encoder": text(CLIPTextModel),
        "text_encoder_2": text(CLIPTextModelWithProjection),
    }


def _empty(folder: Path, name: str) -> nn.Module | None:
    """A part without memory for its weights; None of what has none."""
    make = _makers().get(name)
    if make is None:
        return None
    with torch.device("meta"):
        return make(read_json(folder / name / "config.json"))


def _check_shapes(part: nn.Module, name: str, files: Sequence[Path]) -> None:
    found: Shapes = {}
    for file in files:
        found |= {_plain(key): shape for key, shape in read_shapes(file).items()}
    expected = {_plain(key): tuple(value.shape) for key, value in part.state_dict().items()}
    missing = [key for key in expected if key not in found and not key.endswith("position_ids")]
    other = [
        f"{key} {list(found[key])} instead of {list(expected[key])}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    litter = re.compile("|".join(LITTER))
    strange = [key for key in found if key not in expected and not litter.search(key)]
    if missing or other or strange:  # libraries load the rest and say nothing of strange ones
        found_wrong = (f"{len(other)} have another shape: {few(other)}" if other else "",
                       f"{len(missing)} are missing: {few(missing)}" if missing else "",
                       f"{len(strange)} more are in the file: {few(strange)}" if strange else "")  # fmt: skip
        raise OSError(
            f"the weights of its {name} ({few([str(file) for file in files])}) are not those of its "
            f"config.json: of {len(expected)} tensors {'; '.join(filter(None, found_wrong))}"
        )


def _plain(key: str) -> str:
    """A tensor's name as all versions of the libraries have it."""
    key = key.removeprefix("text_model.")
    for old, new in OLDER.items():
        key = key.replace(old, new)
    return key


def _check_together(folder: Path, names: tuple[str, ...], parts: Mapping[str, nn.Module]) -> None:
    """Whether the parts are of one model."""
    widths = 0
    for name in names:
        if name.startswith("tokenizer"):
            encoder = _encoder_settings(folder, name)
            read_tokenizer(str(folder), name, None, encoder)
            widths += int(encoder["hidden_size"])
    if "unet" in parts and widths:
        check_width(parts["unet"], widths)
    network: Any = parts.get("unet") or parts.get("transformer")
    vae: Any = parts.get("vae")
    if network is not None and vae is not None:
        check_network(network.config, vae.config.latent_channels)
    if "scheduler" in names:
        read_schedule(str(folder), None)


def of_text(settings: dict[str, Any]) -> dict[str, Any]:
    """A text encoder's settings, also where the config is that of a whole CLIP."""
    return dict(settings.get("text_config") or settings)


def _encoder_settings(folder: Path, tokenizer: str) -> dict[str, Any]:
    from transformers import CLIPTextConfig

    name = tokenizer.replace("tokenizer", "text_encoder")
    settings = of_text(read_json(folder / name / "config.json"))
    return dict(CLIPTextConfig.from_dict(settings).to_dict())


def _tell_defaults(source: ModelSource, folder: Path, parts: Mapping[str, nn.Module]) -> None:
    """Log what the folder does not say, and what is taken."""
    names = FAMILIES[source.family].parts
    for name, part in parts.items():
        settings, config = read_json(folder / name / "config.json"), cast("Any", part).config
        lacking = [key for key in UNSEEN.get(name, ()) if key not in settings]
        if lacking:
            values = ", ".join(f"{key} {getattr(config, key)}" for key in lacking)
            text = "%s: %s/config.json does not say all, so there is taken: %s"
            log.warning(text, source.name, name, values)
    if "scheduler" in names:
        if (kind := strange_scheduler(read_json(folder / SCHEDULE))) is not None:
            text = "%s: its scheduler %s is not known here; DDPM's schedule of its betas is taken"
            log.warning(text, source.name, kind)
        taken = schedule_defaults(read_json(folder / SCHEDULE))
        if source.prediction is not None:
            taken.pop("prediction_type", None)
        if taken:
            values = ", ".join(f"{key} {value}" for key, value in taken.items())
            option = " (--prediction-type gives another)" if "prediction_type" in taken else ""
            text = "%s: its scheduler_config.json does not say all, so there is taken: %s%s"
            log.warning(text, source.name, values, option)
    for name in names:
        if name.startswith("tokenizer"):
            for line in tokenizer_defaults(folder, name, _encoder_settings(folder, name)):
                log.warning("%s: %s", source.name, line)
