"""A CLIP's weights file against its architecture, by names and shapes alone: neither is in memory."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import open_clip
import torch

from diffitm.models.weight_files import Shapes, WeightsError, few, read_weights, tensors_of

NUMPY = (".npz", ".npy")  # big_vision's, for towers of timm
POSITIONS = "positional_embedding"
TRANSFORMERS = ("text_model.", "vision_model.")
SCALARS = ("logit_scale", "logit_bias")  # of no dimension or one
# What open_clip makes itself where a file lacks it, and the one that it leaves out.
OPTIONAL = ("logit_bias", "position_ids", "attn_mask", "num_batches_tracked")
LEFT_OUT = "text.transformer.embeddings.position_ids"
READ_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_weights(model: str, file: Path, text: str) -> None:
    """Whether the tensors of `file` are those of open_clip's `model`; `text` is how people call it.

    Raises WeightsError that says how they differ; open_clip stretches positions and says nothing.
    """
    empty = architecture(model)
    if file.suffix in NUMPY:
        if empty is not None and not hasattr(empty.visual, "trunk"):
            raise WeightsError(
                f"{file} is an archive of numpy's, as big_vision has for towers of timm (SigLIP); {text} "
                "has none: give its weights as .pt or .safetensors"
            )
        return
    held = read_weights(file, "meta")
    state: dict[str, Any] = dict(tensors_of(held, file))
    beside = [str(name) for name in held.get("state_dict", held) if name not in state]
    if empty is None:
        return
    state = _converted(empty, state)
    _check_dtypes(empty, state, file)
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    _check_positions(found, expected, file, text)
    missing = [n for n in expected if n not in found and not n.endswith(OPTIONAL)]
    strange = [n for n in found if n not in expected and n != LEFT_OUT] + beside
    other = [
        f"{n} {list(found[n])} instead of {list(expected[n])}"
        for n in expected
        if n in found and found[n] != expected[n] and n not in SCALARS
    ]
    if missing or strange or other:
        parts = [
            f"{len(names)} {what}: {few(names)}"
            for names, what in (
                (other, "have another shape (size mismatch)"),
                (missing, "are missing"),
                (strange, "are unknown"),
            )
            if names
        ]
        fitting = architectures_of(found)
        hint = "" if model in fitting else " or ".join(fitting)
        near = f". Its shapes are those of {hint}" if hint else ""
        if any(name.startswith(TRANSFORMERS) for name in strange):
            near = ". Its names are those of transformers, not open_clip's"
        if "logit_bias" in strange:
            near += (
                ". A logit_bias is of a training with --siglip and changes no cosine: save the weights "
                "without it"
            )
        raise WeightsError(
            f"{file} does not fit {text}: of {len(expected)} tensors {'; '.join(parts)}{near}"
        )


def _check_dtypes(empty: Any, state: dict[str, Any], file: Path) -> None:
    """Raises WeightsError for quantised weights, which open_clip would take as numbers."""
    for name, parameter in empty.named_parameters():
        tensor = state.get(name, parameter)
        if tensor.dtype not in READ_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise WeightsError(
                f"{file}: {name} is of {kind}: quantised weights are not read, give them in float32, float16 "
                "or bfloat16"
            )


def architecture(model: str) -> Any:
    """open_clip's model without memory for its weights; None where it cannot be made so."""
    root = logging.getLogger()
    root.addFilter(_is_no_reminder)
    try:
        with torch.device("meta"):
            return open_clip.create_model(
                model, load_weights=False, device="meta", pretrained_text=False
            )
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        logging.getLogger("diffitm").debug("%s has no form without weights: %s", model, error)
        return None
    finally:
        root.removeFilter(_is_no_reminder)


def _is_no_reminder(record: logging.LogRecord) -> bool:
    """Whether a line is not open_clip's, that a model without weights has none."""
    return "No pretrained weights loaded" not in record.getMessage()


def architectures_of(found: Shapes) -> list[str]:
    """Names of open_clip whose ViT has tensors of these shapes; [] where they are of no ViT."""
    sizes = _sizes_of(found)
    if sizes is None:
        return []
    return [name for name in open_clip.list_models() if _sizes_named(name) == sizes][:4]


def _converted(empty: Any, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors by the names that open_clip's load_checkpoint gives them."""
    if next(iter(state)).startswith("module"):
        state = {name[7:]: value for name, value in state.items()}
    try:
        state = open_clip.convert.convert_state_dict(empty, state)
    except (RuntimeError, KeyError, AttributeError, IndexError):  # of another family than it thinks
        return state
    if POSITIONS in state and not hasattr(empty, POSITIONS):
        return open_clip.model.convert_to_custom_text_state_dict(state)
    return state


def _check_positions(found: Shapes, expected: Shapes, file: Path, text: str) -> None:
    for name in (POSITIONS, f"text.{POSITIONS}", f"visual.{POSITIONS}"):
        if name not in found or name not in expected or found[name][-1:] != expected[name][-1:]:
            continue
        there, wanted = found[name][0], expected[name][0]
        if there == wanted:
            continue
        if name.startswith("visual"):
            raise WeightsError(
                f"{file} has positions of {list(found[name])}, {text} has {list(expected[name])}: "
                "they are for another image size"
            )
        raise WeightsError(
            f"{file} has {there} text positions, {text} has {wanted}: they are for another length of "
            "text (Long-CLIP has 248). A folder with an open_clip_config.json of that context_length "
            "loads them"
        )


Sizes = tuple[int, int, int, int, int, int, int]


def _sizes_of(found: Shapes) -> Sizes | None:
    """Patch, width and layers of a ViT, its positions, width and layers of the text, and the joint
    width."""
    try:
        width, _, patch, _ = found["visual.conv1.weight"]
        text_width, joint = found["text_projection"]
        places, _ = found[f"visual.{POSITIONS}"]
    except (KeyError, ValueError):
        return None
    layers, text_layers = (
        len({n.removeprefix(start).split(".")[0] for n in found if n.startswith(start)})
        for start in ("visual.transformer.resblocks.", "transformer.resblocks.")
    )
    return patch, width, layers, places, text_width, text_layers, joint


@functools.cache
def _sizes_named(model: str) -> Sizes | None:
    config = open_clip.get_model_config(model)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not {"patch_size", "width", "layers", "image_size"} <= vision.keys():
        return None
    if not {"width", "layers"} <= text.keys():
        return None
    side, patch = vision["image_size"], vision["patch_size"]
    if not isinstance(side, int) or not isinstance(vision["layers"], int):
        return None
    places = (side // patch) ** 2 + 1
    layers = vision["layers"]
    return (
        patch,
        vision["width"],
        layers,
        places,
        text["width"],
        text["layers"],
        config["embed_dim"],
    )
