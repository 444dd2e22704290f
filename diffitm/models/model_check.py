"""A diffusion model, and the LoRAs for it, opened and checked against each other without their weights in
memory: before anything is scored, and on the driver."""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from diffitm.core import registry
from diffitm.core.errors import InputError
from diffitm.models.denoiser import Denoiser
from diffitm.models.distilled import why_no_unconditional
from diffitm.models.families import FAMILIES
from diffitm.models.flow import GUIDANCE
from diffitm.models.hub_weights import WITHOUT_WEIGHTS, check_variant, needed
from diffitm.models.loading import ModelSource, files_of, on_machine
from diffitm.models.lora import match_lora, naming, read_lora
from diffitm.models.parts import (
    check_settings,
    read_flow,
    read_json,
    read_schedule,
    read_tokenizer,
    schedule_defaults,
    strange_scheduler,
    tokenizer_defaults,
)
from diffitm.models.sides import empty_part
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
# What files hold beyond their configs that changes nothing: buffers of older versions, what a whole CLIP
# has beside its text model, and what a language model says its next word with.
LITTER = (
    r"(^|\.)position_ids$",
    r"^pos_embed\.pos_embed$",
    r"^(vision_model|visual_projection)\.",
    r"^(logit_scale|text_projection\.weight)$",
    r"^lm_head\.weight$",
)
# What stands before the names of a text model, by the part that it is of and the version.
ABOVE = re.compile(r"^((text_model|language_model|model)\.)+")
# Attention of older VAEs, which diffusers renames.
OLDER = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def check_loadable(
    source: ModelSource, loras: Sequence[str] = (), variant: str | None = None
) -> ModelSource:
    """What can be told of a model without its weights in memory: whether its files are whole, its tensors
    those of its configs, its parts of one model, and whether LoRA files fit it. Logs what its configs
    do not say. The source with the sizes of its parts, where its weights are on this machine.

    Raises InputError that names the file.
    """
    location, revision = on_machine(source)
    if revision is not None:  # of the Hub, and not here
        return source
    _tell_unconditional(source)
    try:
        parts = _check_parts(source, Path(location), variant)
        _tell_defaults(source, Path(location), parts)
    except InputError as error:
        raise InputError(f"{source.name!r}: {error.message}", source.field) from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{source.name!r}: {text}", source.field) from error
    network = parts.get("unet") or parts.get("transformer")
    if network is not None and registry.load(FAMILIES[source.family].denoiser).takes_lora:
        encoders = [parts[name] for name in ("text_encoder", "text_encoder_2") if name in parts]
        for lora in loras:
            tensors = read_lora(lora)[0]
            with naming(lora):
                match_lora(network, tensors, encoders)
    elif loras:
        raise InputError(
            f"{source.name!r} takes no LoRA, U-Nets and transformers of texts do", "lora"
        )
    sizes = [(name, sum(p.numel() for p in part.parameters())) for name, part in parts.items()]
    return replace(source, sizes=tuple(sizes))


def _tell_unconditional(source: ModelSource) -> None:
    """Log that a model has no true unconditional, as far as family, folder and name tell."""
    why = why_no_unconditional(source.name, source.told)
    if why is not None:
        log.warning("%s %s: its error of no text is no unconditional one", source.name, why)


def settled(
    source: ModelSource, prediction: str | None = None, resolution: int | None = None
) -> ModelSource:
    """The source with what of its folder, whose weights are on this machine, a score depends on beside
    them: whether its VAE stays in float32; the guidance that its network is told, where it takes one;
    what it predicts, where `prediction` is given and is not what the folder says, which is logged; the
    `resolution` that a flow model is asked for.

    Raises InputError.
    """
    location, revision = on_machine(source)
    if resolution is not None and not FAMILIES[source.family].flow:
        text = f"{resolution}: {source.name!r} takes the images that it was trained on; flow models"
        raise InputError(f"{text} take others", "resolution")
    try:
        upcast = source.family != ALWAYS_UPCAST and _says(location, revision, "vae", "force_upcast")
        guidance = GUIDANCE if _is_guided(source, location, revision) else None
        source = replace(source, upcast=upcast, guidance=guidance, resolution=resolution)
        if prediction is None:
            return source
        if FAMILIES[source.family].flow:
            raise InputError(f"{prediction}: {source.name!r} is a flow model", "prediction_type")
        there = read_schedule(location, revision).config.prediction_type
    except (OSError, ValueError) as error:
        raise InputError(f"{source.name!r}: {error}", source.field) from error
    if there == prediction:
        return source
    text = "%s: its output is read as %s, not as the %s that its scheduler gives"
    log.info(text, source.name, prediction, there)
    return replace(source, prediction=prediction)


