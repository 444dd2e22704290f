"""The layouts of LoRA files that are about: which are read, by what names, and which are not."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffitm.core.errors import InputError
from diffitm.models.weight_files import few

log = logging.getLogger("diffitm")

PARTS = ("unet", "text_encoder", "text_encoder_2")
TRANSFORMER = "transformer"  # what stands in place of 'unet' in a LoRA of one
# diffusers ('unet.<module>.lora_A.weight', '.lora.down.weight', for texts '.lora_linear_layer.down.weight')
# and PEFT ('base_model.model.<module>...').
_PLAIN = re.compile(
    r"(?P<module>.+?)\."
    r"(?P<side>lora_A|lora_B|lora\.down|lora\.up|lora_linear_layer\.down|lora_linear_layer\.up)"
    r"(?:\.[\w-]+)?\.weight"
)
# The older file of attention processors: '<block>.attn1.processor.to_q_lora.down.weight', for texts without
# 'processor'.
_PROCESSOR = re.compile(
    r"(?P<block>.+?)(?:\.processor)?\.(?P<name>to_q|to_k|to_v|to_out)_lora\.(?P<side>down|up)\.weight"
)
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_DOWN = ("lora_A", "lora.down", "lora_linear_layer.down", "down")
_IN_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
# What in a key tells an adapter that is no plain LoRA, whose tensors mean something else.
OTHERS = {
    "DoRA": r"\.dora_scale|lora_magnitude_vector",
    "LoHa (LyCORIS)": r"\.hada_(w|t)\d",
    "LoKr (LyCORIS)": r"\.lokr_(w|t)\d",
    "LoCon with a Tucker core (LyCORIS)": r"\.lora_mid\.",
    "GLoRA (LyCORIS)": r"\.[ab][12]\.weight$",
    "IA3": r"\.on_input$|\.ia3_",
    "OFT": r"\.oft_|\.boft_",
    "full-difference (LyCORIS)": r"\.diff(_b)?$|\.[wb]_norm$",
    "cloneofsimo": r"^(unet|text_encoder):\d+:(up|down)$",
    "kohya's transformer": r"^lora_transformer_|^lora_unet_(double|single|joint)_blocks_",
    "VeRA": r"vera_lambda|\.vera_[AB]\b",
    "AdaLoRA": r"\.lora_E\b|\.ranknum\b",
    "IP-Adapter": r"^(image_proj|ip_adapter)\.|_ip\.weight$",
    "ControlLoRA": r"^lora_controlnet$",
    "LyCORIS (its names begin with lycoris_)": r"^lycoris_",
    "whole model": r"^model\.diffusion_model\.|^(down|up)_blocks\.[\w.]+\.(to_q|conv1)\.weight$",
    "textual inversion": r"^<.*>$|^emb_params$|^string_to_param$|^clip_[lg]$",
}
_KOHYA = re.compile(r"lora_(unet|te\d?)_\w+\.(lora_(down|up)\.weight|alpha)")
READ = "plain LoRA and LoCon are, in diffusers', PEFT's or kohya's names"


class Place(NamedTuple):
    """What a tensor is of: a module of a part, and 'down', 'up' or 'alpha'."""

    part: str
    module: str
    side: str


def refuse_others(tensors: Mapping[str, Any]) -> None:
    """Raises InputError, which names the format, for adapters that are no plain LoRA."""
    for name, pattern in OTHERS.items():
        keys = [key for key in tensors if re.search(pattern, key)]
        if keys:
            article = "an" if name[0] in "AIO" else "a"
            raise InputError(
                f"is {article} {name} file ({len(keys):,} of {len(tensors):,} keys: {few(keys, 1)}), which "
                f"is not merged here; {READ}"
            )


def refuse_transformers(tensors: Mapping[str, Any]) -> None:
    """Raises InputError for the LoRA of a transformer, which no U-Net takes."""
    keys = [key for key in tensors if key.startswith(f"{TRANSFORMER}.")]
    if keys:
        raise InputError(
            f"it is a LoRA of a transformer (SD3, FLUX, ..; {len(keys):,} of {len(tensors):,} keys: "
            f"{few(keys, 1)}), which a U-Net does not take"
        )


def _refuse_mixed(tensors: Mapping[str, Any]) -> None:
    """Raises InputError that names the keys which are not kohya's, in a file that has some of those."""
    kohyas = [key for key in tensors if _KOHYA.fullmatch(key)]
    foreign = [key for key in tensors if not key.startswith("lora_")]
    if kohyas and foreign:
        fewer = min(foreign, kohyas, key=len)
        raise InputError(
            f"holds {len(kohyas):,} keys in kohya's names (lora_unet_.., lora_te_..) and {len(foreign):,} "
            f"in others; the fewer are {few(fewer)}: save the LoRA without them, or in names of one kind"
        )
    between = [key for key in tensors if re.search(r"\.lora_(down|up)\.weight$", key)]
    if between and not kohyas:
        raise InputError(
            f"has {len(between):,} of {len(tensors):,} keys such as {between[0]}: lora_down and lora_up are "
            "kohya's, the rest of the name is not (lora_unet_.., lora_te_..)"
        )


