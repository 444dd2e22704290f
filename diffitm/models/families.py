"""The families of diffusion models: which class runs a folder of diffusers, and what of it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffitm.core.errors import InputError, suggest


@dataclass(frozen=True)
class Family:
    """Where a family's Denoiser is, and what of a folder its scores depend on.

    `parts` are its folders, each with the class that is read of it, None of the scheduler, of which the
    settings are read alone. `optional` parts may be null in model_index.json. `settings` are those of
    model_index.json with what they are if absent. `flow` is whether its noise is that of rectified flow.
    `half` is the dtype on a GPU unless told. `told` is what else a store says of its scores: choices that
    are made for all of the family, and `unconditional` False where its errors of no text are none.
    """

    denoiser: str
    parts: Mapping[str, str | None]
    settings: Mapping[str, Any] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    flow: bool = False
    half: str = "fp16"
    told: Mapping[str, Any] = field(default_factory=dict)


_VAE = {"vae": "diffusers:AutoencoderKL", "scheduler": None}
_CLIP = {"text_encoder": "transformers:CLIPTextModel", "tokenizer": "transformers:CLIPTokenizer"}
_UNET = {"unet": "diffusers:UNet2DConditionModel", **_VAE, **_CLIP}
_PROJECTED = "transformers:CLIPTextModelWithProjection"
_FLOW: dict[str, Any] = {"flow": True, "half": "bf16", "told": {"prediction": "flow"}}
_DISTILLED = {"prediction": "flow", "unconditional": False}
_FLUX2 = {
    "transformer": "diffusers:Flux2Transformer2DModel",
    "vae": "diffusers:AutoencoderKLFlux2",
    "scheduler": None,
}
_PIXART = {
    "transformer": "diffusers:PixArtTransformer2DModel",
    **_VAE,
    "text_encoder": "transformers:T5EncoderModel",
    "tokenizer": "transformers:T5TokenizerFast",
}
_SD3, ONE_CLIP = "StableDiffusion3Pipeline", "StableDiffusion3Pipeline of one CLIP"
# The pipeline class that a diffusers folder names in model_index.json -> what runs it.
FAMILIES = {
    "StableDiffusionPipeline": Family("diffitm.models.stable_diffusion:StableDiffusion", _UNET),
    "StableDiffusionXLPipeline": Family(
        "diffitm.models.sdxl:StableDiffusionXL",
        {
            **_UNET,
            "text_encoder_2": _PROJECTED,
            "tokenizer_2": "transformers:CLIPTokenizer",
        },
        {"force_zeros_for_empty_prompt": True},
    ),
    "DiTPipeline": Family(
        "diffitm.models.dit:Dit",
        {"transformer": "diffusers:DiTTransformer2DModel", **_VAE},
        {"id2label": None},
    ),
    "PixArtAlphaPipeline": Family("diffitm.models.pixart:PixArt", _PIXART, half="bf16"),
    "PixArtSigmaPipeline": Family("diffitm.models.pixart:PixArtSigma", _PIXART, half="bf16"),
    _SD3: Family(
        "diffitm.models.sd3:StableDiffusion3",
        {
            "transformer": "diffusers:SD3Transformer2DModel",
            **_VAE,
            **{f"text_encoder{end}": _PROJECTED for end in ("", "_2")},
            **{f"tokenizer{end}": "transformers:CLIPTokenizer" for end in ("", "_2")},
            "text_encoder_3": "transformers:T5EncoderModel",
            "tokenizer_3": "transformers:T5TokenizerFast",
        },
        optional=("text_encoder_3", "tokenizer_3"),
        **_FLOW,
    ),
    ONE_CLIP: Family(
        "diffitm.models.sd3:StableDiffusion3",
        {"transformer": "diffusers:SD3Transformer2DModel", **_VAE, **_CLIP},
        **_FLOW,
    ),
    "SanaPipeline": Family(
        "diffitm.models.sana:Sana",
        {
            "transformer": "diffusers:SanaTransformer2DModel",
            "vae": "diffusers:AutoencoderDC",
            "scheduler": None,
            "text_encoder": "transformers:Gemma2Model",
            "tokenizer": "transformers:GemmaTokenizerFast",
        },
        **_FLOW,
    ),
    "FluxPipeline": Family(
        "diffitm.models.flux:Flux",
        {
            "transformer": "diffusers:FluxTransformer2DModel",
            **_VAE,
            **_CLIP,
            "text_encoder_2": "transformers:T5EncoderModel",
            "tokenizer_2": "transformers:T5TokenizerFast",
        },
        flow=True,
        half="bf16",
        told=_DISTILLED,
    ),
    "QwenImagePipeline": Family(
        "diffitm.models.qwen_image:QwenImage",
        {
            "transformer": "diffusers:QwenImageTransformer2DModel",
            "vae": "diffusers:AutoencoderKLQwenImage",
            "scheduler": None,
            "text_encoder": "transformers:Qwen2_5_VLForConditionalGeneration",
            "tokenizer": "transformers:Qwen2Tokenizer",
        },
        **_FLOW,
    ),
    "Lumina2Pipeline": Family(
        "diffitm.models.lumina2:Lumina2",
        {
            "transformer": "diffusers:Lumina2Transformer2DModel",
            **_VAE,
            "text_encoder": "transformers:Gemma2Model",
            "tokenizer": "transformers:GemmaTokenizerFast",
        },
        **_FLOW,
    ),
    "ZImagePipeline": Family(
        "diffitm.models.z_image:ZImage",
        {
            "transformer": "diffusers:ZImageTransformer2DModel",
            **_VAE,
            "text_encoder": "transformers:Qwen3Model",
            "tokenizer": "transformers:Qwen2Tokenizer",
        },
        **_FLOW,
    ),
    "Flux2Pipeline": Family(
        "diffitm.models.flux2:Flux2",
        {
            **_FLUX2,
            "text_encoder": "transformers:Mistral3ForConditionalGeneration",
            "tokenizer": "transformers:AutoTokenizer",
        },
        flow=True,
        half="bf16",
        told=_DISTILLED,
    ),
    "Flux2KleinPipeline": Family(
        "diffitm.models.flux2:Flux2Klein",
        {
            **_FLUX2,
            "text_encoder": "transformers:Qwen3ForCausalLM",
            "tokenizer": "transformers:Qwen2TokenizerFast",
        },
        {"is_distilled": False},
        **_FLOW,
    ),
}


def kind_of(index: Mapping[str, Any], name: str, field: str) -> str:
    """The family, a key of FAMILIES, that a model_index.json names. Raises InputError for one that is not
    known here."""
    kind = str(index["_class_name"])
    if kind not in FAMILIES:
        raise InputError(
            f"{name!r}: unknown kind of diffusion model {kind!r}{suggest(kind, FAMILIES)}", field
        )
    plain_clip = (index.get("text_encoder") or [None])[-1] == "CLIPTextModel"
    others = any(_has(index, f"text_encoder_{number}") for number in (2, 3))
    return ONE_CLIP if kind == _SD3 and plain_clip and not others else kind


def _has(index: Mapping[str, Any], part: str) -> bool:
    """Whether a model_index.json names a part, and not null."""
    return bool((index.get(part) or [None])[0])


def absent_parts(family: Family, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The optional parts that a model_index.json has not."""
    return tuple(part for part in family.optional if not _has(index, part))