def _says(
    location: str, revision: str | None, part: str, setting: str, default: bool = False
) -> bool:
    """Whether the settings of a part on this machine have something switched on; `default` where they do
    not say."""
    file = Path(location, part, "config.json")
    return revision is None and file.is_file() and bool(read_json(file).get(setting, default))


def _is_guided(source: ModelSource, location: str, revision: str | None) -> bool:
    """Whether its network takes a guidance: FLUX.2's does unless its settings say otherwise."""
    kind = FAMILIES[source.family].parts.get("transformer")
    known = inspect.signature(registry.load(kind).__init__).parameters if kind else {}
    setting = known.get("guidance_embeds")
    default = setting is not None and bool(setting.default)
    return _says(location, revision, "transformer", "guidance_embeds", default)


def _check_parts(source: ModelSource, folder: Path, variant: str | None) -> dict[str, nn.Module]:
    """The parts without weights, by name, once their files are found to be theirs."""
    files, names, family = files_of(folder), source.parts, FAMILIES[source.family]
    denoiser: type[Denoiser] = registry.load(family.denoiser)
    check_variant(files, names, variant)
    check_settings(folder, names)
    parts: dict[str, nn.Module] = {}
    for name in names:
        weights = [folder / n for n in needed(files, (name,), variant) if n.endswith(ENDINGS)]
        if (part := _empty(folder, name, family.parts[name])) is not None:
            parts[name] = part
            denoiser.check_part(name, part.config)
            _check_shapes(part, name, weights)
        else:
            for file in weights:
                check_whole(file)
    configs = {name: cast("Any", part).config for name, part in parts.items()}
    for name in names:
        if name.startswith("tokenizer"):
            encoder = configs[encoder_of(name)].to_dict()
            kind = registry.load(str(family.parts[name]))
            denoiser.templated("", read_tokenizer(str(folder), name, None, encoder, kind))
    denoiser.check_together(configs)
    if "scheduler" in names:
        (read_flow if family.flow else read_schedule)(str(folder), None)
    return parts


def _empty(folder: Path, name: str, kind: str | None) -> nn.Module | None:
    """A part of that class without memory for its weights; None of what has none."""
    if kind is None or name.startswith(WITHOUT_WEIGHTS):
        return None
    part: nn.Module = empty_part(registry.load(kind), read_json(folder / name / "config.json"))
    return part


def _check_shapes(part: nn.Module, name: str, files: Sequence[Path]) -> None:
    found: Shapes = {}
    for file in files:
        found |= {_plain(key): shape for key, shape in read_shapes(file).items()}
    expected = {_plain(key): tuple(value.shape) for key, value in part.state_dict().items()}
    tied = _tied(part)
    missing = [
        key
        for key in expected
        if key not in found and tied.get(key) not in found and not key.endswith("position_ids")
    ]
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


def _tied(part: nn.Module) -> dict[str, str]:
    """Tensors that are another's and lie in a file once, each with that other."""
    pairs = getattr(part, "_tied_weights_keys", None) or {}
    both = {_plain(k): _plain(v) for k, v in pairs.items()} if isinstance(pairs, dict) else {}
    return both | {other: key for key, other in both.items()}


def _plain(key: str) -> str:
    """A tensor's name as all versions of the libraries have it."""
    key = ABOVE.sub("", key)
    for old, new in OLDER.items():
        key = key.replace(old, new)
    return key


def encoder_of(tokenizer: str) -> str:
    """The part that a tokenizer is of."""
    return tokenizer.replace("tokenizer", "text_encoder")


def _tell_defaults(source: ModelSource, folder: Path, parts: Mapping[str, nn.Module]) -> None:
    """Log what the folder does not say, and what is taken."""
    names, family = source.parts, FAMILIES[source.family]
    for name, part in parts.items():
        settings, config = read_json(folder / name / "config.json"), cast("Any", part).config
        lacking = [
            key for key in UNSEEN.get(name, ()) if key not in settings and hasattr(config, key)
        ]
        if lacking:
            values = ", ".join(f"{key} {getattr(config, key)}" for key in lacking)
            text = "%s: %s/config.json does not say all, so there is taken: %s"
            log.warning(text, source.name, name, values)
    if "scheduler" in names and not family.flow:
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
        if str(family.parts[name]).endswith(":CLIPTokenizer"):
            encoder = cast("Any", parts[encoder_of(name)]).config.to_dict()
            for line in tokenizer_defaults(folder, name, encoder):
                log.warning("%s: %s", source.name, line)