def _without_embeddings(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Without the embeddings of trigger words that Civitai's tools put beside a LoRA: they change no text
    without these words. That is logged."""
    kept = {key: value for key, value in tensors.items() if not key.startswith("bundle_emb.")}
    if len(kept) < len(tensors):
        words = sorted({key.split(".")[1] for key in tensors if key not in kept})
        text = "a LoRA's embeddings of its trigger words are left out: %s"
        log.warning(text, few(words))
    return kept


def from_kohya(unet: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Kohya's names (lora_unet_down_blocks_0_.., lora_unet_input_blocks_4_.., lora_te_..) as diffusers has
    them; other names as they are.

    Raises InputError for names that diffusers does not know.
    """
    tensors = _without_embeddings(tensors)
    _refuse_mixed(tensors)
    if not all(key.startswith("lora_") for key in tensors):
        return tensors
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    config: Any = unet.config
    try:
        renamed, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
            dict(tensors), unet_config=config
        )
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        raise InputError(
            f"its keys, as kohya has them, are strange: {' '.join(str(error).split())}"
        ) from error
    for key, alpha in (alphas or {}).items():
        place = place_of(key.removesuffix(".alpha"))
        name = f"{place.part}.{place.module}.alpha" if place else key
        renamed[name] = torch.tensor(alpha)
    return renamed


def place_of(key: str) -> Place | None:
    """What the tensor of this key is of, by the names of diffusers and PEFT; None if it is none of them. The
    network is 'unet', also where it is a transformer."""
    part, rest = "unet", key.removeprefix("base_model.model.")
    for name in (*PARTS, TRANSFORMER):
        if key.startswith(f"{name}."):
            part = "unet" if name == TRANSFORMER else name
            rest = key.removeprefix(f"{name}.")
    if match := _PROCESSOR.fullmatch(rest):
        name = match["name"]
        if part == "unet":
            module = f"{match['block']}.{name}" + (".0" if name == "to_out" else "")
        else:
            module = f"{match['block']}.{_IN_TEXT[name]}"
        return Place(part, module, match["side"])
    if match := _PLAIN.fullmatch(rest):
        return Place(part, match["module"], "down" if match["side"] in _DOWN else "up")
    if match := _ALPHA.fullmatch(rest):
        return Place(part, match["module"], "alpha")
    return None


def changes_texts(keys: Iterable[str]) -> bool:
    """Whether some keys of a LoRA file are of text encoders, in diffusers' names, PEFT's or kohya's."""
    return any("text_encoder" in key or key.startswith("lora_te") for key in keys)


def find_module(part: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; text encoders have it with 'text_model.' before it or without, as the
    version of transformers is."""
    modules = dict(part.named_modules())
    short = name.removeprefix("text_model.")
    return next((modules[n] for n in (name, short, f"text_model.{short}") if n in modules), None)
